"""The wheel in an environment of its own: `leeway run NAME` from any folder, whatever modules that folder holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.deadlines import RUN_SECONDS
from tests.e2e.own_modules import add_own_modules, imported

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SHORT = ("--plain", "--set", "run.steps=4", "--set", "evaluation.tasks=4")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, beside the packages that it needs: not the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel), cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # .pth files in those folders are not read, so an editable install of the checkout stays out.
    needed = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "needed.pth").write_text("\n".join(needed) + "\n", encoding="utf-8")
    found = _run(str(python), "-P", "-c", "import leeway; print(leeway.__file__)", cwd=folder)
    assert found.stdout.startswith(str(folder)), found.stdout
    return folder / "venv" / "bin"


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _finished(run: Path) -> bool:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["finished"]


def test_an_example_runs_by_name_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    said = _run(str(environment / "leeway"), "run", "rehearsal", *SHORT, cwd=tmp_path).stdout
    assert _finished(tmp_path / "runs" / "rehearsal")
    assert f"report: {tmp_path / 'runs' / 'rehearsal' / 'report.html'}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_every_example_of_the_wheel_has_all_its_files(environment: Path, tmp_path: Path) -> None:
    for name in ("sortmix8", "sortmix8-dense", "rehearsal"):
        assert "configuration OK" in _run(str(environment / "leeway"), "run", name, "--check", cwd=tmp_path).stdout


def test_a_users_own_modules_change_nothing(environment: Path, tmp_path: Path) -> None:
    """They lie where the command runs, and where the task's own module is imported from."""
    shutil.copy(ROOT / "examples" / "rehearsal.toml", tmp_path / "mine.toml")
    shutil.copytree(ROOT / "examples" / "rehearsal", tmp_path / "rehearsal")
    add_own_modules(tmp_path)
    for service in ("replay-buffer", "learner", "inference-server"):
        _run(str(environment / "leeway"), "serve", service, "--config", "mine.toml", "--check", cwd=tmp_path)
    directory = ("--set", "run.directory=runs")
    _run(str(environment / "leeway"), "run", "mine.toml", *SHORT, *directory, cwd=tmp_path)
    assert _finished(tmp_path / "runs" / "rehearsal")
    recomputed = _run(str(environment / "leeway"), "recompute-step", "runs/rehearsal", "4", cwd=tmp_path)
    assert recomputed.stdout.endswith("equal: step 4 gives the same statistics and weights, bit for bit\n")
    assert imported(tmp_path) == ""
