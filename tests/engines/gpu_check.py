"""The engines' assertions on a GPU, in bfloat16: python -m tests.engines.gpu_check --engine vllm --python PATH

Prints versions and flags, starts the engine's server with a small random model on this machine's GPU, and compares it
with transformers in float32. bfloat16 rounds, and a mixture of experts then flips near ties, so log-probs are held to
statistics; labels and shapes are held exactly. Exits 0 when everything holds, 1 when something does not, and 2 without
a GPU, unless --on-cpu tries the script itself.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from leeway.types import ColumnKind, SamplingParams
from tests.engines.conftest import VOCAB_SIZE, make_model
from tests.engines.engine_server import EngineServer, engine_server
from tests.engines.in_flight import MOST_ATTEMPTS, always_running, swapped
from tests.engines.sampled import Completion, difference, reference, sample
from tests.harness import tiny_models

MEAN_DIFFERENCE = 0.05  # nats, bfloat16 against float32
EQUAL_ROUTING = 0.95  # of rows
FOREIGN_DIFFERENCE = 0.5  # nats, against other weights: what a swap that did not happen would show
PACKAGES = ("vllm", "sglang", "torch", "transformers", "triton", "flashinfer-python", "leeway")
VERSIONS = """
import importlib.metadata as metadata, platform, sys
print("python", platform.python_version())
for name in sys.argv[1:]:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "-")
import torch
print("cuda", torch.version.cuda, "devices", [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
"""


@dataclass
class Report:
    """Findings, printed as they come."""

    failures: int = 0

    def expect(self, what: str, found: float, holds: bool) -> None:
        self.failures += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}: {found:.4g}", flush=True)


HAS_GPU = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "sglang", "transformers"), default="vllm")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the engine's environment")
    parser.add_argument("--on-cpu", action="store_true", help="try the script itself where there is no GPU")
    arguments = parser.parse_args(argv)
    if not arguments.on_cpu and subprocess.run([arguments.python, "-c", HAS_GPU], check=False).returncode:
        print(f"{arguments.python} sees no GPU; run this where there is one, or try the script with --on-cpu")
        return 2
    print(subprocess.run([arguments.python, "-c", VERSIONS, *PACKAGES], capture_output=True, text=True).stdout)
    report = Report()
    for moe in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(check(report, arguments, Path(folder), moe=moe))
    print(f"{report.failures} failures")
    return 1 if report.failures else 0


async def check(report: Report, arguments: argparse.Namespace, folder: Path, *, moe: bool) -> None:
    models = [make_model(seed, moe=moe) for seed in range(2)]
    model = tiny_models.save(models[0], folder / "model", "bfloat16")
    options = {"dtype": "bfloat16", "python": arguments.python, "gpu": not arguments.on_cpu}
    with engine_server(arguments.engine, model, folder, **options) as server:
        print((folder / "server.toml").read_text(encoding="utf-8"))
        async with server.connect() as engine:
            print(engine.info(), flush=True)
            for step, weights in enumerate(models):
                await engine.update_weights(tiny_models.snapshot(weights, step, epoch=step + 1, dtype_name="bfloat16"))
                sampling = SamplingParams(0.8, 64, (), 1, 20, routing=moe)
                completions = await asyncio.gather(
                    *(sample(engine, prompt, sampling) for prompt in prompts(8, seed=step))
                )
                name = f"{'moe' if moe else 'dense'}, weights {step}"
                _compare(report, name, completions, models, step, moe=moe)
            await _swap_in_flight(report, server, models, moe=moe, num_tokens=400 if arguments.on_cpu else 1900)


def prompts(count: int, seed: int) -> list[np.ndarray[tuple[int], np.dtype[np.int32]]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, VOCAB_SIZE, 32, dtype=np.int32) for _ in range(count)]


def _compare(
    report: Report,
    name: str,
    completions: Sequence[Completion],
    models: Sequence[PreTrainedModel],
    step: int,
    *,
    moe: bool,
) -> None:
    own = np.concatenate([difference(completion, models[step]) for completion in completions])
    other = np.concatenate([difference(completion, models[1 - step]) for completion in completions])
    report.expect(f"{name}: mean |log mu - log pi|", float(own.mean()), float(own.mean()) < MEAN_DIFFERENCE)
    report.expect(f"{name}: of the other weights", float(other.mean()), float(other.mean()) > FOREIGN_DIFFERENCE)
    listed, expected = [], []
    for completion in completions:
        listed.append(completion.column(ColumnKind.TOPK_LOGPROBS))
        expected.append(reference(models[step], completion).candidates)
    candidates = float(np.abs(np.concatenate(listed) - np.concatenate(expected)).mean())
    report.expect(f"{name}: mean difference of the 20 candidates", candidates, candidates < MEAN_DIFFERENCE)
    labelled = float(np.mean([set(completion.steps()) == {step} for completion in completions]))
    report.expect(f"{name}: labelled as such", labelled, labelled == 1)
    if moe:
        rows = [
            (np.sort(completion.column(ColumnKind.ROUTING)) == reference(models[step], completion).routing).all(-1)
            for completion in completions
        ]
        equal = float(np.concatenate([row.reshape(-1) for row in rows]).mean())
        report.expect(f"{name}: rows of routing that are equal", equal, equal > EQUAL_ROUTING)


async def _swap_in_flight(
    report: Report, server: EngineServer, models: Sequence[PreTrainedModel], *, moe: bool, num_tokens: int
) -> None:
    """An update that meets a sequence in flight; until one does, another is tried."""
    name = f"{'moe' if moe else 'dense'}, swap in flight"
    sampling = SamplingParams(1.0, num_tokens, (), 1, 0, routing=moe)
    met: list[Completion] = []
    seconds = 0.0
    async with server.connect() as engine:
        for epoch in range(10, 10 + 2 * MOST_ATTEMPTS, 2):
            old, new = (
                tiny_models.snapshot(models[step], step, epoch=epoch + 1 - step, dtype_name="bfloat16")
                for step in (1, 0)
            )
            await engine.update_weights(old)
            async with always_running(engine, 32, sampling) as completions:
                seconds = await engine.update_weights(new)
            met = swapped(completions, 1, 0)
            if met:
                break
    report.expect(f"{name}: seconds decoding stood still", seconds, seconds > 0)
    report.expect(f"{name}: sequences with tokens before and after it", len(met), bool(met))
    before = [difference(completion, models[1])[np.array(completion.steps()) == 1] for completion in met]
    old_difference = float(np.concatenate(before).mean()) if met else np.inf  # of few tokens each
    what = f"{name}: tokens before it, mean |log mu - log pi|"
    report.expect(what, old_difference, old_difference < MEAN_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
