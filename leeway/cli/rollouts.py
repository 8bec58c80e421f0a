"""`leeway rollouts RUN`: shows rollouts from the replay buffer's log, with pi - mu for each token."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from learner.run_artifacts.journal import read_policy_logprobs
from leeway.cli.command import add_run_argument
from leeway.cli.replay_access import open_replay
from leeway.cli.run_folder import RunFolder, open_run_folder
from leeway.config import ENGINES, RunConfiguration
from leeway.errors import LeewayError
from leeway.service.process import EXIT_OK
from leeway.trajectory.assembly import assemble_trajectory
from leeway.types import (
    Float32Array,
    GroupRecord,
    GroupState,
    Purpose,
    SegmentKind,
    Trajectory,
    TrajectoryRecord,
)

Decode = Callable[[Sequence[int]], str]
_STATES: Final = {state.name.lower(): state for state in GroupState}
_NOTABLE_DIFFERENCE: Final = 0.02
"""|pi - mu| from which a token is coloured."""


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Show rollouts from the replay buffer's log: prompt, completion, reward and finish reason of each trajectory. "
        "Per token it shows mu, the probability with which the engine sampled it, and pi - mu, where pi is the "
        "learner's probability when it trained on the token."
    )
    add_run_argument(parser)
    parser.add_argument("--step", type=int, default=0, help="only what this step trained on")
    parser.add_argument("--state", choices=sorted(_STATES), help="only groups in this state, for example dropped")
    parser.add_argument("--evaluation", action="store_true", help="held-out rollouts instead of training ones")
    parser.add_argument("--groups", type=int, default=3, metavar="N", help="newest groups to show (default 3; 0: all)")
    parser.add_argument("--members", type=int, default=2, metavar="N", help="members per group (default 2; 0: all)")
    parser.set_defaults(handler=_rollouts)


def _rollouts(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)
    decode = _load_decoder(folder.configuration)
    asyncio.run(_show(arguments, folder, decode))
    return EXIT_OK


async def _show(arguments: argparse.Namespace, folder: RunFolder, decode: Decode) -> None:
    console = Console(highlight=False, soft_wrap=False)
    shown = 0
    async with open_replay(folder.config_path) as client:
        async for group in client.export_groups(
            purpose=Purpose.EVAL if arguments.evaluation else Purpose.TRAIN,
            state=_STATES[arguments.state] if arguments.state else None,
            step=arguments.step,
            limit=arguments.groups,
        ):
            logprobs = read_policy_logprobs(folder.directory, group.step) if group.step else {}
            _print_group(console, group, logprobs, decode, arguments.members)
            shown += 1
    if not shown:
        console.print("no rollouts match")


def _load_decoder(configuration: RunConfiguration) -> Decode:
    if ENGINES[configuration.inference_server.engine].rehearsal:
        from leeway.arithmetic import ArithmeticTokenizer

        return ArithmeticTokenizer().decode
    from leeway.huggingface import load_tokenizer  # transformers takes seconds to import

    tokenizer: Any = load_tokenizer(configuration.model.directory)
    return lambda token_ids: str(tokenizer.decode(list(token_ids)))


def _print_group(
    console: Console, group: GroupRecord, logprobs: Mapping[str, Float32Array], decode: Decode, members: int
) -> None:
    state = group.state.name.lower()
    if group.drop_reason is not None:
        state += f" ({group.drop_reason.name.lower()}: {group.drop_message or 'no details recorded'})"
    trained = f", step {group.step}" if group.step else ""
    console.rule(Text(f"group {group.group_id}, task {group.task_index}{trained}, {state}"), align="left")
    ordered = sorted(group.trajectories, key=lambda record: record.member)
    for record in ordered[: members or None]:
        _print_trajectory(console, record, logprobs.get(record.trajectory_id), decode)
    hidden = len(ordered) - len(ordered[: members or None])
    if hidden:
        console.print(Text(f"{hidden} more members: --members 0 shows all", style="dim"))


def _print_trajectory(
    console: Console, record: TrajectoryRecord, policy_logprobs: Float32Array | None, decode: Decode
) -> None:
    if record.close is None:
        console.print(
            Text(f"{record.trajectory_id}  {record.failure or 'still open'}  ({record.server_id})", style="dim")
        )
        return
    try:
        trajectory = assemble_trajectory(record)
    except LeewayError as error:
        console.print(Text(f"{record.trajectory_id}  set aside: {error.message}", style="yellow"))
        return
    versions = ", ".join(f"{span.version.epoch}.{span.version.step}" for span in trajectory.version_spans)
    console.print(
        Text.assemble(
            (f"{trajectory.trajectory_id}  ", "bold"),
            (f"reward {trajectory.reward:g}  ", "green" if trajectory.reward > 0 else "red"),
            f"{trajectory.finish_reason.name.lower()}  version {versions}  ",
            (record.server_id, "dim"),
        )
    )
    for segment in trajectory.segments:
        text = decode(trajectory.token_ids[segment.start_token : segment.end_token].tolist())
        console.print(Text.assemble((f"  {segment.kind.name.lower():<12}", "dim"), repr(text)))
        if segment.kind is SegmentKind.MODEL:
            console.print(_token_table(trajectory, policy_logprobs, decode, console.width))


def _token_table(trajectory: Trajectory, policy_logprobs: Float32Array | None, decode: Decode, width: int) -> Table:
    """Tokens in the loss with mu and pi - mu below each, as many per line as fit."""
    positions = np.flatnonzero(trajectory.loss_mask)
    mu = np.exp(trajectory.behavior_logprobs[positions])
    difference = None if policy_logprobs is None else np.exp(policy_logprobs) - mu
    words = [repr(decode([int(trajectory.token_ids[position])]))[1:-1] for position in positions]
    cell = max([6, *(len(word) for word in words)]) + 1
    per_line = max((width - 20) // cell, 1)
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="dim", width=13, justify="right")
    for _ in range(min(per_line, len(words))):
        table.add_column(justify="right", width=cell - 1)
    for start in range(0, len(words), per_line):
        line = slice(start, start + per_line)
        table.add_row("token", *(Text(word, style="bold") for word in words[line]))
        table.add_row("mu", *(f"{value:.3f}" for value in mu[line]))
        table.add_row("pi - mu", *_differences(difference, line))
    return table


def _differences(difference: Float32Array | None, line: slice) -> list[Text]:
    """The row of pi - mu; empty where the learner did not train on the trajectory."""
    return [] if difference is None else [_coloured(float(value)) for value in difference[line]]


def _coloured(difference: float) -> Text:
    style = "" if abs(difference) < _NOTABLE_DIFFERENCE else "cyan" if difference > 0 else "magenta"
    return Text(f"{difference:+.3f}", style=style)
