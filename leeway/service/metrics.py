"""Every Prometheus metric of Leeway, in one place: prefix `leeway_`, base units, bounded labels.

Each service makes its own set on its own registry and serves it with `serve_metrics`. No label is ever a trajectory,
a group or a version.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from leeway.errors import ConfigError

STALENESS_BUCKETS: Final = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
_SECONDS_BUCKETS: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


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
        self.groups = Gauge(
            "leeway_replay_groups", "Training groups held by the buffer, by state", ["run", "state"], registry=registry
        )
        self.dropped_groups = Gauge(
            "leeway_replay_dropped_groups",
            "Training groups dropped so far, by reason",
            ["run", "reason"],
            registry=registry,
        )
        self.oldest_group_age_seconds = Gauge(
            "leeway_replay_oldest_group_age_seconds",
            "Age in seconds of the oldest training group, by state",
            ["run", "state"],
            registry=registry,
        )
        self.ended_groups = Counter(
            "leeway_replay_ended_groups_total",
            "Training groups consumed or dropped since the service started",
            ["run", "fate"],
            registry=registry,
        )
        self.ended_group_bytes = Counter(
            "leeway_replay_ended_group_bytes_total",
            "Bytes written for ended training groups; dropped groups larger than consumed ones show a length bias",
            ["run", "fate"],
            registry=registry,
        )
        self.dead_letters = Gauge(
            "leeway_replay_dead_letters",
            "Dead letters: groups that failed for good and were not queued again",
            ["run"],
            registry=registry,
        )
        self.present_servers = Gauge(
            "leeway_replay_present_servers",
            "Inference servers that called within the last lease_seconds and are not drained",
            ["run"],
            registry=registry,
        )
        self.drained_servers = Gauge(
            "leeway_replay_drained_servers",
            "1 for each drained server, which gets no more tickets, by reason",
            ["run", "server", "reason"],
            registry=registry,
        )
        self.leases = Gauge(
            "leeway_replay_leases",
            "Groups under a ticket, including those whose lease has lapsed",
            ["run"],
            registry=registry,
        )
        self.head_step = Gauge(
            "leeway_replay_head_step",
            "Optimizer step of the newest registered policy version",
            ["run"],
            registry=registry,
        )
        self.committed_step = Gauge(
            "leeway_replay_committed_step",
            "Newest optimizer step that the learner has committed",
            ["run"],
            registry=registry,
        )
        self.epoch = Gauge("leeway_replay_epoch", "Epoch of the newest learner incarnation", ["run"], registry=registry)
        self.log_bytes = Gauge("leeway_replay_log_bytes", "Size of the log on disk", registry=registry)
        self.free_bytes = Gauge("leeway_replay_disk_free_bytes", "Free space on the log's disk", registry=registry)
        self.received_bytes = Gauge(
            "leeway_replay_received_bytes",
            "Bytes received and not yet durable; replay_buffer.max_pending_bytes is the bound",
            registry=registry,
        )
        self.waiting_bytes = Gauge(
            "leeway_replay_waiting_bytes", "Bytes held in write streams that are being throttled", registry=registry
        )
        self.stalled = Gauge(
            "leeway_replay_log_stalled",
            "1 while the log cannot be written because the disk is full, else 0",
            registry=registry,
        )
        self.refusals = Counter(
            "leeway_replay_refusals_total",
            "Calls and items refused with RESOURCE_EXHAUSTED, by cause",
            ["cause"],
            registry=registry,
        )
        self.appended_records = Counter(
            "leeway_replay_appended_records_total", "Log records made durable", registry=registry
        )
        self.appended_bytes = Counter("leeway_replay_appended_bytes_total", "Log bytes made durable", registry=registry)
        self.fsync_seconds = Histogram(
            "leeway_replay_fsync_seconds",
            "Seconds of one fsync of the log",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.issued_tickets = Counter(
            "leeway_replay_issued_tickets_total",
            "Tickets issued to inference servers",
            ["run", "purpose", "server"],
            registry=registry,
        )
        self.reissued_tickets = Counter(
            "leeway_replay_reissued_tickets_total",
            "Tickets issued again because an earlier ticket did not finish the group",
            ["run", "purpose"],
            registry=registry,
        )
        self.ticket_wait_seconds = Histogram(
            "leeway_replay_ticket_wait_seconds",
            "Seconds that a successful AcquireTickets call waited",
            ["run"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.written_items = Counter(
            "leeway_replay_written_items_total",
            "Written items answered, by status",
            ["run", "status"],
            registry=registry,
        )
        self.written_bytes = Counter(
            "leeway_replay_written_bytes_total",
            "Bytes of accepted trajectory chunks",
            ["run", "server"],
            registry=registry,
        )
        self.closed_trajectories = Counter(
            "leeway_replay_closed_trajectories_total", "Trajectories closed", ["run", "server"], registry=registry
        )
        self.draw_wait_seconds = Histogram(
            "leeway_replay_draw_wait_seconds",
            "Seconds that DrawBatch waited for enough ready groups",
            ["run"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )


class InferenceServerMetrics:
    """Metrics of one inference server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = Counter("leeway_inference_tokens_total", "Tokens sampled by the engine", registry=registry)
        self.trajectories = Counter(
            "leeway_inference_trajectories_total",
            "Trajectories that ended on this server, by outcome",
            ["outcome"],
            registry=registry,
        )
        self.active = Gauge(
            "leeway_inference_active_trajectories", "Trajectories being sampled or scored", registry=registry
        )
        self.policy_step = Gauge(
            "leeway_inference_policy_step",
            "Optimizer step of the policy version that the engine serves",
            registry=registry,
        )
        self.weight_push_seconds = Histogram(
            "leeway_inference_weight_push_seconds",
            "Seconds of a weight push, from its announcement to its acknowledgement",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.weight_pause_seconds = Histogram(
            "leeway_inference_weight_pause_seconds",
            "Seconds that decoding paused for a weight swap",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.weight_stage_seconds = Histogram(
            "leeway_inference_weight_stage_seconds",
            "Seconds of a weight push by stage: transfer, stage (apply deltas, check digests), swap (pause included)",
            ["stage"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.received_weight_bytes = Counter(
            "leeway_inference_received_weight_bytes_total",
            "Weight bytes received, by transport and kind (snapshot or delta)",
            ["transport", "kind"],
            registry=registry,
        )
        self.weight_fallbacks = Counter(
            "leeway_inference_weight_fallbacks_total",
            "Weight transfers that failed and fell back to another kind or transport, by what failed",
            ["from"],
            registry=registry,
        )
        for given_up in ("delta", "zmq", "collective"):
            self.weight_fallbacks.labels(given_up)
        self.reward_seconds = Histogram(
            "leeway_inference_reward_seconds", "Seconds of one reward call", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.unacknowledged_items = Gauge(
            "leeway_inference_unacknowledged_items",
            "Items sent to the replay buffer and not yet acknowledged",
            registry=registry,
        )
        self.ticket_wait_seconds = Histogram(
            "leeway_inference_ticket_wait_seconds",
            "Seconds that the rollout worker waited for tickets",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )


class LearnerMetrics:
    """Metrics of the learner."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.step = Gauge("leeway_learner_step", "Newest finished optimizer step", registry=registry)
        self.statistic = Gauge(
            "leeway_learner_statistic", "Statistics of the newest optimizer step, by name", ["name"], registry=registry
        )
        self.heldout_reward = Gauge(
            "leeway_learner_heldout_reward", "Mean held-out reward of the newest evaluation", registry=registry
        )
        self.epoch = Gauge("leeway_learner_epoch", "Epoch of this learner incarnation", registry=registry)
        self.trained_tokens = Counter(
            "leeway_learner_trained_tokens_total",
            "Trained tokens by staleness in steps, rounded down to a bucket",
            ["staleness"],
            registry=registry,
        )
        self.batch_wait_seconds = Histogram(
            "leeway_learner_batch_wait_seconds",
            "Seconds that the learner waited for a batch",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.step_seconds = Histogram(
            "leeway_learner_step_seconds", "Seconds of one optimizer step", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.checkpoint_seconds = Histogram(
            "leeway_learner_checkpoint_seconds",
            "Seconds of one checkpoint",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.rejected_groups = Counter(
            "leeway_learner_rejected_groups_total", "Groups that the learner refused to train on", registry=registry
        )
        self.server_policy_step = Gauge(
            "leeway_learner_server_policy_step",
            "Optimizer step of the weights that each server acknowledged",
            ["server"],
            registry=registry,
        )
        self.published_bytes = Counter(
            "leeway_learner_published_bytes_total",
            "Weight bytes sent to servers, by transport and kind (snapshot or delta)",
            ["transport", "kind"],
            registry=registry,
        )
        self.failed_broadcasts = Counter(
            "leeway_learner_failed_broadcasts_total",
            "Weight broadcasts that failed; their servers fetched the weights over gRPC",
            registry=registry,
        )
        self.delta_seconds = Histogram(
            "leeway_learner_delta_seconds",
            "Seconds to encode one weight delta",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.delta_ratio = Gauge(
            "leeway_learner_delta_ratio",
            "Size of the newest weight delta relative to its snapshot; 1 if no delta was made",
            registry=registry,
        )
        self.server_mismatch_nats = Gauge(
            "leeway_learner_server_mismatch_nats",
            "Mean abs(log pi - log mu) of a server's recent tokens in excess of the other servers' at equal staleness",
            ["server"],
            registry=registry,
        )
        self.suspect_servers = Gauge(
            "leeway_learner_suspect_servers",
            "Servers that diverge or are slow but were not drained, because no other server works or draining is off",
            registry=registry,
        )
        self.refusing_servers = Gauge(
            "leeway_learner_refusing_servers", "Servers that could not apply the newest weights", registry=registry
        )
