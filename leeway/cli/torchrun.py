"""How a learner of several ranks is started on this host."""

from __future__ import annotations

from leeway.service.ports import free_port


def launcher(ranks: int) -> tuple[str, ...]:
    """What comes before a module's name, after `python -m`, to start it as several ranks."""
    if ranks == 1:
        return ()
    return (
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port('127.0.0.1')}",
        "-m",
    )
