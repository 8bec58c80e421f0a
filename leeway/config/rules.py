"""What a configuration may not say, where it shows only between two sections.

Each rule is a pure function: from a configuration whose sections are valid to the line that refuses it, or None. Rules
are asked in order, so that one may rely on those before it. What shows only when something is opened is in
`leeway.config.references`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from leeway.config.engines import ENGINES
from leeway.rpc import is_loopback

if TYPE_CHECKING:
    from leeway.config.configuration import RunConfiguration

_EVERYWHERE: Final = ("0.0.0.0", "[::]", "*")  # noqa: S104 (refused)


def list_one_entry_per_server(c: RunConfiguration) -> str | None:
    """What is listed by server is as long as network.inference_servers; backends and engines may be left out."""
    servers = len(c.network.inference_servers)
    lists = {
        "metrics.inference_servers": len(c.metrics.inference_servers),
        "inference_server.backends": len(c.inference_server.backends) or servers,
        "inference_server.engines": len(c.inference_server.engines) or servers,
    }
    for key, entries in lists.items():
        if entries != servers:
            return f"{key}: lists {entries}, but network.inference_servers lists {servers}; give one per server"
    return None


def rehearse_on_both_sides(c: RunConfiguration) -> str | None:
    """An engine without a model and a trainer without a model go together."""
    for engine in sorted(c.engine_names()):
        if ENGINES[engine].rehearsal != (c.learner.trainer == "arithmetic"):
            return (
                f"inference_server.engine is {engine}, but learner.trainer is {c.learner.trainer}; a rehearsal needs "
                "arithmetic for both"
            )
    return None


def train_a_model(c: RunConfiguration) -> str | None:
    """Whatever is no rehearsal starts from a model."""
    if c.learner.trainer == "arithmetic" or c.model.path is not None:
        return None
    return "model.path: required, but not set; give a Hugging Face model directory"


def listen_beyond_loopback_only_with_trust(c: RunConfiguration) -> str | None:
    """Beyond loopback a service has certificates, or was told to trust its network."""
    network = c.network
    addresses = [("replay_buffer", network.replay_buffer), ("policy", network.policy)]
    if not c.inference_server.backends:  # else the servers only dial out
        addresses += [("inference_servers", address) for address in network.inference_servers]
    for key, address in addresses:
        if not (is_loopback(address) or network.trusted):
            return (
                f"network.{key}: {address} is beyond loopback; set network.certificate, key and authority, or "
                "network.insecure = true on a network you trust"
            )
    return None


def broadcast_where_peers_meet_in_private(c: RunConfiguration) -> str | None:
    """Broadcasts need a host to meet at, and are not encrypted."""
    network = c.network
    if not network.uses_broadcasts:
        return None
    if network.policy.rpartition(":")[0] in _EVERYWHERE:
        return (
            f"network.policy: {network.policy} names no host at which broadcasts could meet; name one, or set "
            'network.weights = "grpc"'
        )
    if not (is_loopback(network.policy) or network.insecure):
        return (
            f'network.weights: "{network.weights}" would send weights beyond this host unencrypted (digests still '
            'guard every byte); set network.insecure = true if that network is yours alone, or "grpc"'
        )
    return None


def give_every_rank_a_group(c: RunConfiguration) -> str | None:
    """A step's groups are divided among the learner's ranks."""
    if c.learner.ranks <= c.run.groups_per_step:
        return None
    return (
        f"learner.ranks: is {c.learner.ranks}, but run.groups_per_step is {c.run.groups_per_step}; every rank needs "
        "a group"
    )


def publish_often_enough(c: RunConfiguration) -> str | None:
    """Between two published versions all data has to stay fresh enough to train on."""
    most = c.run.max_staleness + 1
    if c.learner.publish_every <= most:
        return None
    return (
        f"learner.publish_every: is {c.learner.publish_every}; beyond run.max_staleness + 1 = {most} no data would be "
        "fresh enough to train on"
    )


def judge_signal_by_final_rewards(c: RunConfiguration) -> str | None:
    """The buffer drops groups by the rewards that it is given; the over-long penalty changes them afterwards."""
    if not c.run.drop_no_signal or c.learner.training.overlong_limit is None:
        return None
    return (
        "run.drop_no_signal: looks at rewards before learner.training.overlong_limit changes them, and would drop "
        "groups that differ in length only; unset one of the two"
    )


def record_what_the_loss_reads(c: RunConfiguration) -> str | None:
    """A top-K loss needs as many recorded candidates."""
    training = c.learner.training
    if c.learner.trainer == "arithmetic" or training.topk_needed <= c.sampling.topk:
        return None
    return (
        f"learner.training.algorithm: {training.algorithm} needs the top {training.topk_needed} candidates of each "
        f"token, but sampling.topk is {c.sampling.topk}; set sampling.topk = {training.topk_needed}, or a smaller "
        "learner.training.topk"
    )


def record_the_routing_that_is_replayed(c: RunConfiguration) -> str | None:
    """Routing replay needs recorded routing."""
    if c.learner.trainer == "arithmetic" or not c.learner.training.routing_replay or c.sampling.routing:
        return None
    return (
        "learner.training.routing_replay: needs recorded routing; set sampling.routing = true, or "
        "learner.training.routing_replay = false"
    )


def record_no_more_than_the_engine_can(c: RunConfiguration) -> str | None:
    """Each engine records a bounded number of candidates."""
    if c.inference_server.backends:  # which say for themselves what they can
        return None
    for engine in sorted(c.engine_names()):
        most = c.inference_server.options_of(engine).max_topk
        if c.sampling.topk > most:
            return f"sampling.topk: is {c.sampling.topk}, but inference_server.{engine}.max_topk is {most}"
    return None


def evaluate_groups_that_fit_a_server(c: RunConfiguration) -> str | None:
    """A group of an evaluation is sampled by one server at once."""
    servers = c.inference_server
    slots = servers.worker.prefetch + min(servers.options_of(engine).max_concurrency for engine in c.engine_names())
    if servers.backends or not c.evaluation.tasks or c.evaluation.members <= slots:
        return None
    return (
        f"evaluation.members: is {c.evaluation.members}, but a server takes at most {slots} trajectories, and a group "
        "goes whole to one server; raise the engine's max_concurrency"
    )


RULES: Final[tuple[Callable[[RunConfiguration], str | None], ...]] = (
    list_one_entry_per_server,
    rehearse_on_both_sides,
    train_a_model,
    listen_beyond_loopback_only_with_trust,
    broadcast_where_peers_meet_in_private,
    give_every_rank_a_group,
    publish_often_enough,
    judge_signal_by_final_rewards,
    record_what_the_loss_reads,
    record_the_routing_that_is_replayed,
    record_no_more_than_the_engine_can,
    evaluate_groups_that_fit_a_server,
)


def refusal(configuration: RunConfiguration) -> str | None:
    """The line that refuses a configuration; None for one that keeps every rule."""
    return next((line for rule in RULES if (line := rule(configuration)) is not None), None)
