"""Trains a Hugging Face causal language model with PyTorch, one optimizer step per call.

    groups ── check ──> StepBatch ── plan, pack ──> micro-batch ── score ──> token losses ── backward ──┐ accumulated
              advantages, weights                                                                       ▼
    statistics <────────────────────────── AdamW <────────────────── finite? <────────────────────── gradient

Losses are weighted by the whole step's counts, so micro-batches add up to the batch. Trajectories whose advantage is
zero have a gradient of zero: they are scored for the statistics and skip the backward pass. Nothing moves until every
loss and the gradient are known to be finite. Computes in float32.

Shape legend: N trajectories of a step, T their trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner import training_state
from learner.advantages import group_advantages
from learner.checks import check_group, check_trajectory
from learner.errors import UnusableGroupError
from learner.head import TokenScores
from learner.losses.aggregation import sequence_weights
from learner.losses.form import TokenBatch, TokenTerms, TokenValues, load_algorithm, token_losses, token_values
from learner.model import PolicyModel
from learner.optimizer import Optimizer
from learner.packing import MicroBatch, pack, plan_micro_batches
from learner.r3 import check_routing
from learner.statistics import group_statistics, token_statistics
from learner.trainer import StepResult
from learner.training_options import TrainingOptions
from learner.training_state import TrainerScalars
from leeway.config import SamplingOptions
from leeway.errors import ConfigError, PreconditionError
from leeway.huggingface import load_model, load_tokenizer, model_signature, published_tensors, save_model, tensor_bytes
from leeway.types import Float32Array, ModelSignature, Trajectory, TrajectoryGroup, WeightManifest
from leeway.weights import tensor_entry


@dataclass(frozen=True, slots=True)
class _StepBatch:
    """The trajectories of a step, all groups one after the other."""

    group_ids: tuple[str, ...]  # [N]
    trajectories: tuple[Trajectory, ...]  # [N]
    advantages: NDArray[np.float64]  # [N]
    weights: NDArray[np.float64]  # [N] of each trajectory's summed token loss
    statistics: Mapping[str, float]

    def blame(self, sequence: int, message: str) -> UnusableGroupError:
        """The error that names a trajectory and its group."""
        trajectory_id = self.trajectories[sequence].trajectory_id
        return UnusableGroupError(self.group_ids[sequence], f"trajectory {trajectory_id} {message}")


@dataclass(frozen=True, slots=True)
class _ScoredTokens:
    """What is kept of a micro-batch for the step's statistics, without gradient."""

    loss: Tensor  # scalar, this micro-batch's share of the step's loss
    sequences: Tensor  # [T] index of the trajectory
    values: TokenValues
    terms: TokenTerms
    entropies: Tensor


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
    ) -> None:
        """Train `policy`, which `signature` describes. `from_directory` makes both."""
        self.signature = signature
        self.stop_token_ids = stop_token_ids
        self._policy = policy
        self._options = options
        self._optimizer = Optimizer(policy.model, options)
        self._decide = load_algorithm(options.loss_algorithm)
        self._replays_routing = _replays_routing(signature, options)

    @classmethod
    def from_directory(cls, path: Path, sampling: SamplingOptions, options: TrainingOptions) -> TorchTrainer:
        """Start from a Hugging Face model directory with its tokenizer.

        Raises:
            ConfigError: the directory is not a whole model, or one that cannot be trained with these options.
        """
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
        )
        return cls(policy, signature, options, () if end_of_sequence is None else (end_of_sequence,))

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        dtype = self._options.publish_dtype
        tensors = [
            (name, tuple(tensor.shape), tensor_bytes(tensor))
            for name, tensor in published_tensors(self._policy.model, dtype)
        ]
        manifest = WeightManifest(tuple(tensor_entry(name, dtype, shape, data) for name, shape, data in tensors))
        return manifest, [data for _, _, data in tensors]

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup]) -> StepResult:
        batch = self._prepare(step, groups)
        learning_rate = self._optimizer.learning_rate
        self._optimizer.zero_gradients()
        scored = [
            self._accumulate(batch, micro_batch, with_gradient)
            for with_gradient in (True, False)
            for micro_batch in self._micro_batches(batch, batch.advantages.astype(bool) == with_gradient)
        ]
        gradient_norm = self._optimizer.gradient_norm()
        if not torch.isfinite(gradient_norm):
            raise self._explain_gradient(batch)
        self._optimizer.step(gradient_norm)
        return StepResult(
            statistics={
                "loss": sum(float(part.loss) for part in scored),
                "grad_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                **batch.statistics,
                **_token_statistics(scored),
            },
            policy_logprobs=_policy_logprobs(batch, scored),
        )

    def save(self, directory: Path) -> None:
        training_state.save_tensors(directory / "weights", self._policy.weights())
        training_state.save_tensors(directory / "optimizer", self._optimizer.state())
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

    def export(self, tokenizer_directory: Path, directory: Path) -> None:
        """Write the weights, as published, as a directory that `from_pretrained` loads."""
        save_model(self._policy.model, tokenizer_directory, directory, self._options.publish_dtype)

    def _scalars(self) -> TrainerScalars:
        return TrainerScalars(training_state.FORMAT, self.signature.model_digest.hex(), self._optimizer.num_steps)

    def _prepare(self, step: int, groups: Sequence[TrajectoryGroup]) -> _StepBatch:
        """Check every group, and give every trajectory its advantage and weight."""
        if not groups:
            raise PreconditionError(f"step {step} has no groups to train on")
        for group in groups:
            check_group(group, self._check)
        rewards = [np.array([t.reward for t in group.trajectories]) for group in groups]
        advantages = [group_advantages(r.tolist(), divide_by_std=self._options.divide_by_std) for r in rewards]
        trajectories = tuple(trajectory for group in groups for trajectory in group.trajectories)
        trained_lengths = np.array([int(t.loss_mask.sum()) for t in trajectories], dtype=np.int64)
        num_tokens = np.array([t.num_tokens for t in trajectories], dtype=np.int64)
        return _StepBatch(
            group_ids=tuple(group.group_id for group in groups for _ in group.trajectories),
            trajectories=trajectories,
            advantages=np.concatenate(advantages),
            weights=sequence_weights(self._options.aggregation, trained_lengths, self._options.horizon),
            statistics=group_statistics(rewards, advantages, num_tokens, trained_lengths),
        )

    def _check(self, trajectory: Trajectory) -> None:
        check_trajectory(trajectory, self.signature, self._policy.longest_trajectory)
        if self._replays_routing:
            check_routing(trajectory, self.signature)

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
            )
            for rows in plan
        ]

    def _accumulate(self, batch: _StepBatch, micro_batch: MicroBatch, with_gradient: bool) -> _ScoredTokens:
        """Score one micro-batch and add its gradient.

        Raises:
            UnusableGroupError: a trajectory's loss is not finite.
        """
        sequences = torch.from_numpy(micro_batch.target_sequences)
        behavior_logprobs = torch.from_numpy(micro_batch.behavior_logprobs)
        advantages = torch.from_numpy(batch.advantages).float()[sequences]
        weights = torch.from_numpy(batch.weights).float()[sequences]

        def tokens_at(places: slice, policy_logprobs: Tensor) -> TokenBatch:
            return TokenBatch(
                policy_logprobs=policy_logprobs,
                behavior_logprobs=behavior_logprobs[places],
                advantages=advantages[places],
                loss_mask=torch.ones_like(policy_logprobs, dtype=torch.bool),
                sequence_ids=sequences[places],
            )

        def summed_loss(places: slice, scores: TokenScores) -> Tensor:
            losses, _ = token_losses(tokens_at(places, scores.logprobs), self._decide, self._options.loss_parameters)
            return (losses * weights[places]).sum()

        with (
            torch.set_grad_enabled(with_gradient),
            self._policy.scored(micro_batch, summed_loss if with_gradient else None) as scores,
        ):
            tokens = tokens_at(slice(None), scores.logprobs.detach())
            losses, terms = token_losses(tokens, self._decide, self._options.loss_parameters)
            self._require_finite(batch, sequences, losses)
            if with_gradient:
                scores.backward()
        return _ScoredTokens((losses * weights).sum(), sequences, token_values(tokens), terms, scores.entropies)

    def _require_finite(self, batch: _StepBatch, sequences: Tensor, losses: Tensor) -> None:
        finite = torch.isfinite(losses)
        if not finite.all():
            self._require_finite_weights()
            culprit = int(sequences[~finite][0])
            raise batch.blame(culprit, "has a loss that is not finite; nothing was changed")

    def _explain_gradient(self, batch: _StepBatch) -> Exception:
        """Find who makes the gradient not finite: each trajectory alone, the worst is named."""
        self._require_finite_weights()
        worst, worst_norm = 0, -1.0
        for index in np.flatnonzero(batch.advantages).tolist():
            self._optimizer.zero_gradients()
            alone = np.arange(len(batch.trajectories)) == index
            for micro_batch in self._micro_batches(batch, alone):
                self._accumulate(batch, micro_batch, with_gradient=True)
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
