"""One optimizer step: equal over micro-batches, resumed bit for bit in the same shapes, and unmoved by bad data."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from learner.batch.packing import pack
from learner.policy.head import output
from learner.policy.head.fused import fused_head
from learner.policy.model import PolicyModel
from learner.trainer import Trainer, UnusableGroupError
from learner.training import state as training_state
from learner.training.torch_trainer import TorchTrainer
from leeway.config import TrainingOptions
from leeway.config.algorithms import ALGORITHMS
from leeway.errors import CorruptDataError, PreconditionError
from leeway.types import Trajectory, TrajectoryGroup
from leeway.weights.digests import verify_weights, weights_digest
from tests.deadlines import WAIT_SECONDS
from tests.harness.learner_builders import (
    DENSE,
    MOE,
    VOCABULARY,
    assert_refused,
    assert_resumes,
    assert_weights,
    dense_model,
    gradients,
    groups,
    moe_model,
    random_routing,
    trainer,
    trajectory,
    weights,
)

MODELS = [(dense_model, False), (moe_model, True)]


def options(**changes: Any) -> TrainingOptions:
    values: dict[str, Any] = {"learning_rate": 1e-3, "warmup_steps": 3, "publish_dtype": "float32", **changes}
    return TrainingOptions.model_validate(values)


def reference_gradient(
    model: PreTrainedModel, step: list[TrajectoryGroup], delta: float, aggregation: str
) -> dict[str, torch.Tensor]:
    """The gradient of the step's loss, written out: every trajectory alone, DPPO binary TV."""
    total = torch.zeros(())
    sequences = sum(len(group.trajectories) for group in step)
    tokens = sum(int(t.loss_mask.sum()) for group in step for t in group.trajectories)
    for group in step:
        mean = sum(t.reward for t in group.trajectories) / len(group.trajectories)
        for t in group.trajectories:
            ids = torch.tensor(t.token_ids.astype(np.int64))
            count = {
                "seq-mean-token-sum": sequences,
                "token-mean": tokens,
                "seq-mean-token-mean": sequences * int(t.loss_mask.sum()),
                "fixed-horizon": sequences * 7,
            }[aggregation]
            logprobs = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0], -1)
            for i in np.flatnonzero(t.loss_mask):
                log_pi = logprobs[i - 1, ids[i]]
                mu, pi = math.exp(t.behavior_logprobs[i]), math.exp(log_pi.item())
                advantage = t.reward - mean
                outside = abs(mu - pi) > delta and advantage * (pi - mu) > 0
                total = total - (0.0 if outside else advantage * pi / mu / count) * log_pi
    total.backward()
    return gradients(model)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "token-mean", "seq-mean-token-mean", "fixed-horizon"])
def test_the_step_is_the_formula(aggregation: str) -> None:
    model, reference = dense_model(), dense_model()
    step = groups()
    expected = reference_gradient(reference, step, 0.05, aggregation)
    chosen = options(
        delta_low=0.05,
        delta_high=0.05,
        truncation=math.inf,
        max_gradient_norm=math.inf,
        aggregation=aggregation,
        horizon=7 if aggregation == "fixed-horizon" else None,
    )
    taught = trainer(model, chosen)
    statistics = learned(taught, step)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert statistics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert statistics["masked_fraction"] > 0


@pytest.mark.parametrize(("make", "routing"), MODELS)
@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "token-mean", "seq-mean-token-mean"])
def test_micro_batches_add_up_to_the_batch(
    make: Callable[[], PreTrainedModel], routing: bool, aggregation: str
) -> None:
    step = groups(routing=routing)
    found: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    for micro_batch_tokens, row_tokens in ((100_000, 64), (40, 1), (1, 1)):
        model = make()
        cut = options(
            aggregation=aggregation,
            micro_batch_tokens=micro_batch_tokens,
            row_tokens=row_tokens,
            routing_replay=routing,
            max_gradient_norm=math.inf,
        )
        losses.append(learned(trainer(model, cut), step)["loss"])
        found.append(gradients(model))
    for other, loss in zip(found[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


PENALTIES = {"entropy_coefficient": 0.1, "reference_kl_coefficient": 0.1, "quadratic_coefficient": 1e-3}


@pytest.mark.parametrize(
    ("make", "chosen"),
    [
        *((dense_model, {"algorithm": algorithm}) for algorithm in ALGORITHMS),
        (dense_model, {**PENALTIES, "aggregation": "seq-mean-token-mean"}),
        (moe_model, {"routing_replay": True, "load_balancing": 0.5}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_both_heads_train_alike(
    make: Callable[[], PreTrainedModel], chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks end within trajectories; weights are tied, so the head's gradient meets the embedding's in one tensor."""
    monkeypatch.setattr(output, "fused_head", partial(fused_head, chunk_tokens=7))
    taught = {
        head: trainer(make(), options(head=head, topk=3, micro_batch_tokens=40, **chosen))
        for head in ("reference", "fused")
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    for seed in (0, 1):  # the second step has older policies to differ from
        step = with_candidates(groups(routing="routing_replay" in chosen, seed=seed))
        statistics: dict[str, Mapping[str, float]] = {}
        for head, one in taught.items():
            statistics[head] = learned(one, step)
            found[head] = gradients(one._policy.model)
        assert statistics["fused"] == pytest.approx(statistics["reference"], rel=1e-4, abs=1e-6)
    assert found["fused"].keys() == found["reference"].keys()
    for name, gradient in found["reference"].items():
        close = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(found["fused"][name], gradient, rtol=1e-4, atol=close, msg=name)


def with_candidates(step: list[TrajectoryGroup]) -> list[TrajectoryGroup]:
    """Each trajectory with three recorded candidates per token, the sampled one among them for some."""

    def recorded(t: Trajectory) -> Trajectory:
        offsets = np.random.default_rng(t.num_tokens).integers(0, 2, t.num_tokens)
        ids = (t.token_ids[:, None] + offsets[:, None] + 5 * np.arange(3)) % VOCABULARY
        logprobs = np.log(np.tile([0.4, 0.2, 0.1], (t.num_tokens, 1)))
        logprobs[offsets == 0, 0] = t.behavior_logprobs[offsets == 0]
        return replace(t, topk_token_ids=ids.astype(np.int32), topk_logprobs=logprobs.astype(np.float32))

    return [replace(group, trajectories=tuple(recorded(t) for t in group.trajectories)) for group in step]


@pytest.mark.parametrize(("make", "routing"), MODELS)
def test_resuming_gives_the_same_bits(make: Callable[[], PreTrainedModel], routing: bool, tmp_path: Path) -> None:
    chosen = options(routing_replay=routing, weight_decay=0.1)
    steps = [groups(routing=routing, seed=seed) for seed in range(6)]
    assert_resumes(make, chosen, steps, tmp_path)


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    taught = trainer(dense_model(), options())
    taught.train_step(1, groups())
    taught.save(tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.rsplit(".", 1)[1] for path in files} == {"safetensors", "json"}
    assert "trainer.json" in files


def test_an_unusable_checkpoint_is_refused(tmp_path: Path) -> None:
    taught = trainer(dense_model(), options())
    taught.save(tmp_path)
    with pytest.raises(PreconditionError, match="another model"):
        trainer(moe_model(), options()).load(tmp_path)
    for path in (tmp_path / "optimizer").glob("*.safetensors"):
        path.write_bytes(b"not safetensors at all")
    with pytest.raises(CorruptDataError, match="optimizer"):
        taught.load(tmp_path)
    (tmp_path / "trainer.json").write_text("{}")
    with pytest.raises(CorruptDataError, match=r"trainer\.json"):
        taught.load(tmp_path)


def learned(taught: TorchTrainer, step: list[TrajectoryGroup]) -> Mapping[str, float]:
    """The statistics of a step."""
    return taught.train_step(1, step).statistics


def with_member(step: list[TrajectoryGroup], **changes: Any) -> list[TrajectoryGroup]:
    """The step with one member of its second group changed."""
    members = list(step[1].trajectories)
    members[2] = replace(members[2], **changes)
    return [step[0], replace(step[1], trajectories=tuple(members)), *step[2:]]


def spoiled_logprobs(value: float) -> np.ndarray:
    logprobs = groups(routing=True)[1].trajectories[2].behavior_logprobs.copy()
    logprobs[4] = value
    return logprobs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": None}, "no routing"),
        ({"routing": random_routing(3, 0)}, "routing of shape"),
        ({"token_ids": np.zeros(0, dtype=np.int32)}, "0 tokens"),
    ],
)
def test_an_unusable_group_is_named_and_nothing_moves(changes: dict[str, Any], message: str) -> None:
    step = groups(routing=True)
    assert_refused(moe_model, options(routing_replay=True), with_member(step, **changes), step, message)


@pytest.mark.parametrize(
    "changed",
    [
        lambda t: replace(t, token_ids=np.full(t.num_tokens, 32, dtype=np.int32)),
        lambda t: replace(t, token_ids=np.full(t.num_tokens, -1, dtype=np.int32)),
        lambda t: replace(t, loss_mask=np.ones(t.num_tokens, dtype=np.bool_)),
        lambda t: trajectory(t.trajectory_id, 65, reward=1.0),
    ],
)
def test_a_trajectory_of_another_model_is_refused(changed: Callable[[Trajectory], Trajectory]) -> None:
    step = groups()
    spoiled = replace(step[1], trajectories=(*step[1].trajectories[:3], changed(step[1].trajectories[3])))
    with pytest.raises(UnusableGroupError, match="group-1-3") as refusal:
        trainer(dense_model(), options()).train_step(1, [step[0], spoiled])
    assert refusal.value.group_id == "group-1"


def test_an_empty_group_or_step_is_refused() -> None:
    taught = trainer(dense_model(), options())
    with pytest.raises(UnusableGroupError, match="no trajectories"):
        taught.train_step(1, [TrajectoryGroup("empty", 0, ())])
    with pytest.raises(PreconditionError, match="step 7 has no groups"):
        taught.train_step(7, [])


def test_a_loss_that_is_not_finite_names_its_trajectory() -> None:
    """exp(100) overflows float32: with C infinite there is no finite weight."""
    bad = with_member(groups(), behavior_logprobs=spoiled_logprobs(-120.0))
    assert_refused(dense_model, options(algorithm="pg-is"), bad, groups(), "group-1-2 has a loss that is not finite")


def test_a_gradient_that_is_not_finite_names_its_trajectory() -> None:
    """A weight near float32's end: the loss is finite, its gradient times the model's is not."""
    bad = with_member(groups(), reward=-50.0, behavior_logprobs=spoiled_logprobs(-80.0))
    assert_refused(dense_model, options(algorithm="pg-is"), bad, groups(), "group-1-2 makes the gradient not finite")


def test_weights_that_are_not_finite_blame_no_group() -> None:
    model = dense_model()
    taught = trainer(model, options())
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = math.nan
    with pytest.raises(PreconditionError, match=r"model\.norm\.weight is not finite"):
        taught.train_step(1, groups())


def test_a_step_without_signal_counts_and_moves_only_by_momentum() -> None:
    model = dense_model()
    taught = trainer(model, options())
    before = weights(model)
    statistics = learned(taught, groups(count=1))
    assert statistics["grad_norm"] == 0
    assert statistics["no_signal_group_fraction"] == 1
    assert statistics["num_trained_tokens"] > 0
    assert statistics["entropy"] > 0
    assert_weights(model, before)
    assert learned(taught, groups())["learning_rate"] == pytest.approx(1e-3 * 2 / 3)


def test_statistics_of_a_step() -> None:
    step = groups()
    statistics = learned(trainer(dense_model(), options()), step)
    trajectories = [t for group in step for t in group.trajectories]
    assert statistics["reward_mean"] == pytest.approx(np.mean([t.reward for t in trajectories]))
    assert statistics["num_sequences"] == 12
    assert statistics["num_tokens"] == sum(t.num_tokens for t in trajectories)
    assert statistics["num_trained_tokens"] == sum(t.loss_mask.sum() for t in trajectories)
    assert statistics["response_length_mean"] == pytest.approx(statistics["num_trained_tokens"] / 12)
    assert statistics["advantage_mean_abs"] == pytest.approx(0.5 * 8 / 12)
    assert statistics["no_signal_group_fraction"] == pytest.approx(1 / 3)
    assert statistics["learning_rate"] == pytest.approx(1e-3 / 3)
    assert 0 < statistics["mean_abs_policy_behavior_difference"] < statistics["max_abs_policy_behavior_difference"] < 1
    assert statistics["masked_fraction"] == pytest.approx(
        statistics["masked_fraction_positive"] + statistics["masked_fraction_negative"]
    )
    assert all(math.isfinite(value) for value in statistics.values())
    assert all(isinstance(value, float) for value in statistics.values())


def test_policy_logprobs_belong_to_their_trajectories() -> None:
    """However they were packed: each is what the model says of that trajectory alone, before the step."""
    step = groups()
    result = trainer(dense_model(), options(micro_batch_tokens=50)).train_step(1, step)
    trajectories = [t for group in step for t in group.trajectories]
    assert list(result.policy_logprobs) == [t.trajectory_id for t in trajectories]
    policy = PolicyModel(dense_model(), routing_replay=False, gradient_checkpointing=False)
    for index, t in enumerate(trajectories):
        with torch.no_grad(), policy.scored(pack([[index]], trajectories)) as scores:
            np.testing.assert_allclose(result.policy_logprobs[t.trajectory_id], scores.logprobs, rtol=1e-5, atol=1e-5)


def test_learning_moves_towards_the_reward() -> None:
    """Ten steps on one group make what was rewarded more likely, and what was not less."""
    policy = PolicyModel(moe_model(), routing_replay=True, gradient_checkpointing=False)
    taught = TorchTrainer(policy, MOE, options(routing_replay=True, truncation=5.0))
    step = groups(routing=True, count=2)[:1]
    members = step[0].trajectories

    def likelihoods() -> np.ndarray:
        logprobs: list[float] = []
        for index in range(len(members)):
            with torch.no_grad(), policy.scored(pack([[index]], members, with_routing=True)) as scores:
                logprobs.append(float(scores.logprobs.mean()))
        return np.array(logprobs)

    before = likelihoods()
    for number in range(1, 11):
        taught.train_step(number, step)
    gain = likelihoods() - before
    rewarded = np.array([t.reward for t in members]) > 0
    assert gain[rewarded].mean() > 0 > gain[~rewarded].mean()


def test_published_weights_verify_and_follow_the_policy() -> None:
    taught = trainer(moe_model(), options(publish_dtype="bfloat16"))
    manifest, buffers = taught.published()
    verify_weights(manifest, buffers, weights_digest(manifest))
    assert [entry.name for entry in manifest.tensors] == sorted(entry.name for entry in manifest.tensors)
    assert {entry.dtype for entry in manifest.tensors} == {"bfloat16"}
    assert any("experts.0.gate_proj" in entry.name for entry in manifest.tensors)
    taught.train_step(1, groups(count=3))
    assert weights_digest(taught.published()[0]) != weights_digest(manifest)


def test_a_dense_model_needs_no_routing() -> None:
    taught = trainer(dense_model(), options(routing_replay=True))
    assert taught.signature == DENSE
    taught.train_step(1, groups())


def model_directory(model: PreTrainedModel, directory: Path) -> Path:
    """A Hugging Face directory with a character tokenizer."""
    model.save_pretrained(directory)
    vocabulary = {"<end>": 0, **{chr(ord("a") + i): i + 1 for i in range(26)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory


def test_starts_from_a_model_directory(tmp_path: Path) -> None:
    model = dense_model()
    path = model_directory(model, tmp_path)
    taught: Trainer = TorchTrainer.from_directory(path, options(routing_replay=True))
    assert taught.signature.vocab_size == 32
    assert taught.stop_token_ids == (0,)
    assert taught.published()[0] == trainer(model, options()).published()[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"algorithm": "ppo"},
        {"delta_low": -0.1},
        {"truncation": 0.0},
        {"truncation": math.nan},
        {"learning_rate": math.inf},
        {"betas": [0.9, 1.0]},
        {"aggregation": "sum"},
        {"aggregation": "fixed-horizon"},
        {"horizon": 5},
        {"publish_dtype": "int8"},
        {"clip": 1.0},
        {"topk": 0},
        {"topk": 21},
        {"divergence": "tv"},
        {"algorithm": "drpo", "delta_low": 0.0},
        {"algorithm": "icepop", "ratio_low": 6.0},
        {"delta_growth_limit": 0.5},
        {"baseline": "none"},
        {"quadratic_coefficient": math.inf},
        {"proximal_every_steps": 0},
    ],
)
def test_options_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingOptions.model_validate(wrong)


def test_unset_numbers_are_the_algorithms_own() -> None:
    parameters = TrainingOptions(algorithm="grpo-clip-higher", delta_low=0.1).loss_parameters
    assert (parameters.delta_low, parameters.delta_high, parameters.truncation) == (0.1, 0.28, math.inf)
    assert TrainingOptions(truncation=math.inf).loss_parameters.truncation == math.inf


def test_a_checkpoint_is_of_the_moment_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written later, while training goes on, is what was there at the beginning."""
    trained, write = threading.Event(), training_state._save_alone

    def write_late(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert trained.wait(WAIT_SECONDS)
        write(directory, tensors)

    monkeypatch.setattr(training_state, "_save_alone", write_late)
    taught, restored = trainer(dense_model(), options()), trainer(dense_model(), options())
    taught.train_step(1, groups())
    manifest, _ = taught.published()
    finish = taught.begin_save(tmp_path)
    taught.train_step(2, groups())
    trained.set()
    finish()
    assert taught.published()[0] != manifest
    restored.load(tmp_path)
    assert restored.published()[0] == manifest
    restored.train_step(2, groups())  # the moments are of that moment, too
    assert restored.published() == taught.published()
