"""Trains a Hugging Face causal language model with PyTorch, one optimizer step per call.

    groups ── check ──> StepBatch ── plan, pack ──> micro-batch ── score ──> token losses ── backward ──┐ accumulated
              advantages, weights, staleness             │                       ▲                      ▼
                   older policies' log-probs, step statistics ───────────────────┘                  gradient
    statistics <────────────────────────── AdamW <────────────────── finite? <─────────────────────────┘

Losses are weighted by the whole step's counts, so micro-batches add up to the batch. Trajectories whose advantage is
zero have a gradient of zero, unless the loss has penalties or routers are balanced: they are scored for the statistics
and skip the backward pass. Nothing moves until every loss and the gradient are known to be finite. Computes in float32.

Shape legend: N trajectories of a step, T their trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner import training_state
from learner.advantages import group_advantages
from learner.checkpoint import Branch
from learner.checks import check_candidates, check_group, check_trajectory
from learner.errors import UnusableGroupError
from learner.head import TokenScores
from learner.loss_options import check_recorded_topk
from learner.losses.aggregation import sequence_weights
from learner.losses.batch_statistics import BatchStatistics, Reduce, single_process
from learner.losses.form import TokenBatch, TokenTerms, TokenValues, token_values
from learner.mismatch import RunningMismatch
from learner.model import PolicyModel
from learner.older_policies import OlderPolicy
from learner.optimizer import Optimizer
from learner.packing import MicroBatch, pack, plan_micro_batches
from learner.policy_loss import OlderLogprobs, PolicyLoss
from learner.r3 import check_routing
from learner.staleness import trajectory_staleness
from learner.statistics import group_statistics, token_statistics
from learner.trainer import StepResult
from learner.training_options import TrainingOptions
from learner.training_state import TrainerScalars
from leeway.config import SamplingOptions
from leeway.errors import ConfigError, PreconditionError
from leeway.huggingface import (
    load_model,
    load_tokenizer,
    model_signature,
    published_tensors,
    save_model,
    tensor_bytes,
    tensor_dtype_name,
)
from leeway.types import Float32Array, ModelSignature, Trajectory, TrajectoryGroup, WeightManifest
from leeway.weights import tensor_entry


@dataclass(frozen=True, slots=True)
class _StepBatch:
    """The trajectories of a step, all groups one after the other."""

    group_ids: tuple[str, ...]  # [N]
    trajectories: tuple[Trajectory, ...]  # [N]
    advantages: NDArray[np.float64]  # [N]
    weights: NDArray[np.float64]  # [N] of each trajectory's summed token loss
    staleness: tuple[NDArray[np.int64], ...]  # [N] arrays, one entry per token
    statistics: Mapping[str, float]

    def blame(self, sequence: int, message: str) -> UnusableGroupError:
        """The error that names a trajectory and its group."""
        trajectory_id = self.trajectories[sequence].trajectory_id
        return UnusableGroupError(self.group_ids[sequence], f"trajectory {trajectory_id} {message}")


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch, and what is known of it before its loss."""

    micro_batch: MicroBatch
    with_gradient: bool
    older: OlderLogprobs


@dataclass(frozen=True, slots=True)
class _ScoredTokens:
    """What is kept of a micro-batch for the step's statistics, without gradient."""

    loss: Tensor  # scalar, this micro-batch's share of the step's loss
    sequences: Tensor  # [T] index of the trajectory
    values: TokenValues
    terms: TokenTerms
    entropies: Tensor
    load_balancing: float = 0.0  # this micro-batch's share of the step's mean


class TorchTrainer:
    """One policy and its AdamW; implements `learner.trainer.Trainer`.

    Nothing here is random: there is no dropout, and a step takes its groups in the order given.
    """

    def __init__(
        self,
        policy: PolicyModel,
        signature: ModelSignature,
        options: TrainingOptions,
        stop_token_ids: tuple[int, ...] = (),
        reduce: Reduce = single_process,
    ) -> None:
        """Train `policy`, which `signature` describes and whose weights are the run's first ones.

        `from_directory` makes both. `reduce` combines what the ranks of a distributed learner measure.
        """
        self.signature = signature
        self.stop_token_ids = stop_token_ids
        self._policy = policy
        self._options = options
        self._optimizer = Optimizer(policy.model, options)
        self._loss = PolicyLoss(options, reduce)
        self._reference = OlderPolicy(policy.weights()) if options.penalties.reference_kl else None
        keeps_proximal = self._loss.needs_proximal and options.proximal_every_steps > 1
        self._proximal = OlderPolicy(policy.weights()) if keeps_proximal else None
        self._replays_routing = _replays_routing(signature, options)

    @classmethod
    def from_directory(cls, path: Path, sampling: SamplingOptions, options: TrainingOptions) -> TorchTrainer:
        """Start from a Hugging Face model directory with its tokenizer.

        Raises:
            ConfigError: the directory is not a whole model, or one that cannot be trained with these options.
        """
        check_recorded_topk(options, sampling)
        signature = model_signature(path)
        if _replays_routing(signature, options) and not sampling.routing:
            raise ConfigError(
                "learner.training.routing_replay needs recorded routing: set sampling.routing = true, "
                "or learner.training.routing_replay = false"
            )
        end_of_sequence = cast("int | None", load_tokenizer(path).eos_token_id)
        policy = PolicyModel(
            load_model(path, torch.float32),
            routing_replay=_replays_routing(signature, options),
            gradient_checkpointing=options.gradient_checkpointing,
            head=options.head,
            load_balancing=options.load_balancing > 0,
        )
        return cls(policy, signature, options, () if end_of_sequence is None else (end_of_sequence,))

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        tensors = published_tensors(self._policy.model, self._options.publish_dtype)
        buffers = [tensor_bytes(tensor) for _, tensor in tensors]
        entries = [
            tensor_entry(name, tensor_dtype_name(tensor), tuple(tensor.shape), data)
            for (name, tensor), data in zip(tensors, buffers, strict=True)
        ]
        return WeightManifest(tuple(entries)), buffers

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup], branches: Sequence[Branch] = ()) -> StepResult:
        batch = self._prepare(step, groups, branches)
        learning_rate = self._optimizer.learning_rate
        if self._proximal is not None and self._optimizer.num_steps % self._options.proximal_every_steps == 0:
            self._proximal.refresh()
        parts = self._parts(batch, self._has_gradient(batch))
        statistics = self._measured(batch, parts)
        self._optimizer.zero_gradients()
        scored = [self._accumulate(batch, part, statistics) for part in parts]
        gradient_norm = self._optimizer.gradient_norm()
        if not torch.isfinite(gradient_norm):
            raise self._explain_gradient(batch, statistics)
        self._optimizer.step(gradient_norm)
        return StepResult(
            statistics={
                "loss": sum(float(part.loss) for part in scored),
                "grad_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                **batch.statistics,
                **_token_statistics(scored),
                **self._router_statistics(scored),
                **self._loss.observed([(part.values, part.terms) for part in scored]),
            },
            policy_logprobs=_policy_logprobs(batch, scored),
        )

    def save(self, directory: Path) -> None:
        training_state.save_tensors(directory / "weights", self._policy.weights())
        training_state.save_tensors(directory / "optimizer", self._optimizer.state())
        if self._proximal is not None:
            training_state.save_tensors(directory / "proximal", self._proximal.weights)
        training_state.save_scalars(directory, self._scalars())

    def load(self, directory: Path) -> None:
        """Become what `save` wrote there.

        Raises:
            CorruptDataError: the files cannot be read.
            PreconditionError: they belong to another model.
        """
        scalars = training_state.load_scalars(directory)
        if scalars.model_digest != self.signature.model_digest.hex():
            raise PreconditionError(f"{directory} is a checkpoint of another model; check model.path")
        training_state.load_tensors(directory / "weights", self._policy.weights())
        training_state.load_tensors(directory / "optimizer", self._optimizer.state())
        self._optimizer.resume(scalars.num_steps)
        self._loss.mismatch = RunningMismatch(scalars.mismatch_total, scalars.mismatch_tokens)
        if self._proximal is not None and (directory / "proximal").is_dir():
            training_state.load_tensors(directory / "proximal", self._proximal.weights)
        elif self._proximal is not None:  # the checkpoint is of an algorithm without pi_old
            self._proximal.refresh()

    def export(self, tokenizer_directory: Path, directory: Path) -> None:
        """Write the weights, as published, as a directory that `from_pretrained` loads."""
        save_model(self._policy.model, tokenizer_directory, directory, self._options.publish_dtype)

    def _scalars(self) -> TrainerScalars:
        mismatch = self._loss.mismatch
        return TrainerScalars(
            training_state.FORMAT,
            self.signature.model_digest.hex(),
            self._optimizer.num_steps,
            mismatch.total,
            mismatch.tokens,
        )

    def _prepare(self, step: int, groups: Sequence[TrajectoryGroup], branches: Sequence[Branch]) -> _StepBatch:
        """Check every group, and give every trajectory its advantage, weight and staleness."""
        if not groups:
            raise PreconditionError(f"step {step} has no groups to train on")
        for group in groups:
            check_group(group, self._check)
        rewards = [np.array([t.reward for t in group.trajectories]) for group in groups]
        advantages = [
            group_advantages(r.tolist(), divide_by_std=self._options.divide_by_std, baseline=self._options.baseline)
            for r in rewards
        ]
        trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
        trained_lengths = np.array([int(t.loss_mask.sum()) for t in trajectories], dtype=np.int64)
        num_tokens = np.array([t.num_tokens for t in trajectories], dtype=np.int64)
        return _StepBatch(
            group_ids=tuple(group.group_id for group in groups for _ in group.trajectories),
            trajectories=trajectories,
            advantages=np.concatenate(advantages),
            weights=sequence_weights(self._options.aggregation, trained_lengths, self._options.horizon),
            staleness=tuple(trajectory_staleness(t, step - 1, branches) for t in trajectories),
            statistics=group_statistics(rewards, advantages, num_tokens, trained_lengths),
        )

    def _check(self, trajectory: Trajectory) -> None:
        check_trajectory(trajectory, self.signature, self._policy.longest_trajectory)
        if self._replays_routing:
            check_routing(trajectory, self.signature)
        if self._loss.topk:
            check_candidates(trajectory, self.signature, self._loss.topk)

    def _has_gradient(self, batch: _StepBatch) -> NDArray[np.bool_]:
        """[N] whether a trajectory can have one: penalties and balancing act on tokens without advantage too."""
        return batch.advantages.astype(bool) | self._loss.penalties.active | (self._options.load_balancing > 0)

    def _parts(
        self, batch: _StepBatch, has_gradient: NDArray[np.bool_], chosen: NDArray[np.bool_] | None = None
    ) -> list[_Part]:
        """Micro-batches of the chosen trajectories [N], or all, those with a gradient first."""
        everywhere = np.ones_like(has_gradient) if chosen is None else chosen
        packed = [
            (micro_batch, with_gradient)
            for with_gradient in (True, False)
            for micro_batch in self._micro_batches(batch, everywhere & (has_gradient == with_gradient))
        ]
        micro_batches = [micro_batch for micro_batch, _ in packed]
        proximal = self._logprobs_of(self._proximal, micro_batches)
        reference = self._logprobs_of(self._reference, micro_batches)
        return [
            _Part(micro_batch, with_gradient, OlderLogprobs(old, first))
            for (micro_batch, with_gradient), old, first in zip(packed, proximal, reference, strict=True)
        ]

    @torch.no_grad()
    def _logprobs_of(self, older: OlderPolicy | None, micro_batches: Sequence[MicroBatch]) -> Sequence[Tensor | None]:
        """[T] of each micro-batch, under earlier weights."""
        if older is None:
            return [None] * len(micro_batches)
        logprobs: list[Tensor | None] = []
        with older.in_place():
            for micro_batch in micro_batches:
                with self._policy.scored(micro_batch) as scores:
                    logprobs.append(scores.logprobs)
        return logprobs

    @torch.no_grad()
    def _measured(self, batch: _StepBatch, parts: Sequence[_Part]) -> BatchStatistics | None:
        """The pass without gradient that a batch-aware loss needs first."""
        if not self._loss.batch_aware:
            return None

        def scored() -> Generator[TokenBatch]:
            for part in parts:
                with self._policy.scored(part.micro_batch) as scores:
                    yield self._loss.token_batch(part.micro_batch, scores, _advantages(batch, part), part.older)

        return self._loss.measured(scored(), len(batch.trajectories))

    def _micro_batches(self, batch: _StepBatch, chosen: NDArray[np.bool_]) -> list[MicroBatch]:
        """Pack the chosen trajectories [N]."""
        indices = np.flatnonzero(chosen).tolist()
        plan = plan_micro_batches(
            [batch.trajectories[index].num_tokens for index in indices],
            self._options.row_tokens,
            self._options.micro_batch_tokens,
        )
        return [
            pack(
                [[indices[place] for place in row] for row in rows],
                batch.trajectories,
                with_routing=self._replays_routing,
                topk=self._loss.topk,
                staleness=batch.staleness,
            )
            for rows in plan
        ]

    def _accumulate(self, batch: _StepBatch, part: _Part, statistics: BatchStatistics | None) -> _ScoredTokens:
        """Score one micro-batch and add its gradient.

        Raises:
            UnusableGroupError: a trajectory's loss is not finite.
        """
        sequences = torch.from_numpy(part.micro_batch.target_sequences)
        advantages = _advantages(batch, part)
        weights = torch.from_numpy(batch.weights).float()[sequences]

        def tokens_at(places: slice, scores: TokenScores) -> TokenBatch:
            return self._loss.token_batch(part.micro_batch, scores, advantages, part.older, statistics, places)

        def summed_loss(places: slice, scores: TokenScores) -> Tensor:
            losses, _ = self._loss.losses(tokens_at(places, scores))
            return (losses * weights[places]).sum()

        with (
            torch.set_grad_enabled(part.with_gradient),
            self._policy.scored(part.micro_batch, summed_loss if part.with_gradient else None) as scores,
        ):
            tokens = tokens_at(slice(None), scores.detached())
            losses, terms = self._loss.losses(tokens)
            self._require_finite(batch, sequences, losses)
            further, load_balancing = None, 0.0
            if scores.load_balancing is not None:
                mean = scores.load_balancing.sum() / len(batch.trajectories)
                further, load_balancing = self._options.load_balancing * mean, float(mean.detach())
            if part.with_gradient:
                scores.backward(further)
        loss = (losses * weights).sum()
        if further is not None:
            loss = loss + further.detach()
        return _ScoredTokens(loss, sequences, token_values(tokens), terms, scores.entropies, load_balancing)

    def _router_statistics(self, scored: Sequence[_ScoredTokens]) -> dict[str, float]:
        if self._options.load_balancing == 0:
            return {}
        return {"load_balancing_loss": sum(part.load_balancing for part in scored)}

    def _require_finite(self, batch: _StepBatch, sequences: Tensor, losses: Tensor) -> None:
        finite = torch.isfinite(losses)
        if not finite.all():
            self._require_finite_weights()
            culprit = int(sequences[~finite][0])
            raise batch.blame(culprit, "has a loss that is not finite; nothing was changed")

    def _explain_gradient(self, batch: _StepBatch, statistics: BatchStatistics | None) -> Exception:
        """Find who makes the gradient not finite: each trajectory alone, the worst is named."""
        self._require_finite_weights()
        worst, worst_norm = 0, -1.0
        has_gradient = self._has_gradient(batch)
        for index in np.flatnonzero(has_gradient).tolist():
            self._optimizer.zero_gradients()
            alone = np.arange(len(batch.trajectories)) == index
            for part in self._parts(batch, has_gradient, alone):
                self._accumulate(batch, part, statistics)
            norm = float(self._optimizer.gradient_norm())
            norm = norm if math.isfinite(norm) else math.inf
            if norm > worst_norm:
                worst, worst_norm = index, norm
        self._optimizer.zero_gradients()
        return batch.blame(worst, "makes the gradient not finite; nothing was changed")

    def _require_finite_weights(self) -> None:
        for name, tensor in self._policy.weights().items():
            if not torch.isfinite(tensor).all():
                raise PreconditionError(f"the learner's weight {name} is not finite; resume from a checkpoint")


def _replays_routing(signature: ModelSignature, options: TrainingOptions) -> bool:
    """A dense model has no routing to replay."""
    return options.routing_replay and signature.moe_layers > 0


def _advantages(batch: _StepBatch, part: _Part) -> Tensor:
    """[T] of the micro-batch's targets."""
    return torch.from_numpy(batch.advantages).float()[torch.from_numpy(part.micro_batch.target_sequences)]


def _token_statistics(scored: Sequence[_ScoredTokens]) -> dict[str, float]:
    values = TokenValues(
        policy_logprobs=torch.cat([part.values.policy_logprobs for part in scored]),
        behavior_logprobs=torch.cat([part.values.behavior_logprobs for part in scored]),
        ratio=torch.cat([part.values.ratio for part in scored]),
        advantages=torch.cat([part.values.advantages for part in scored]),
    )
    terms = TokenTerms(
        kept=torch.cat([part.terms.kept for part in scored]), weight=torch.cat([part.terms.weight for part in scored])
    )
    return token_statistics(values, terms, torch.cat([part.entropies for part in scored]))


def _policy_logprobs(batch: _StepBatch, scored: Sequence[_ScoredTokens]) -> dict[str, Float32Array]:
    """[tokens in the loss] of every trajectory, by its id; a trajectory's tokens are scored together and in order."""
    sequences = torch.cat([part.sequences for part in scored]).numpy()
    logprobs = torch.cat([part.values.policy_logprobs for part in scored]).numpy()
    order = np.argsort(sequences, kind="stable")
    ends = np.searchsorted(sequences[order], np.arange(1, len(batch.trajectories)))
    parts = np.split(logprobs[order], ends)
    return {trajectory.trajectory_id: part for trajectory, part in zip(batch.trajectories, parts, strict=True)}
