"""`leeway run CONFIG`: every service of a run as supervised processes, until the run is finished.

configuration ── resolve ──> runs/NAME/config.toml ──> supervisor: replay buffer, inference servers, learner
                                                            │ journal lines of the learner
                                                            ▼
                                          progress display ──> report.html
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learner.run_artifacts.checkpoint import CheckpointStore
from learner.run_artifacts.journal import read_journal
from leeway.cli.progress import open_progress
from leeway.cli.report import write_report
from leeway.cli.run_folder import has_finished, load_run_document, open_run_folder, prepare_run_folder
from leeway.cli.serve import on_ranks, serve_command
from leeway.cli.supervisor import Outcome, Service, Supervisor
from leeway.config import RunConfiguration, RunOptions, read_configuration
from leeway.config.references import check_references
from leeway.errors import PreconditionError
from leeway.service.process import EXIT_FAILED, EXIT_OK, EXIT_REFUSED, add_override_option


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Start a run with all its services (replay buffer, learner, inference servers), show its progress, and write a "
        "report at the end. A process that dies is restarted. Ctrl-C stops the run with a checkpoint; --resume "
        "continues it."
    )
    parser.add_argument(
        "config", type=Path, metavar="CONFIG", help="TOML file, or the name of an example such as sortmix8"
    )
    add_override_option(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--plain", action="store_true", help="log lines instead of the live display")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    configuration = read_configuration(load_run_document(arguments.config, arguments.overrides))
    check_references(configuration)
    if arguments.check:
        print(f"{arguments.config}: configuration OK")
        return EXIT_OK
    run = configuration.run
    prepare_run_folder(run, resume=arguments.resume)
    config_path = run.run_directory / "config.toml"
    configuration = configuration.with_free_ports()
    configuration.write(config_path)
    outcome = asyncio.run(_supervise(configuration, config_path, plain=arguments.plain))
    return _conclude(run, _command(arguments), outcome)


async def _supervise(configuration: RunConfiguration, config_path: Path, *, plain: bool) -> Outcome:
    run, network = configuration.run, configuration.network
    arguments = ("--config", str(config_path), "--supervised")
    options = configuration.inference_server
    servers = tuple(
        Service(
            f"server-{index}",
            serve_command(
                *("inference-server", *arguments, "--index", str(index)),
                python=str(options.python_of(options.engine_of(index)) or sys.executable),
            ),
        )
        for index in range(len(network.inference_servers))
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    with open_progress(run, plain=plain or not sys.stderr.isatty()) as progress:
        supervisor = Supervisor(
            replay_buffer=Service("replay-buffer", serve_command("replay-buffer", *arguments)),
            learner=Service("learner", on_ranks(serve_command("learner", *arguments), configuration.learner.ranks)),
            servers=servers,
            learner_stop_seconds=configuration.learner.stop_seconds,
            log_directory=run.run_directory / "logs",
            on_journal_line=progress.on_journal_line,
            on_event=progress.on_event,
        )

        def on_signal() -> None:
            if stop.is_set():
                supervisor.kill()  # a second signal: do not wait
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        return await supervisor.run(stop)


def _checkpoint_words(directory: Path, step: int) -> str:
    if not step:
        return ""
    newest = CheckpointStore(directory / "checkpoints", keep=1).steps()[-1]
    return " with a checkpoint" if newest == step else f"; its newest checkpoint is of step {newest}"


def _command(arguments: argparse.Namespace) -> str:
    """The command line that starts this run, with every override."""
    overrides = [part for override in arguments.overrides for part in ("--set", override)]
    return shlex.join(["leeway", "run", str(arguments.config), *overrides])


def _conclude(run: RunOptions, command: str, outcome: Outcome) -> int:
    directory = run.run_directory
    if outcome.error:
        print(f"leeway: {outcome.error}\nleeway: logs are in {directory / 'logs'}", file=sys.stderr)
        return EXIT_REFUSED if outcome.refused else EXIT_FAILED
    steps = sum(record["kind"] == "step" for record in read_journal(directory / "metrics.jsonl"))
    report = _write_report(directory) if steps else ""
    if not has_finished(directory):
        again = f"{command} --resume" if steps else command
        print(f"leeway: stopped at step {steps}{_checkpoint_words(directory, steps)}; continue with: {again}")
        return EXIT_OK
    print(_closing_lines(json.loads((directory / "summary.json").read_text(encoding="utf-8"))))
    print(report)
    return EXIT_OK


def _write_report(directory: Path) -> str:
    """The line that says where the report is, or why there is none."""
    try:
        return f"report: {write_report(open_run_folder(directory))}"
    except PreconditionError as error:
        return error.message


def _closing_lines(summary: Mapping[str, Any]) -> str:
    lines = [f"{summary['run']}: {summary['steps']} steps in {summary['wall_seconds']:.0f} s"]
    if summary["heldout_before"] is not None:
        lines.append(
            f"held-out reward {summary['heldout_before']:.3f} -> {summary['heldout_after']:.3f} "
            f"({summary['heldout_draws']} draws)"
        )
    lines.append(
        f"{summary['tokens_per_second']:.0f} trained tokens/s; "
        f"{summary['stale_token_fraction']:.0%} of them stale by a step or more; "
        f"learner idle {summary['learner_idle_fraction']:.0%}; "
        f"generation and training overlapped {summary['overlap_seconds']:.0f} s"
    )
    return "\n".join(lines)
