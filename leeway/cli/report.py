"""`leeway report RUN`: the curves of a run as one HTML file that opens without a network.

Written by `leeway run` at the end; the command draws it again from metrics.jsonl and summary.json, also while a run
is going.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from types import ModuleType
from typing import Any

from learner.run_artifacts.journal import read_journal
from leeway.cli.command import add_run_argument
from leeway.cli.run_folder import RunFolder, open_run_folder
from leeway.errors import NotFoundError, PreconditionError
from leeway.service.process import EXIT_OK


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Draw a run's report.html again from metrics.jsonl and summary.json; also while the run is going. The page "
        "holds its curves and opens without a network."
    )
    add_run_argument(parser)
    parser.add_argument("--curve", type=Path, metavar="FILE", help="also write the reward curve alone, as SVG")
    parser.set_defaults(handler=_report)


def _report(arguments: argparse.Namespace) -> int:
    folder = open_run_folder(arguments.run)
    print(write_report(folder))
    if arguments.curve is not None:
        curve = _curves().draw_reward_curve(read_journal(folder.directory / "metrics.jsonl"))
        arguments.curve.write_text(curve, encoding="utf-8")
        print(arguments.curve)
    return EXIT_OK


def write_report(folder: RunFolder) -> Path:
    """Draw `report.html` in a run's folder.

    Raises:
        NotFoundError: the run has no steps yet.
        PreconditionError: matplotlib is not installed.
    """
    directory = folder.directory
    records = read_journal(directory / "metrics.jsonl")
    if not any(record["kind"] == "step" for record in records):
        raise NotFoundError(f"{directory}: metrics.jsonl holds no steps; nothing to report yet")
    summary_path = directory / "summary.json"
    summary: dict[str, Any] = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.exists() else {}
    path = directory / "report.html"
    curves = _curves().draw_curves(records)
    page = _PAGE.substitute(
        title=html.escape(directory.resolve().name),
        headline=_headline(summary),
        tiles=_tiles(summary),
        curves="\n".join(
            f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>" for caption, svg in curves
        ),
        summary=html.escape(json.dumps(summary, indent=1)),
        config=html.escape(folder.config_path.read_text(encoding="utf-8")),
    )
    path.write_text(page, encoding="utf-8")
    return path


def _curves() -> ModuleType:
    """`leeway.cli.curves`, which needs matplotlib.

    Raises:
        PreconditionError: matplotlib is not installed.
    """
    try:
        from leeway.cli import curves
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise PreconditionError(
            "no report: its curves need matplotlib, which is not installed; pip install 'leeway[report]'"
        ) from error
    return curves


def _headline(summary: Mapping[str, Any]) -> str:
    if summary.get("heldout_after") is None:
        return "no held-out evaluation yet"
    return (
        f"held-out reward {summary['heldout_before']:.3f} &rarr; <b>{summary['heldout_after']:.3f}</b> "
        f"in {summary['steps']} steps and {summary['wall_seconds']:.0f} s"
    )


def _tiles(summary: Mapping[str, Any]) -> str:
    if not summary:
        return ""
    dropped = ", ".join(f"{count} {reason}" for reason, count in summary["dropped_groups"].items()) or "none"
    push = summary["weight_push_seconds"]["median"]
    tiles: Sequence[tuple[str, str, str]] = (
        (f"{summary['tokens_per_second']:.0f}", "trained tokens per second", ""),
        (
            f"{summary['stale_token_fraction']:.0%}",
            "of trained tokens stale by a step or more",
            f"bound {summary['max_staleness']}",
        ),
        (
            f"{summary['overlap_seconds']:.0f} s",
            "generation and training at once",
            f"{summary['training_seconds']:.0f} s of training",
        ),
        (f"{summary['learner_idle_fraction']:.0%}", "learner idle", "waiting for a batch"),
        ("-" if push is None else f"{push * 1000:.0f} ms", "weight push, median", "announced to acknowledged"),
        (str(summary["groups_consumed"]), "groups consumed", f"dropped: {dropped}"),
    )
    return "\n".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(label)}</span><small>{html.escape(note)}</small></div>"
        for value, label, note in tiles
    )


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title - Leeway</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; }
header p { margin: .25rem 0 1.5rem; color: #51606f; font-size: 1.05rem; }
header b { color: #0b7285; }
.tiles { display: grid; gap: .75rem; margin: 0 0 1.25rem; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); }
.tiles div, figure { background: #fff; border: 1px solid #e2e6eb; border-radius: 8px; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; }
.tiles span { display: block; color: #34414e; }
.tiles small { color: #7a8794; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: .75rem; }
@media (max-width: 540px) { .curves { grid-template-columns: 1fr; } }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { width: 100%; height: auto; display: block; }
details { margin-top: 1rem; }
pre { background: #fff; border: 1px solid #e2e6eb; border-radius: 8px; padding: 1rem; overflow: auto; font-size: 13px; }
</style>
<main>
<header><h1>$title</h1><p>$headline</p></header>
<section class="tiles">
$tiles
</section>
<section class="curves">
$curves
</section>
<details><summary>summary.json</summary><pre>$summary</pre></details>
<details><summary>config.toml</summary><pre>$config</pre></details>
</main>
</html>
""")
