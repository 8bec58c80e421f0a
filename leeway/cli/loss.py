"""`leeway loss [FILE]`: explains what an algorithm makes of given tokens, read as JSON from FILE or stdin."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from leeway.config.algorithms import ALGORITHMS
from leeway.errors import ConfigError, InvalidDataError, NotFoundError
from leeway.service.process import EXIT_OK

if TYPE_CHECKING:
    from learner.losses.explanation import Explanation

_NARROWEST_TABLE: Final = 140
_PARAMETERS: Final = ("delta_low", "delta_high", "truncation", "ratio_low", "ratio_high", "divergence")

_INPUT: Final = f"""\
The input is one JSON object; T tokens of N sequences, one after the other:

  mu          [T]     log-probs of the sampled tokens from the inference engine;
                      required
  pi          [T]     log-probs of the same tokens from the learner; required
  advantages  [T]     per token, or [N] per sequence; required
  lengths     [N]     tokens of each sequence (default: one sequence)
  algorithm           its name, unless --algorithm gives it
                      (default dppo-binary-tv)
  options     object  loss keys of [learner.training]: delta_low, delta_high,
                      truncation, ratio_low, ratio_high, divergence, topk,
                      delta_growth, delta_growth_limit, mismatch_allowance,
                      quadratic_coefficient, reference_kl_coefficient,
                      reference_kl_estimator, entropy_coefficient,
                      aggregation, horizon
  loss_mask   [T]     true or 1 where a token is in the loss (default: all)
  token_ids   [T]     the sampled tokens; for top-K, as are the next three
  topk_ids    [T][K]  the engine's likeliest tokens
  mu_topk     [T][K]  their log-probs from the engine
  pi_topk     [T][K]  their log-probs from the learner
  proximal    [T]     log-probs under pi_old; for minirl, minirl-tis,
                      decoupled-ppo
  reference   [T]     log-probs under the initial model; for
                      reference_kl_coefficient
  entropy     [T]     of the learner's distribution; for entropy_coefficient
  staleness   [T]     in optimizer steps; for delta_growth
  mismatch            mean divergence at staleness zero; for mismatch_allowance
  probabilities       true: mu, pi, mu_topk, pi_topk, proximal, reference are
                      probabilities, not log-probs

The output with --json has these keys. Infinite numbers are the strings "inf"
and "-inf".

  sequence, mu, pi, advantage, ratio, binary_tv, binary_kl, weight
              [T]
  divergence  [T]     what the algorithm compares with delta; null for none
  delta       [T]     the bound; null for none
  mask        [T]     1 = kept
  token_loss  [T]     before aggregation
  gradient    [T]     d token_loss / d log pi, before aggregation
  sequence_weight     [N]
  loss, algorithm, parameters, aggregation

Algorithms:
{textwrap.fill(", ".join(ALGORITHMS), 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)}

Example:
  echo '{{"mu": [-9.2, -0.01], "pi": [-4.6, -0.2], "advantages": [1, -1]}}' \\
    | leeway loss --algorithm cispo
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Explain what an algorithm makes of given tokens: ratio, divergence, mask,\n"
        "weight, gradient, loss. Computed with the learner's own functions in float64,\n"
        "to understand a setting and to compare with other implementations."
    )
    parser.epilog = _INPUT
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, nargs="?", default=Path("-"), metavar="FILE", help="JSON (default: stdin)")
    parser.add_argument("--algorithm", metavar="NAME", help="in place of the input's")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one of the options, for example delta_low=0.15; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.set_defaults(handler=_loss)


def _loss(arguments: argparse.Namespace) -> int:
    where = "stdin" if arguments.file == Path("-") else str(arguments.file)
    content = _with_options(_parse(_read(arguments.file), where), arguments.algorithm, arguments.overrides, where)
    from learner.losses.explanation import explain_loss, read_loss_input  # torch takes seconds to import

    given = read_loss_input(content, where)
    try:
        explanation = explain_loss(given)
    except InvalidDataError as error:
        raise InvalidDataError(f"{where}: {error.message}") from error
    if arguments.json:
        print(json.dumps(_as_json(explanation), allow_nan=False))
    else:
        _print_table(explanation)
    return EXIT_OK


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if path == Path("-") else path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFoundError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise InvalidDataError(f"{path}: is not UTF-8 text: {error.reason}") from error


def _parse(text: str, where: str) -> Any:  # noqa: ANN401 (JSON)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidDataError(f"{where}: is not JSON: {error}; see `leeway loss --help` for an example") from error


def _with_options(content: Any, algorithm: str | None, overrides: Sequence[str], where: str) -> Any:  # noqa: ANN401
    """Move the algorithm into the options, and put in what the command line sets."""
    if not isinstance(content, dict):
        return content
    given = dict(cast("dict[str, Any]", content))
    options: Any = given.pop("options", {})
    if not isinstance(options, dict):
        raise InvalidDataError(f"{where}: options: should be an object of keys of [learner.training]")
    chosen = dict(cast("dict[str, Any]", options))
    if "algorithm" in given:
        chosen["algorithm"] = given.pop("algorithm")
    if algorithm is not None:
        chosen["algorithm"] = algorithm
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {override}: write key=value, for example delta_low=0.15")
        try:
            chosen[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            chosen[key.strip()] = text
    return {**given, "options": chosen}


def _as_json(explanation: Explanation) -> dict[str, Any]:
    parameters = asdict(explanation.parameters)
    columns: dict[str, Any] = {
        "mu": explanation.mu,
        "pi": explanation.pi,
        "advantage": explanation.advantages,
        "ratio": explanation.ratio,
        "divergence": explanation.divergence,
        "delta": explanation.delta,
        "binary_tv": explanation.binary_tv,
        "binary_kl": explanation.binary_kl,
        "weight": explanation.weight,
        "token_loss": explanation.token_loss,
        "gradient": explanation.gradient,
        "sequence_weight": explanation.sequence_weight,
    }
    return {
        "algorithm": explanation.options.algorithm,
        "aggregation": explanation.options.aggregation,
        "parameters": {name: _plain(parameters[name]) for name in _PARAMETERS},
        "sequence": explanation.sequences.tolist(),
        "mask": [int(kept) for kept in explanation.mask.tolist()],
        "loss": explanation.loss,
        **{name: None if values is None else [_plain(x) for x in values.tolist()] for name, values in columns.items()},
    }


def _plain(value: float | str) -> float | str:
    """JSON knows no infinity; a negative zero is a zero."""
    if isinstance(value, str):
        return value
    return value + 0.0 if math.isfinite(value) else str(value)


def _print_table(explanation: Explanation) -> None:
    console = Console(highlight=False)
    if console.width < _NARROWEST_TABLE and not console.is_terminal:
        console = Console(highlight=False, width=_NARROWEST_TABLE)
    table = Table(title=f"{explanation.options.algorithm}", title_justify="left")
    for name in ("seq", "token", "mu", "pi", "A", "r", "D", "delta", "M", "weight", "loss", "d loss / d log pi"):
        table.add_column(name, justify="right")
    divergence, delta = explanation.divergence, explanation.delta
    for token, sequence in enumerate(explanation.sequences.tolist()):
        kept, in_loss = bool(explanation.mask[token]), bool(explanation.loss_mask[token])
        table.add_row(
            str(sequence),
            str(token),
            _short(math.exp(explanation.mu[token])),
            _short(math.exp(explanation.pi[token])),
            _short(explanation.advantages[token]),
            _short(explanation.ratio[token]),
            "-" if divergence is None else _short(divergence[token]),
            "-" if delta is None or not explanation.advantages[token] else _short(delta[token]),
            ("1" if kept else "0") if in_loss else "not in loss",
            _short(explanation.weight[token]),
            _short(explanation.token_loss[token]),
            _short(explanation.gradient[token]),
            style="" if kept and in_loss else "dim",
        )
    console.print(table)
    signal = (explanation.advantages != 0) & explanation.loss_mask
    masked = int((~explanation.mask & signal).sum())
    console.print(Text(f"masked: {masked} of {int(signal.sum())} tokens with an advantage"))
    console.print(Text(f"loss: {explanation.loss:.10g} ({explanation.options.aggregation})"))


def _short(value: float) -> str:
    return f"{value + 0.0:.7g}"
