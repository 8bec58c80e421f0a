"""`leeway loss`: every number from given log-probs to the loss, in float64, by the trainer's own functions.

Shape legend: T tokens, N sequences, K candidates per token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from learner.losses.aggregation import sequence_weights
from learner.losses.batch_statistics import BatchStatistics, merge_statistics
from learner.losses.divergences import binary_kl, binary_tv
from learner.losses.form import (
    Candidates,
    TokenBatch,
    TokenTerms,
    TokenValues,
    delta_high,
    delta_low,
    load_algorithm,
    load_measure,
    token_losses,
    token_values,
)
from leeway.config import LossOptions, Options
from leeway.config.algorithms import LossParameters
from leeway.errors import InvalidDataError
from leeway.trajectory.check import LARGEST_LOGPROB, LARGEST_MASS

Number = Annotated[float, Field(allow_inf_nan=False)]
Column = tuple[Number, ...]
Table = tuple[Column, ...]
Flag = Annotated[bool, Field(strict=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class LossInput(Options):
    """Tokens of N sequences, one after the other; log-probs, unless `probabilities` says that they are not."""

    mu: Column = Field(min_length=1, description="[T] of the sampled tokens, from the inference engine")
    pi: Column = Field(description="[T] of the same tokens, from the learner")
    advantages: Column = Field(description="[T] per token, or [N] per sequence")
    lengths: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(default=None)
    loss_mask: tuple[Flag, ...] | None = Field(default=None, description="[T]; unset: all")
    token_ids: tuple[TokenId, ...] | None = Field(default=None, description="[T] the sampled tokens")
    topk_ids: tuple[tuple[TokenId, ...], ...] | None = Field(default=None, description="[T, K] candidates")
    mu_topk: Table | None = Field(default=None, description="[T, K] of the candidates")
    pi_topk: Table | None = Field(default=None, description="[T, K] of the candidates")
    proximal: Column | None = Field(default=None, description="[T] of pi_old")
    reference: Column | None = Field(default=None, description="[T] of the initial model")
    entropy: Column | None = Field(default=None, description="[T] of the learner's distribution")
    staleness: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = Field(default=None)
    mismatch: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    probabilities: bool = False
    options: LossOptions = Field(default_factory=LossOptions)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every step from log-probs to the aggregated loss; [T] float64 unless said."""

    options: LossOptions
    parameters: LossParameters
    sequences: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    mu: NDArray[np.float64]  # log-probs
    pi: NDArray[np.float64]
    advantages: NDArray[np.float64]
    ratio: NDArray[np.float64]
    divergence: NDArray[np.float64] | None  # what the algorithm compares; None where it has no threshold
    delta: NDArray[np.float64] | None  # with what, on the side of the advantage; infinite for none
    binary_tv: NDArray[np.float64]
    binary_kl: NDArray[np.float64]
    mask: NDArray[np.bool_]  # M, true where kept
    weight: NDArray[np.float64]  # M min(r, C), or what the algorithm has in its place
    token_loss: NDArray[np.float64]  # before aggregation
    gradient: NDArray[np.float64]  # d token_loss / d log pi
    sequence_weight: NDArray[np.float64]  # [N] of each sequence's summed token loss
    loss: float


def read_loss_input(content: Any, where: str) -> LossInput:  # noqa: ANN401 (parsed JSON)
    """Check parsed JSON.

    Raises:
        InvalidDataError: naming the key.
    """
    if not isinstance(content, dict):
        raise InvalidDataError(f"{where}: is no JSON object; see `leeway loss --help` for its keys")
    try:
        return LossInput.model_validate_json(json.dumps(content))  # from JSON, arrays become tuples
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "input"
        problem = {
            "missing": "required, but not given",
            "extra_forbidden": "unknown key; remove it or correct its spelling",
            "value_error": first["msg"].removeprefix("Value error, "),
        }.get(first["type"], f"{first['msg'][:1].lower()}{first['msg'][1:]}, but is {first['input']!r:.80}")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InvalidDataError(f"{where}: {key}: {problem}{more}") from error


def explain_loss(given: LossInput) -> Explanation:
    """Compute everything that the trainer computes of these tokens.

    Raises:
        InvalidDataError: lengths or shapes disagree, or something that the algorithm needs is missing.
    """
    options = given.options
    algorithm = options.loss_algorithm
    parameters = replace(options.loss_parameters, mismatch=given.mismatch)
    tokens, lengths = _token_batch(given)
    decide, measure = load_algorithm(algorithm), load_measure(algorithm)
    values = token_values(tokens)
    if measure is not None:
        statistics: BatchStatistics = merge_statistics([measure(values, parameters, len(lengths))])
        tokens = replace(tokens, statistics=statistics)
    losses, terms = token_losses(tokens, decide, parameters, options.penalties)
    (gradient,) = torch.autograd.grad(losses.sum(), tokens.policy_logprobs)
    _require_finite(losses, gradient)
    trained = np.bincount(tokens.sequence_ids[tokens.loss_mask].numpy(), minlength=len(lengths)).astype(np.int64)
    weights = sequence_weights(options.aggregation, trained, options.horizon)
    token_loss = _array(losses)
    sequences = tokens.sequence_ids.numpy()
    return Explanation(
        options=options,
        parameters=parameters,
        sequences=sequences,
        loss_mask=tokens.loss_mask.numpy(),
        mu=_array(values.behavior_logprobs),
        pi=_array(values.policy_logprobs),
        advantages=_array(values.advantages),
        ratio=_array(values.ratio),
        divergence=None if terms.divergence is None else _array(terms.divergence),
        delta=_thresholds(values, terms, parameters),
        binary_tv=_array(binary_tv(values.behavior_logprobs, values.policy_logprobs)),
        binary_kl=_array(binary_kl(values.behavior_logprobs, values.policy_logprobs)),
        mask=terms.kept.numpy(),
        weight=_array(terms.weight),
        token_loss=token_loss,
        gradient=_array(gradient),
        sequence_weight=weights,
        loss=float((token_loss * weights[sequences]).sum()),
    )


def _token_batch(given: LossInput) -> tuple[TokenBatch, tuple[int, ...]]:
    num_tokens = len(given.mu)
    lengths = (num_tokens,) if given.lengths is None else given.lengths
    if sum(lengths) != num_tokens:
        raise InvalidDataError(f"lengths: add up to {sum(lengths)}, but mu has {num_tokens} tokens")
    for name in ("pi", "loss_mask", "token_ids", "topk_ids", "mu_topk", "pi_topk", "proximal", "reference", "entropy"):
        _require_length(name, getattr(given, name), num_tokens)
    _require_length("staleness", given.staleness, num_tokens)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    algorithm = given.options.loss_algorithm
    if algorithm.needs_proximal and given.proximal is None:
        raise InvalidDataError(f"{given.options.algorithm} needs `proximal`: [T] of the sampled tokens under pi_old")
    if given.options.reference_kl_coefficient and given.reference is None:
        raise InvalidDataError("reference_kl_coefficient needs `reference`: [T] under the initial model")
    if given.options.entropy_coefficient and given.entropy is None:
        raise InvalidDataError("entropy_coefficient needs `entropy`: [T] of the learner's distribution")
    mask = torch.ones(num_tokens, dtype=torch.bool) if given.loss_mask is None else torch.tensor(given.loss_mask)
    return TokenBatch(
        policy_logprobs=_logprobs("pi", given.pi, given).requires_grad_(),
        behavior_logprobs=_logprobs("mu", given.mu, given),
        advantages=_advantages(given, sequences, len(lengths)),
        loss_mask=mask,
        sequence_ids=sequences,
        candidates=_candidates(given) if algorithm.reads_topk(given.options.loss_parameters) else None,
        staleness=None if given.staleness is None else torch.tensor(given.staleness),
        proximal_logprobs=None if given.proximal is None else _logprobs("proximal", given.proximal, given),
        reference_logprobs=None if given.reference is None else _logprobs("reference", given.reference, given),
        entropies=None if given.entropy is None else torch.tensor(given.entropy, dtype=torch.float64),
    ), lengths


def _advantages(given: LossInput, sequences: Tensor, num_sequences: int) -> Tensor:
    values = torch.tensor(given.advantages, dtype=torch.float64)
    if values.shape == sequences.shape:
        return values
    if values.numel() == num_sequences:
        return values[sequences]
    raise InvalidDataError(
        f"advantages: has {values.numel()} entries; give one per token ({sequences.numel()}) or per sequence "
        f"({num_sequences})"
    )


def _candidates(given: LossInput) -> Candidates:
    columns = {"token_ids": given.token_ids, "topk_ids": given.topk_ids}
    columns |= {"mu_topk": given.mu_topk, "pi_topk": given.pi_topk}
    missing = [f"`{name}`" for name, column in columns.items() if column is None]
    if missing:
        raise InvalidDataError(f"{given.options.algorithm} needs recorded candidates: give {', '.join(missing)}")
    assert given.token_ids is not None
    assert given.topk_ids is not None
    assert given.mu_topk is not None
    assert given.pi_topk is not None
    width = len(given.topk_ids[0])
    for name, rows in (("topk_ids", given.topk_ids), ("mu_topk", given.mu_topk), ("pi_topk", given.pi_topk)):
        uneven = [token for token, row in enumerate(rows) if len(row) != width or width == 0]
        if uneven:
            raise InvalidDataError(
                f"{name}: token {uneven[0]} has {len(rows[uneven[0]])} candidates where the first token has {width} "
                "in topk_ids; every token needs as many, at least one"
            )
    topk = given.options.topk if "topk" in given.options.model_fields_set else width
    if topk > width:
        raise InvalidDataError(f"options.topk: is {topk}, but only {width} candidates per token are given")
    ids = torch.tensor(given.topk_ids)
    behavior, policy = _logprobs("mu_topk", given.mu_topk, given), _logprobs("pi_topk", given.pi_topk, given)
    for name, logprobs in (("mu_topk", behavior), ("pi_topk", policy)):
        excess = logprobs.exp().sum(dim=-1) > LARGEST_MASS
        if excess.any():
            raise InvalidDataError(
                f"{name}: token {int(excess.nonzero()[0])} has candidates of more than probability 1"
            )
    ordered = ids.sort(dim=-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(dim=-1)
    if repeated.any():
        raise InvalidDataError(f"topk_ids: token {int(repeated.nonzero()[0])} has the same candidate twice")
    likeliest = behavior.argsort(dim=-1, descending=True, stable=True)[:, :topk]
    sampled = ids == torch.tensor(given.token_ids).unsqueeze(-1)
    return Candidates(*(column.gather(-1, likeliest) for column in (behavior, policy, ~sampled)))


def _logprobs(name: str, column: Sequence[Any], given: LossInput) -> Tensor:
    """Log-probs of any shape, checked."""
    values = torch.tensor(column, dtype=torch.float64)
    if given.probabilities:
        unusable, needed = (values <= 0) | (values > 1), "a number above 0 and at most 1, as `probabilities` is set"
    else:
        unusable, needed = values > LARGEST_LOGPROB, "a log-prob of at most 0 (or `probabilities`: true)"
    if unusable.any():
        token = int(unusable.nonzero()[0, 0])
        found = float(values[unusable][0])
        raise InvalidDataError(f"{name}: token {token} has {found:g}, where it needs {needed}")
    return values.log() if given.probabilities else values


def _require_length(name: str, column: Sequence[Any] | None, num_tokens: int) -> None:
    if column is not None and len(column) != num_tokens:
        raise InvalidDataError(f"{name}: has {len(column)} entries where mu has {num_tokens}; give one per token")


def _require_finite(losses: Tensor, gradient: Tensor) -> None:
    finite = torch.isfinite(losses) & torch.isfinite(gradient)
    if not finite.all():
        token = int((~finite).nonzero()[0])
        raise InvalidDataError(
            f"token {token} has a loss that is not finite: its ratio is too large; set options.truncation"
        )


def _thresholds(values: TokenValues, terms: TokenTerms, parameters: LossParameters) -> NDArray[np.float64] | None:
    if terms.divergence is None:
        return None
    up = torch.as_tensor(delta_high(values, parameters), dtype=torch.float64)
    down = torch.as_tensor(delta_low(values, parameters), dtype=torch.float64)
    return _array(torch.where(values.advantages > 0, up, down))


def _array(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.detach().double().numpy()
    return array
