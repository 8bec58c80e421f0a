"""Certificates for tests: one authority, one certificate for 127.0.0.1 and localhost, made by the program `openssl`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from leeway.rpc import Security


def make_security(folder: Path) -> Security:
    """What every service of one run holds."""
    folder.mkdir()
    key, name = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"], "/CN=localhost"
    _openssl(
        folder, "req", "-x509", *key, "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"
    )
    _openssl(folder, "req", *key, "-subj", name, "-keyout", "service.key", "-out", "service.csr")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
    _openssl(folder, "x509", "-req", "-in", "service.csr", *signing, "-out", "service.pem")
    return Security.from_files(folder / "service.pem", folder / "service.key", folder / "ca.pem", insecure=False)


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
