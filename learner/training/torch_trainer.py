"""Trains a Hugging Face causal language model with PyTorch, one optimizer step per call.

    groups ── check ──> StepBatch ── StepGradient ──> gradient, known to be finite ── AdamW ──> weights ── published
              advantages, weights, staleness  └── statistics

Nothing moves until every loss and the gradient are known to be finite. Weights, gradients and moments are float32;
matrix products too, unless `compute_dtype` says bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version as library_version
from pathlib import Path
from typing import cast

import torch

from learner.batch.checks import check_candidates, check_group, check_routing, check_trajectory
from learner.lineage import Branch
from learner.policy.model import PolicyModel
from learner.trainer import FinishSave, StepResult
from learner.training import state as training_state
from learner.training.gradient import StepGradient
from learner.training.optimizer import Optimizer
from learner.training.policy_loss import PolicyLoss, RunningMismatch, fresh_totals
from learner.training.state import TrainerScalars
from learner.training.statistics import (
    candidate_statistics,
    candidate_totals,
    gather_tokens,
    policy_logprobs,
    token_statistics,
)
from learner.training.step_batch import OlderPolicy, Partition, step_batch
from learner.training.world import TorchWorld, World
from leeway.config import TrainingOptions
from leeway.errors import PreconditionError
from leeway.huggingface import (
    load_model,
    load_tokenizer,
    model_signature,
    published_parts,
    save_model,
    tensor_bytes,
    tensor_dtype_name,
    torch_dtype,
)
from leeway.types import ModelSignature, TensorEntry, Trajectory, TrajectoryGroup, WeightManifest
from leeway.weights.digests import tensor_entry


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
        world: World | None = None,
    ) -> None:
        """Train `policy`, which `signature` describes and whose weights are the run's first ones.

        `from_directory` makes both. In a `world` of several ranks each trains on its own groups of a step; together
        they take the step that one process would take on all of them.
        """
        self.signature = signature
        self.stop_token_ids = stop_token_ids
        self._policy = policy
        self._options = options
        self._world = world or World()
        if isinstance(self._world, TorchWorld):
            policy.shard(self._world.mesh())
        self._optimizer = Optimizer(policy.model, options)
        self._loss = PolicyLoss(options, self._world.reduce)
        reference = OlderPolicy(policy.weights()) if options.penalties.reference_kl else None
        keeps_proximal = self._loss.needs_proximal and options.proximal_every_steps > 1
        self._proximal = OlderPolicy(policy.weights()) if keeps_proximal else None
        self._replays_routing = _replays_routing(signature, options)
        partition = Partition(
            policy, options, self._world, self._replays_routing, self._loss.topk, self._proximal, reference
        )
        self._gradient = StepGradient(partition, self._loss, self._optimizer)

    @classmethod
    def from_directory(cls, path: Path, options: TrainingOptions, world: World | None = None) -> TorchTrainer:
        """Start from a Hugging Face model directory with its tokenizer.

        Raises:
            ConfigError: the directory is not a whole model, or one that cannot be trained with these options.
        """
        signature = model_signature(path)
        end_of_sequence = cast("int | None", load_tokenizer(path).eos_token_id)
        world = world or World()
        model = load_model(path, torch.float32)
        if not isinstance(world, TorchWorld):
            cast("torch.nn.Module", model).to(world.device)  # sharding moves its part alone
        policy = PolicyModel(
            model,
            routing_replay=_replays_routing(signature, options),
            gradient_checkpointing=options.gradient_checkpointing,
            head=options.head,
            compute_dtype=torch_dtype(options.compute_dtype),
            lora=options.lora,
            load_balancing=options.load_balancing > 0,
        )
        return cls(policy, signature, options, () if end_of_sequence is None else (end_of_sequence,), world)

    @property
    def numerics(self) -> Mapping[str, str]:
        device = self._world.device
        libraries = {name: library_version(name) for name in ("torch", "transformers")}
        named = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {**libraries, "device": f"{device.type} {named}"}

    def published(self) -> tuple[WeightManifest, list[bytes]]:
        published: list[tuple[TensorEntry, bytes]] = []
        for name, tensor in self._policy.merged_weights():  # one at a time: not the whole model beside its shards
            if self._world.rank:
                continue
            for published_name, part in published_parts(self._policy.model, name, tensor, self._options.publish_dtype):
                data = tensor_bytes(part)
                published.append((tensor_entry(published_name, tensor_dtype_name(part), tuple(part.shape), data), data))
        published.sort(key=lambda item: item[0].name.encode())
        return WeightManifest(tuple(entry for entry, _ in published)), [data for _, data in published]

    def train_step(self, step: int, groups: Sequence[TrajectoryGroup], branches: Sequence[Branch] = ()) -> StepResult:
        self.check(step, groups)
        batch = step_batch(groups, step - 1, branches, self._options, self._world)
        learning_rate = self._optimizer.learning_rate
        if self._proximal is not None and self._optimizer.num_steps % self._options.proximal_every_steps == 0:
            self._proximal.refresh()
        scored, gradient_norm = self._gradient.accumulate(batch)
        self._optimizer.step(gradient_norm)
        tokens = gather_tokens(scored, batch.first, self._world)
        totals = self._world.totals(
            {
                "loss": sum(float(part.loss) for part in scored),
                "load_balancing_loss": sum(part.load_balancing for part in scored),
                **fresh_totals((part.values, part.terms) for part in scored),
                **candidate_totals([part.values.candidates for part in scored]),
            }
        )
        balancing = ("load_balancing_loss",) if self._options.load_balancing else ()
        return StepResult(
            statistics={
                "loss": totals["loss"],
                "grad_norm": float(gradient_norm),
                "learning_rate": learning_rate,
                **batch.statistics,
                **token_statistics(tokens),
                **candidate_statistics(totals),
                **self._loss.observed(totals),
                **{name: totals[name] for name in balancing},
            },
            policy_logprobs=policy_logprobs(tokens, batch, self._world),
        )

    def begin_save(self, directory: Path) -> FinishSave:
        kinds = {"weights": self._policy.weights(), "optimizer": self._optimizer.state()}
        if self._proximal is not None:
            kinds["proximal"] = self._proximal.weights
        waits = [
            training_state.begin_save_tensors(directory / kind, tensors, self._world.save_group(kind))
            for kind, tensors in kinds.items()
        ]
        if not self._world.rank:
            training_state.save_scalars(directory, self._scalars())

        def finish() -> None:
            for wait in waits:
                wait()

        return finish

    def save(self, directory: Path) -> None:
        self.begin_save(directory)()

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
        tensors = dict(self._policy.merged_weights())
        save_model(self._policy.model, tokenizer_directory, directory, self._options.publish_dtype, tensors)

    def _scalars(self) -> TrainerScalars:
        mismatch = self._loss.mismatch
        return TrainerScalars(
            training_state.FORMAT,
            self.signature.model_digest.hex(),
            self._optimizer.num_steps,
            mismatch.total,
            mismatch.tokens,
        )

    def check(self, step: int, groups: Sequence[TrajectoryGroup]) -> None:
        """Refuse groups that cannot be trained on.

        Raises:
            UnusableGroupError: names the group and the trajectory.
        """
        if not groups:
            raise PreconditionError(f"step {step} has no groups to train on")
        for group in groups:
            check_group(group, self._check)

    def _check(self, trajectory: Trajectory) -> None:
        check_trajectory(trajectory, self.signature, self._policy.longest_trajectory)
        if self._replays_routing:
            check_routing(trajectory, self.signature)
        if self._loss.topk:
            check_candidates(trajectory, self.signature, self._loss.topk)


def _replays_routing(signature: ModelSignature, options: TrainingOptions) -> bool:
    """A dense model has no routing to replay."""
    return options.routing_replay and signature.moe_layers > 0
