"""Every Prometheus metric of Leeway, in one place: prefix `leeway_`, base units, bounded labels.

Each service makes its own set on its own registry and serves it with `serve_metrics`. No label is ever a trajectory,
a group or a version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from leeway.errors import ConfigError

STALENESS_BUCKETS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
_SECONDS_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(frozen=True, slots=True)
class _Registrar:
    """Makes metrics on one registry: name, HELP line, labels with spaces between them."""

    registry: CollectorRegistry

    def gauge(self, name: str, meaning: str, labels: str = "") -> Gauge:
        return Gauge(name, meaning, labels.split(), registry=self.registry)

    def counter(self, name: str, meaning: str, labels: str = "") -> Counter:
        return Counter(name, meaning, labels.split(), registry=self.registry)

    def histogram(self, name: str, meaning: str, labels: str = "") -> Histogram:
        """A histogram of seconds."""
        return Histogram(name, meaning, labels.split(), buckets=_SECONDS_BUCKETS, registry=self.registry)


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> None:
    """Serve `/metrics` from a daemon thread.

    Raises:
        ConfigError: the port is in use.
    """
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another port in [metrics]"
        ) from error


class ReplayBufferMetrics:
    """Metrics of the replay buffer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        new = _Registrar(registry)
        self.groups = new.gauge("leeway_replay_groups", "Training groups held by the buffer, by state", "run state")
        self.dropped_groups = new.gauge(
            "leeway_replay_dropped_groups", "Training groups dropped so far, by reason", "run reason"
        )
        self.oldest_group_age_seconds = new.gauge(
            "leeway_replay_oldest_group_age_seconds",
            "Age in seconds of the oldest training group, by state",
            "run state",
        )
        self.ended_groups = new.counter(
            "leeway_replay_ended_groups_total",
            "Training groups consumed or dropped since the service started",
            "run fate",
        )
        self.ended_group_bytes = new.counter(
            "leeway_replay_ended_group_bytes_total",
            "Bytes written for ended training groups; dropped groups larger than consumed ones show a length bias",
            "run fate",
        )
        self.dead_letters = new.gauge(
            "leeway_replay_dead_letters", "Dead letters: groups that failed for good and were not queued again", "run"
        )
        self.present_servers = new.gauge(
            "leeway_replay_present_servers",
            "Inference servers that called within the last lease_seconds and are not drained",
            "run",
        )
        self.drained_servers = new.gauge(
            "leeway_replay_drained_servers",
            "1 for each drained server, which gets no more tickets, by reason",
            "run server reason",
        )
        self.leases = new.gauge(
            "leeway_replay_leases", "Groups under a ticket, including those whose lease has lapsed", "run"
        )
        self.head_step = new.gauge(
            "leeway_replay_head_step", "Optimizer step of the newest registered policy version", "run"
        )
        self.committed_step = new.gauge(
            "leeway_replay_committed_step", "Newest optimizer step that the learner has committed", "run"
        )
        self.epoch = new.gauge("leeway_replay_epoch", "Epoch of the newest learner incarnation", "run")
        self.log_bytes = new.gauge("leeway_replay_log_bytes", "Size of the log on disk")
        self.free_bytes = new.gauge("leeway_replay_disk_free_bytes", "Free space on the log's disk")
        self.received_bytes = new.gauge(
            "leeway_replay_received_bytes",
            "Bytes received and not yet durable; replay_buffer.max_pending_bytes is the bound",
        )
        self.waiting_bytes = new.gauge(
            "leeway_replay_waiting_bytes", "Bytes held in write streams that are being throttled"
        )
        self.stalled = new.gauge(
            "leeway_replay_log_stalled", "1 while the log cannot be written because the disk is full, else 0"
        )
        self.refusals = new.counter(
            "leeway_replay_refusals_total", "Calls and items refused with RESOURCE_EXHAUSTED, by cause", "cause"
        )
        self.appended_records = new.counter("leeway_replay_appended_records_total", "Log records made durable")
        self.appended_bytes = new.counter("leeway_replay_appended_bytes_total", "Log bytes made durable")
        self.fsync_seconds = new.histogram("leeway_replay_fsync_seconds", "Seconds of one fsync of the log")
        self.issued_tickets = new.counter(
            "leeway_replay_issued_tickets_total", "Tickets issued to inference servers", "run purpose server"
        )
        self.reissued_tickets = new.counter(
            "leeway_replay_reissued_tickets_total",
            "Tickets issued again because an earlier ticket did not finish the group",
            "run purpose",
        )
        self.ticket_wait_seconds = new.histogram(
            "leeway_replay_ticket_wait_seconds", "Seconds that a successful AcquireTickets call waited", "run"
        )
        self.written_items = new.counter(
            "leeway_replay_written_items_total", "Written items answered, by status", "run status"
        )
        self.written_bytes = new.counter(
            "leeway_replay_written_bytes_total", "Bytes of accepted trajectory chunks", "run server"
        )
        self.closed_trajectories = new.counter(
            "leeway_replay_closed_trajectories_total", "Trajectories closed", "run server"
        )
        self.draw_wait_seconds = new.histogram(
            "leeway_replay_draw_wait_seconds", "Seconds that DrawBatch waited for enough ready groups", "run"
        )


class InferenceServerMetrics:
    """Metrics of one inference server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        new = _Registrar(registry)
        self.tokens = new.counter("leeway_inference_tokens_total", "Tokens sampled by the engine")
        self.trajectories = new.counter(
            "leeway_inference_trajectories_total", "Trajectories that ended on this server, by outcome", "outcome"
        )
        self.active = new.gauge("leeway_inference_active_trajectories", "Trajectories being sampled or scored")
        self.policy_step = new.gauge(
            "leeway_inference_policy_step", "Optimizer step of the policy version that the engine serves"
        )
        self.weight_push_seconds = new.histogram(
            "leeway_inference_weight_push_seconds",
            "Seconds of a weight push, from its announcement to its acknowledgement",
        )
        self.weight_pause_seconds = new.histogram(
            "leeway_inference_weight_pause_seconds", "Seconds that decoding paused for a weight swap"
        )
        self.weight_stage_seconds = new.histogram(
            "leeway_inference_weight_stage_seconds",
            "Seconds of a weight push by stage: transfer, stage (apply deltas, check digests), swap (pause included)",
            "stage",
        )
        self.received_weight_bytes = new.counter(
            "leeway_inference_received_weight_bytes_total",
            "Weight bytes received, by transport and kind (snapshot or delta)",
            "transport kind",
        )
        self.weight_fallbacks = new.counter(
            "leeway_inference_weight_fallbacks_total",
            "Weight transfers that failed and fell back to another kind or transport, by what failed",
            "from",
        )
        for given_up in ("delta", "zmq", "collective"):
            self.weight_fallbacks.labels(given_up)
        self.reward_seconds = new.histogram("leeway_inference_reward_seconds", "Seconds of one reward call")
        self.reward_failures = new.counter(
            "leeway_inference_reward_failures_total",
            "Reward calls without a reward, by cause: raised, invalid (no finite number), memory, timeout, crashed",
            "cause",
        )
        for cause in ("raised", "invalid", "memory", "timeout", "crashed"):
            self.reward_failures.labels(cause)
        self.unacknowledged_items = new.gauge(
            "leeway_inference_unacknowledged_items", "Items sent to the replay buffer and not yet acknowledged"
        )
        self.ticket_wait_seconds = new.histogram(
            "leeway_inference_ticket_wait_seconds", "Seconds that the rollout worker waited for tickets"
        )


class LearnerMetrics:
    """Metrics of the learner."""

    def __init__(self, registry: CollectorRegistry) -> None:
        new = _Registrar(registry)
        self.step = new.gauge("leeway_learner_step", "Newest finished optimizer step")
        self.statistic = new.gauge(
            "leeway_learner_statistic", "Statistics of the newest optimizer step, by name", "name"
        )
        self.tag_reward = new.gauge(
            "leeway_learner_tag_reward", "Mean reward of the newest optimizer step that trained on a task tag", "tag"
        )
        self.heldout_reward = new.gauge(
            "leeway_learner_heldout_reward", "Mean held-out reward of the newest evaluation"
        )
        self.epoch = new.gauge("leeway_learner_epoch", "Epoch of this learner incarnation")
        self.trained_tokens = new.counter(
            "leeway_learner_trained_tokens_total",
            "Trained tokens by staleness in steps, rounded down to a bucket",
            "staleness",
        )
        self.batch_wait_seconds = new.histogram(
            "leeway_learner_batch_wait_seconds", "Seconds that the learner waited for a batch"
        )
        self.step_seconds = new.histogram("leeway_learner_step_seconds", "Seconds of one optimizer step")
        self.checkpoint_seconds = new.histogram("leeway_learner_checkpoint_seconds", "Seconds of one checkpoint")
        self.rejected_groups = new.counter(
            "leeway_learner_rejected_groups_total", "Groups that the learner refused to train on"
        )
        self.server_policy_step = new.gauge(
            "leeway_learner_server_policy_step", "Optimizer step of the weights that each server acknowledged", "server"
        )
        self.published_bytes = new.counter(
            "leeway_learner_published_bytes_total",
            "Weight bytes sent to servers, by transport and kind (snapshot or delta)",
            "transport kind",
        )
        self.failed_broadcasts = new.counter(
            "leeway_learner_failed_broadcasts_total",
            "Weight broadcasts that failed; their servers fetched the weights over gRPC",
        )
        self.delta_seconds = new.histogram("leeway_learner_delta_seconds", "Seconds to encode one weight delta")
        self.delta_ratio = new.gauge(
            "leeway_learner_delta_ratio",
            "Size of the newest weight delta relative to its snapshot; 1 if no delta was made",
        )
        self.server_mismatch_nats = new.gauge(
            "leeway_learner_server_mismatch_nats",
            "Mean abs(log pi - log mu) of a server's recent tokens in excess of the other servers' at equal staleness",
            "server",
        )
        self.suspect_servers = new.gauge(
            "leeway_learner_suspect_servers",
            "Servers that diverge or are slow but were not drained, because no other server works or draining is off",
        )
        self.refusing_servers = new.gauge(
            "leeway_learner_refusing_servers", "Servers that could not apply the newest weights"
        )
