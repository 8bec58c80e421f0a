"""One contender of `benchmarks.loss_head`, alone in its process: hidden states to loss and gradients, once.

    python -m benchmarks.loss_head_contender NAME FOLDER --tokens 2048 --vocabulary 151936 --hidden 512

`prepare` writes the inputs into FOLDER; every other name reads them, runs once after a small warm-up, and prints one
line of JSON; `saving` compares the fused pass with itself. All compute the same: CISPO (w = min(r, 5)), which everyone
has, mean over tokens, temperature 1, float32, one thread; log-probs and, except Liger, which has none, entropies.

Extra memory is the kernel's peak of resident memory during the run (VmHWM, reset just before), less what was resident
before it and less the two gradients that everyone has to return.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TRUNCATION = 5.0
ZERO_FRACTION = 0.3


@dataclass
class Inputs:
    """T tokens, H hidden size, V vocabulary."""

    hidden: Tensor  # [T, H] requires grad
    weight: Tensor  # [V, H] requires grad
    token_ids: Tensor  # [T]
    behavior_logprobs: Tensor  # [T]
    advantages: Tensor  # [T]

    def few(self, count: int) -> Inputs:
        """A small problem with the same weight, to warm up with."""
        return Inputs(
            self.hidden.detach()[:count].clone().requires_grad_(),
            self.weight.detach()[:4096].clone().requires_grad_(),
            self.token_ids[:count] % 4096,
            self.behavior_logprobs[:count],
            self.advantages[:count],
        )

    def with_zeros(self) -> Inputs:
        """Advantage zero for 30% of the tokens, scattered."""
        count = self.token_ids.shape[0]
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: round(ZERO_FRACTION * count)]
        return replace(self, advantages=self.advantages.index_fill(0, chosen, 0.0))


def cispo(logprobs: Tensor, inputs: Inputs, places: slice = slice(None)) -> Tensor:
    """The sum over some tokens, divided by the number of all tokens."""
    ratio = (logprobs.detach() - inputs.behavior_logprobs[places]).exp().clamp(max=TRUNCATION)
    return -(inputs.advantages[places] * ratio * logprobs).sum() / inputs.token_ids.shape[0]


def products(inputs: Inputs) -> Tensor:
    """The three matrix products and nothing else: what no way of computing the loss and its gradient can go below.

    512 tokens at a time, so that large products run at full speed and touching fresh memory is not counted as theirs.
    """
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    inputs.hidden.grad, inputs.weight.grad = torch.empty_like(hidden), torch.zeros_like(weight)
    buffer = torch.empty((min(512, hidden.shape[0]), weight.shape[0]))
    for some, gradient in zip(hidden.split(512), inputs.hidden.grad.split(512), strict=True):
        logits = torch.mm(some, weight.T, out=buffer[: some.shape[0]])
        torch.mm(logits, weight, out=gradient)
        inputs.weight.grad.addmm_(logits.T, some)
    return torch.zeros(())


def naive(inputs: Inputs) -> Tensor:
    """Full logits, log_softmax and gather; the entropy without gradient."""
    logprobs = torch.log_softmax(inputs.hidden @ inputs.weight.T, dim=-1)
    with torch.no_grad():
        torch.special.entr(logprobs.exp()).sum(dim=-1)
    loss = cispo(logprobs.gather(-1, inputs.token_ids.unsqueeze(-1)).squeeze(-1), inputs)
    loss.backward()
    return loss


def trl_functions(inputs: Inputs) -> Tensor:
    """TRL's functions on logits: selective_log_softmax, and entropy_from_logits in its chunks of 128 tokens."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = (inputs.hidden @ inputs.weight.T).unsqueeze(0)
    logprobs, _ = selective_log_softmax_and_entropy(logits, inputs.token_ids.unsqueeze(0), entropy_requires_grad=False)
    loss = cispo(logprobs[0], inputs)
    loss.backward()
    return loss


def trl_fused(inputs: Inputs) -> Tensor:
    """What TRL's GRPO trainer calls for log-probs and entropy, as its patched forward does where there is no GPU."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    logprobs, _, _, _, _ = ChunkedLogProbFunction.apply(
        inputs.hidden,
        inputs.weight,
        None,
        inputs.token_ids,
        1.0,
        _CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("log_probs", "entropy"),
    )
    loss = cispo(logprobs, inputs)
    loss.backward()
    return loss


def liger(inputs: Inputs) -> Tensor:
    """Liger's chunked GRPO loss in PyTorch, all tokens in one of its chunks, where it is fastest."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # A row of its own for each token, as its advantages are one per row.
    criterion = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=inputs.token_ids.shape[0],
        epsilon_high=TRUNCATION,
        loss_type="cispo",
    )
    rows = inputs.token_ids.unsqueeze(-1)
    loss, _ = criterion(
        inputs.hidden.unsqueeze(1),
        inputs.weight,
        rows,
        torch.ones_like(rows),
        inputs.advantages,
        old_per_token_logps=inputs.behavior_logprobs.unsqueeze(-1),
    )
    loss.backward()
    return loss


def leeway(inputs: Inputs) -> Tensor:
    """The learner's fused pass."""
    inputs.weight.grad = torch.zeros_like(inputs.weight)
    loss, inputs.hidden.grad = fused_pass(inputs, inputs.weight.grad)
    return loss


def fused_pass(inputs: Inputs, weight_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d hidden; the weight's gradient is added to what is given."""
    from learner.policy.head import Head
    from learner.policy.head.fused import fused_head

    result = fused_head(
        inputs.hidden.detach(),
        Head(inputs.weight.detach()),
        _targets(inputs),
        lambda places, scores: cispo(scores.logprobs, inputs, places),
        weight_gradient=weight_gradient,
    )
    assert result.gradients is not None
    assert result.loss is not None
    return result.loss, result.gradients.hidden


def leeway_zeros(inputs: Inputs) -> Tensor:
    """The same with advantage zero for 30% of the tokens, scattered."""
    return leeway(inputs.with_zeros())


def leeway_scores(inputs: Inputs) -> Tensor:
    """Log-probs and entropies without loss or gradient: a step in which every advantage is zero."""
    from learner.policy.head import Head
    from learner.policy.head.fused import fused_head

    scores = fused_head(inputs.hidden.detach(), Head(inputs.weight.detach()), _targets(inputs)).scores
    return cispo(scores.logprobs, inputs)


def _targets(inputs: Inputs):  # noqa: ANN202 - the peers' environment has no learner to import the type from
    from learner.policy.head import Targets

    return Targets(inputs.token_ids, torch.ones(inputs.token_ids.shape[0]))


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "products": products,
    "naive": naive,
    "trl-functions": trl_functions,
    "trl-fused": trl_fused,
    "liger": liger,
    "leeway": leeway,
    "leeway-30%-zero": leeway_zeros,
    "leeway-scores": leeway_scores,
}


def random_weight(vocabulary: int, hidden: int) -> Tensor:
    """The same in every process; logits then have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((vocabulary, hidden), generator=generator).mul_(2 / hidden**0.5)


def prepare(folder: Path, tokens: int, vocabulary: int, hidden: int) -> None:
    """Inputs whose ratios lie around 1, some beyond the truncation."""
    generator = torch.Generator().manual_seed(2)
    weight = random_weight(vocabulary, hidden)
    states = torch.randn((tokens, hidden), generator=generator)
    token_ids = torch.randint(vocabulary, (tokens,), generator=generator)
    logprobs = torch.cat(
        [
            torch.log_softmax(some @ weight.T, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            for some, ids in zip(states.split(64), token_ids.split(64), strict=True)
        ]
    )
    behavior = logprobs + 0.8 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(tokens, generator=generator)
    np.savez(folder / "inputs.npz", states=states, token_ids=token_ids, behavior=behavior, advantages=advantages)


def read_inputs(folder: Path, vocabulary: int) -> Inputs:
    """What `prepare` wrote."""
    with np.load(folder / "inputs.npz") as stored:
        hidden = torch.from_numpy(stored["states"]).requires_grad_()
        weight = random_weight(vocabulary, hidden.shape[1]).requires_grad_()
        return Inputs(hidden, weight, *(torch.from_numpy(stored[k]) for k in ("token_ids", "behavior", "advantages")))


def measure(name: str, folder: Path, vocabulary: int) -> dict[str, float]:
    """Run once; keep the hidden gradient, and some rows of the weight's, for the comparison."""
    inputs = read_inputs(folder, vocabulary)
    run = CONTENDERS[name]
    run(inputs.few(32))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    wall, cpu = time.perf_counter(), time.process_time()
    loss = run(inputs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resident("VmHWM")
    gradients = [x.grad for x in (inputs.hidden, inputs.weight) if x.grad is not None]
    if len(gradients) == 2:
        rows = torch.cat([inputs.token_ids, torch.arange(0, vocabulary, 64)]).unique()
        np.savez(folder / f"{name}.npz", hidden=gradients[0], weight=gradients[1][rows])
    required = sum(gradient.nbytes for gradient in gradients)
    return {"wall": wall, "cpu": cpu, "extra_bytes": peak - before - required, "loss": float(loss.detach())}


def measure_saving(folder: Path, vocabulary: int, rounds: int = 7) -> dict[str, float]:
    """CPU seconds of the fused pass on 1024 tokens: all with a gradient, 30% without, scores only; medians.

    The saving is a difference of times that are close together, so they are taken in turn within one process.
    """
    inputs = read_inputs(folder, vocabulary)
    some = replace(
        inputs,
        hidden=inputs.hidden.detach()[:1024],
        token_ids=inputs.token_ids[:1024],
        behavior_logprobs=inputs.behavior_logprobs[:1024],
        advantages=inputs.advantages[:1024],
    )
    zeros, gradient = some.with_zeros(), torch.zeros_like(inputs.weight)
    cases: dict[str, Callable[[], object]] = {
        "all": lambda: fused_pass(some, gradient),
        "zeros": lambda: fused_pass(zeros, gradient),
        "scores": lambda: leeway_scores(some),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):  # the first one warms up
        for name, run in cases.items():
            started = time.process_time()
            run()
            if number:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def resident(key: str) -> int:
    """A number of bytes from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


def main() -> None:
    """Prepare, or run one contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["prepare", "saving", *CONTENDERS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.name == "prepare":
        prepare(arguments.folder, arguments.tokens, arguments.vocabulary, arguments.hidden)
    elif arguments.name == "saving":
        print(json.dumps(measure_saving(arguments.folder, arguments.vocabulary)))
    else:
        print(json.dumps(measure(arguments.name, arguments.folder, arguments.vocabulary)))


if __name__ == "__main__":
    main()
