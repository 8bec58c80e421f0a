"""`leeway loss`: the specification's worked examples through the command line, and one clear line per refusal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from leeway.cli.main import main
from leeway.config.algorithms import ALGORITHMS

MU = [1e-4, 0.99, 0.5, 0.5, 0.5, 0.3, 0.4, 0.05]
PI = [0.01, 0.8, 0.75, 0.75, 0.2, 0.22, 0.55, 0.9]
EXAMPLE: dict[str, Any] = {
    "mu": [math.log(p) for p in MU],
    "pi": [math.log(p) for p in PI],
    "advantages": [1, -1, 1, -1, -0.5, -0.5, 0, 2],
    "options": {"aggregation": "token-mean"},
}
SIX = [0.5, 0.25, 0.12, 0.08, 0.04, 0.01], [0.4, 0.25, 0.05, 0.1, 0.1, 0.1]
TOPK: dict[str, Any] = {
    "probabilities": True,
    "mu": [0.5, 0.12, 0.01],
    "pi": [0.4, 0.05, 0.1],
    "advantages": [-1, -1, -1],
    "token_ids": [0, 2, 5],
    "topk_ids": [[0, 1]] * 3,
    "mu_topk": [[0.5, 0.25]] * 3,
    "pi_topk": [[0.4, 0.25]] * 3,
}


@pytest.fixture
def leeway_loss(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command on a JSON value from stdin: exit code, stdout, stderr."""

    def run(content: Any, *arguments: str) -> tuple[int, str, str]:
        text = content if isinstance(content, str) else json.dumps(content)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["loss", *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def answer(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.mark.parametrize(
    ("algorithm", "more", "mask", "loss"),
    [
        ("pg-is", (), "11111111", 57.90657642),
        ("cispo", (), "11111111", 2.877758789),
        ("grpo-clip-higher", (), "01010010", -0.07648014124),
        ("dppo-binary-tv", ("--set", "truncation=inf"), "11010110", 57.41874966),
        ("dppo-binary-tv", (), "11010110", 2.732353704),
        ("dppo-binary-kl", ("--set", "truncation=inf"), "10010110", 57.44128942),
    ],
)
def test_worked_examples(leeway_loss: Any, algorithm: str, more: tuple[str, ...], mask: str, loss: float) -> None:
    result = answer(leeway_loss(EXAMPLE, "--json", "--algorithm", algorithm, *more))
    assert "".join(str(m) for m in result["mask"]) == mask
    assert result["loss"] == pytest.approx(loss, rel=5e-10)
    assert result["ratio"] == pytest.approx([100, 0.8080808081, 1.5, 1.5, 0.4, 0.7333333333, 1.375, 18], rel=1e-9)
    assert result["binary_tv"] == pytest.approx([0.0099, 0.19, 0.25, 0.25, 0.3, 0.08, 0.15, 0.85], rel=1e-12)
    for gradient, advantage, weight in zip(result["gradient"], result["advantage"], result["weight"], strict=True):
        assert gradient == pytest.approx(-advantage * weight, rel=1e-14)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("dppo-topk-tv", [0.1, 0.17, 0.1]), ("dppo-topk-kl", [0.0274537165, 0.107915781, 0.07874864604])],
)
def test_worked_topk(leeway_loss: Any, algorithm: str, expected: list[float]) -> None:
    assert answer(leeway_loss(TOPK, "--json", "--algorithm", algorithm))["divergence"] == pytest.approx(
        expected, rel=5e-9
    )


def test_every_algorithm_answers_with_a_table_and_with_json(leeway_loss: Any) -> None:
    content = {**TOPK, "proximal": [0.3, 0.1, 0.02], "lengths": [1, 2], "advantages": [1, -1]}
    for algorithm in ALGORITHMS:
        result = answer(leeway_loss(content, "--json", "--algorithm", algorithm))
        assert result["sequence"] == [0, 1, 1]
        code, out, err = leeway_loss(content, "--algorithm", algorithm)
        assert (code, err) == (0, "")
        assert f"loss: {result['loss']:.10g} (seq-mean-token-sum)" in out


def test_lengths_advantages_and_masks_reach_the_loss(leeway_loss: Any) -> None:
    """Losses 1.8 in all over two sequences; a masked token counts nowhere."""
    content = {
        "algorithm": "pg-is",
        "mu": [-1.0, -1.0, -2.0, -0.5],
        "pi": [-1.0, -1.0, -2.0, -0.5],
        "lengths": [3, 1],
        "advantages": [0.5, -0.5],
        "loss_mask": [True, False, True, True],
    }
    result = answer(leeway_loss(content, "--json"))
    assert result["token_loss"] == [0.5, 0, 1.0, -0.25]
    assert result["loss"] == pytest.approx((1.5 - 0.25) / 2)
    mean = answer(leeway_loss(content, "--json", "--set", "aggregation=seq-mean-token-mean"))
    assert mean["loss"] == pytest.approx((1.5 / 2 - 0.25) / 2)
    horizon = answer(leeway_loss(content, "--json", "--set", "aggregation=fixed-horizon", "--set", "horizon=10"))
    assert horizon["loss"] == pytest.approx((1.5 - 0.25) / 20)


def test_staleness_mismatch_and_penalties(leeway_loss: Any) -> None:
    content = {
        "mu": [math.log(0.25)] * 2,
        "pi": [math.log(0.5)] * 2,
        "advantages": [1, 1],
        "staleness": [0, 4],
        "mismatch": 0.01,
        "options": {
            "delta_high": 0.2,
            "delta_growth": 0.25,
            "mismatch_allowance": 1.0,
            "quadratic_coefficient": 1e-3,
        },
    }
    result = answer(leeway_loss(content, "--json"))
    assert result["delta"] == pytest.approx([0.21, 0.41])
    assert result["mask"] == [0, 1]
    assert result["gradient"][0] == pytest.approx(2e-3 * math.log(2))


def test_an_infinite_divergence_is_said_in_json(leeway_loss: Any) -> None:
    content = {"mu": [math.log(0.5)], "pi": [0.0], "advantages": [1], "algorithm": "dppo-binary-kl"}
    result = answer(leeway_loss(content, "--json"))
    assert (result["divergence"], result["mask"]) == (["inf"], [0])


def test_reads_a_file(leeway_loss: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(EXAMPLE), encoding="utf-8")
    assert answer(leeway_loss("", "--json", str(path))) == answer(leeway_loss(EXAMPLE, "--json"))


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in EXAMPLE.items() if name != key}


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", (), "stdin: is not JSON"),
        ("[1, 2]", (), "stdin: is no JSON object"),
        (without("mu"), (), "stdin: mu: required, but not given"),
        (without("pi"), (), "stdin: pi: required, but not given"),
        ({**EXAMPLE, "pie": 1}, (), "stdin: pie: unknown key"),
        ({**EXAMPLE, "pi": EXAMPLE["pi"][:-1]}, (), "stdin: pi: has 7 entries where mu has 8"),
        ({**EXAMPLE, "mu": [], "pi": [], "advantages": []}, (), "stdin: mu: "),
        ({**EXAMPLE, "mu": MU}, (), "stdin: mu: token 1 has 0.99, where it needs a log-prob of at most 0"),
        ({**EXAMPLE, "mu": [math.nan, *EXAMPLE["mu"][1:]]}, (), "stdin: mu.0: input should be a finite number"),
        ({**EXAMPLE, "pi": [-math.inf, *EXAMPLE["pi"][1:]]}, (), "stdin: pi.0: input should be a finite number"),
        ({**EXAMPLE, "lengths": [4, 5]}, (), "stdin: lengths: add up to 9, but mu has 8 tokens"),
        ({**EXAMPLE, "lengths": [8, 0]}, (), "stdin: lengths.1: "),
        ({**EXAMPLE, "advantages": [1, 2, 3]}, (), "stdin: advantages: has 3 entries"),
        (EXAMPLE, ("--algorithm", "ppo"), "stdin: options.algorithm: there is no algorithm 'ppo'; choose one of dppo"),
        (EXAMPLE, ("--set", "delta=1"), "stdin: options.delta: unknown key"),
        (EXAMPLE, ("--set", "truncation=0"), "stdin: options.truncation: input should be greater than 0"),
        (EXAMPLE, ("--set", "truncation"), "--set truncation: write key=value"),
        ({**EXAMPLE, "options": 3}, (), "stdin: options: should be an object"),
        (EXAMPLE, ("--algorithm", "dppo-topk-tv"), "dppo-topk-tv needs recorded candidates: give `token_ids`"),
        (EXAMPLE, ("--algorithm", "minirl"), "minirl needs `proximal`"),
        (EXAMPLE, ("--set", "reference_kl_coefficient=0.1"), "reference_kl_coefficient needs `reference`"),
        (EXAMPLE, ("--set", "entropy_coefficient=0.1"), "entropy_coefficient needs `entropy`"),
        (TOPK, ("--algorithm", "dppo-topk-tv", "--set", "topk=3"), "options.topk: is 3, but only 2 candidates"),
        (
            {**TOPK, "mu_topk": [[0.5, 0.25], [0.5], [0.5, 0.25]]},
            ("--algorithm", "dppo-topk-tv"),
            "mu_topk: token 1 has 1 candidates where the first token has 2",
        ),
        ({**TOPK, "topk_ids": [[0, 0]] * 3}, ("--algorithm", "dppo-topk-tv"), "has the same candidate twice"),
        ({**TOPK, "mu_topk": [[0.9, 0.9]] * 3}, ("--algorithm", "dppo-topk-tv"), "more than probability 1"),
        (
            {**EXAMPLE, "mu": [-1000.0, *EXAMPLE["mu"][1:]]},
            ("--algorithm", "pg-is"),
            "token 0 has a loss that is not finite",
        ),
        (EXAMPLE, ("/nowhere/tokens.json",), "/nowhere/tokens.json: cannot be read"),
    ],
)
def test_refusals_are_one_clear_line(leeway_loss: Any, content: Any, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = leeway_loss(content, *arguments)
    assert code != 0
    assert out == ""
    assert message in err
    assert err.startswith("leeway: ")
    assert err.count("\n") == 1


def test_help_documents_the_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["loss", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("mu_topk", "advantages", "lengths", "proximal", "staleness", *ALGORITHMS):
        assert word in text
