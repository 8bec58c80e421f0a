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
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from inference_server.options import InferenceServerOptions
from learner.options import LearnerOptions
from leeway.commands.progress import open_progress
from leeway.commands.report import write_report
from leeway.commands.supervisor import Outcome, Service, Supervisor
from leeway.config import (
    Document,
    EvaluationOptions,
    MetricsOptions,
    ModelOptions,
    NetworkOptions,
    Options,
    RunOptions,
    SamplingOptions,
    TaskOptions,
    load_document,
    section,
    write_document,
)
from leeway.errors import ConfigError, PreconditionError
from leeway.ports import free_port
from leeway.process import EXIT_FAILED, EXIT_OK, EXIT_REFUSED
from leeway.tasks import load_tasks
from replay_buffer.options import ReplayBufferOptions

SECTIONS: Mapping[str, type[Options]] = {
    "run": RunOptions,
    "model": ModelOptions,
    "task": TaskOptions,
    "sampling": SamplingOptions,
    "network": NetworkOptions,
    "metrics": MetricsOptions,
    "evaluation": EvaluationOptions,
    "replay_buffer": ReplayBufferOptions,
    "inference_server": InferenceServerOptions,
    "learner": LearnerOptions,
}


def add_parser(subparsers: Any) -> None:  # noqa: ANN401 (argparse names its type privately)
    """Declare the command."""
    parser = subparsers.add_parser("run", help="run every service of a configuration", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="TOML configuration")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key; may be repeated",
    )
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    parser.add_argument("--plain", action="store_true", help="log lines instead of the live display")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    document = load_document(arguments.config, arguments.overrides)
    sections = resolve(document)
    if arguments.check:
        _check_references(sections)
        print(f"{arguments.config}: fine")
        return EXIT_OK
    run = sections["run"]
    assert isinstance(run, RunOptions)
    _refuse_existing(run, arguments)
    run.run_directory.mkdir(parents=True, exist_ok=True)
    config_path = run.run_directory / "config.toml"
    write_document(config_path, sections)
    outcome = asyncio.run(_supervise(run, sections, config_path, plain=arguments.plain))
    return _conclude(run, arguments.config, outcome)


def resolve(document: Document) -> dict[str, Options]:
    """Every section validated, free ports chosen, folders named.

    Raises:
        ConfigError: naming file and key.
    """
    values = {name: dict(table) for name, table in document.values.items()}
    run = section(document, "run", RunOptions)
    values.setdefault("replay_buffer", {}).setdefault("directory", str(run.run_directory / "replay"))
    resolved = replace(document, values=values)
    sections = {name: section(resolved, name, options) for name, options in SECTIONS.items()}
    network, metrics = sections["network"], sections["metrics"]
    assert isinstance(network, NetworkOptions) and isinstance(metrics, MetricsOptions)
    if len(network.inference_servers) != len(metrics.inference_servers):
        raise ConfigError(
            f"{document.path}: metrics.inference_servers: lists {len(metrics.inference_servers)} ports, "
            f"network.inference_servers {len(network.inference_servers)} addresses; give one port per server"
        )
    sections["network"] = network.model_copy(
        update={
            "replay_buffer": _fixed_address(network.replay_buffer),
            "policy": _fixed_address(network.policy),
            "inference_servers": tuple(_fixed_address(address) for address in network.inference_servers),
        }
    )
    sections["metrics"] = metrics.model_copy(
        update={
            "replay_buffer": metrics.replay_buffer or free_port(metrics.host),
            "learner": metrics.learner or free_port(metrics.host),
            "inference_servers": tuple(port or free_port(metrics.host) for port in metrics.inference_servers),
        }
    )
    return sections


def _check_references(sections: Mapping[str, Options]) -> None:
    """What only shows when it is opened: the model directory and the tasks."""
    model, task, run = sections["model"], sections["task"], sections["run"]
    servers, learner = sections["inference_server"], sections["learner"]
    assert isinstance(model, ModelOptions) and isinstance(task, TaskOptions) and isinstance(run, RunOptions)
    assert isinstance(servers, InferenceServerOptions) and isinstance(learner, LearnerOptions)
    if (servers.engine == "arithmetic") != (learner.trainer == "arithmetic"):
        raise ConfigError(
            f"inference_server.engine is {servers.engine}, but learner.trainer is {learner.trainer}; "
            "a rehearsal needs arithmetic for both"
        )
    if learner.trainer != "arithmetic" and not (model.directory / "config.json").is_file():
        raise ConfigError(f"model.path: {model.path} holds no Hugging Face model (no config.json)")
    load_tasks(task, run.seed)


def _fixed_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return address if int(port) else f"{host}:{free_port(host)}"


def _refuse_existing(run: RunOptions, arguments: argparse.Namespace) -> None:
    """A run's folder is never overwritten."""
    directory = run.run_directory
    started = (directory / "config.toml").exists()
    if arguments.resume and not started:
        raise PreconditionError(f"{directory}: there is no run to resume; start it without --resume")
    if not started:
        return
    if _finished(directory):
        raise PreconditionError(
            f"{directory}: this run is finished; its report is {directory / 'report.html'}. "
            "To train again, choose another name with --set run.name=NAME, or remove the folder"
        )
    if not arguments.resume:
        raise PreconditionError(
            f"{directory}: holds an unfinished run; continue it with --resume, "
            "or choose another name with --set run.name=NAME"
        )


def _finished(directory: Path) -> bool:
    path = directory / "summary.json"
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["finished"])


async def _supervise(run: RunOptions, sections: Mapping[str, Options], config_path: Path, *, plain: bool) -> Outcome:
    network = sections["network"]
    assert isinstance(network, NetworkOptions)
    arguments = ("--config", str(config_path), "--supervised")
    servers = tuple(
        Service(f"server-{index}", ("inference_server", *arguments, "--index", str(index)))
        for index in range(len(network.inference_servers))
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with open_progress(run, plain=plain or not sys.stderr.isatty()) as progress:
        supervisor = Supervisor(
            replay_buffer=Service("replay-buffer", ("replay_buffer", *arguments)),
            learner=Service("learner", ("learner", *arguments)),
            servers=servers,
            log_directory=run.run_directory / "logs",
            on_journal_line=progress.on_journal_line,
            on_event=progress.on_event,
        )
        return await supervisor.run(stop)


def _conclude(run: RunOptions, config: Path, outcome: Outcome) -> int:
    directory = run.run_directory
    if outcome.error:
        print(f"leeway: {outcome.error}\nleeway: logs are in {directory / 'logs'}", file=sys.stderr)
        return EXIT_REFUSED if outcome.refused else EXIT_FAILED
    report = write_report(directory)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    if not summary["finished"]:
        print(
            f"leeway: stopped at step {summary['steps']} with a checkpoint; continue with: leeway run {config} --resume"
        )
        return EXIT_OK
    print(_closing_lines(summary))
    print(f"report: {report}")
    return EXIT_OK


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
