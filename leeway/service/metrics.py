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
    """What the replay buffer shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.groups = Gauge("leeway_replay_groups", "Training groups by state", ["run", "state"], registry=registry)
        self.dropped_groups = Gauge(
            "leeway_replay_dropped_groups", "Training groups dropped, by reason", ["run", "reason"], registry=registry
        )
        self.oldest_group_age_seconds = Gauge(
            "leeway_replay_oldest_group_age_seconds",
            "Since the first ticket of the oldest training group in a state",
            ["run", "state"],
            registry=registry,
        )
        self.ended_groups = Counter(
            "leeway_replay_ended_groups_total",
            "Training groups ended since the start, by fate",
            ["run", "fate"],
            registry=registry,
        )
        self.ended_group_bytes = Counter(
            "leeway_replay_ended_group_bytes_total",
            "What was written of them, by fate: the length bias of what is dropped",
            ["run", "fate"],
            registry=registry,
        )
        self.dead_letters = Gauge(
            "leeway_replay_dead_letters",
            "Groups set aside whose tasks were not queued again",
            ["run"],
            registry=registry,
        )
        self.present_servers = Gauge(
            "leeway_replay_present_servers",
            "Servers that said something within a lease and are not drained",
            ["run"],
            registry=registry,
        )
        self.drained_servers = Gauge(
            "leeway_replay_drained_servers",
            "1 for each server that gets no more tickets: diverging, slow, operator",
            ["run", "server", "reason"],
            registry=registry,
        )
        self.leases = Gauge(
            "leeway_replay_leases", "Groups lent out, lapsed loans included", ["run"], registry=registry
        )
        self.head_step = Gauge("leeway_replay_head_step", "Step of the head version", ["run"], registry=registry)
        self.committed_step = Gauge(
            "leeway_replay_committed_step", "Newest step consumed for good", ["run"], registry=registry
        )
        self.epoch = Gauge("leeway_replay_epoch", "Newest learner epoch", ["run"], registry=registry)
        self.log_bytes = Gauge("leeway_replay_log_bytes", "Size of the log on disk", registry=registry)
        self.free_bytes = Gauge("leeway_replay_disk_free_bytes", "Free space on the log's disk", registry=registry)
        self.received_bytes = Gauge(
            "leeway_replay_received_bytes", "Received, not yet durable; bounded by max_pending_bytes", registry=registry
        )
        self.waiting_bytes = Gauge(
            "leeway_replay_waiting_bytes", "Part of them in streams that are slowed", registry=registry
        )
        self.stalled = Gauge("leeway_replay_log_stalled", "1 while the disk is full, else 0", registry=registry)
        self.refusals = Counter(
            "leeway_replay_refusals_total", "RESOURCE_EXHAUSTED answered, by cause", ["cause"], registry=registry
        )
        self.appended_records = Counter(
            "leeway_replay_appended_records_total", "Records made durable", registry=registry
        )
        self.appended_bytes = Counter("leeway_replay_appended_bytes_total", "Bytes made durable", registry=registry)
        self.fsync_seconds = Histogram(
            "leeway_replay_fsync_seconds", "Time of one fsync", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.issued_tickets = Counter(
            "leeway_replay_issued_tickets_total", "Tickets issued", ["run", "purpose", "server"], registry=registry
        )
        self.reissued_tickets = Counter(
            "leeway_replay_reissued_tickets_total",
            "Tickets for groups that an earlier one did not finish",
            ["run", "purpose"],
            registry=registry,
        )
        self.ticket_wait_seconds = Histogram(
            "leeway_replay_ticket_wait_seconds",
            "Wait of a call that got tickets",
            ["run"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.written_items = Counter(
            "leeway_replay_written_items_total", "Items answered, by status", ["run", "status"], registry=registry
        )
        self.written_bytes = Counter(
            "leeway_replay_written_bytes_total", "Chunks accepted", ["run", "server"], registry=registry
        )
        self.closed_trajectories = Counter(
            "leeway_replay_closed_trajectories_total", "Closes accepted", ["run", "server"], registry=registry
        )
        self.draw_wait_seconds = Histogram(
            "leeway_replay_draw_wait_seconds",
            "Wait of a draw for enough groups",
            ["run"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )


class InferenceServerMetrics:
    """What an inference server shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.tokens = Counter("leeway_inference_tokens_total", "Tokens sampled", registry=registry)
        self.trajectories = Counter(
            "leeway_inference_trajectories_total", "Trajectories ended, by outcome", ["outcome"], registry=registry
        )
        self.active = Gauge("leeway_inference_active_trajectories", "Trajectories being sampled", registry=registry)
        self.policy_step = Gauge("leeway_inference_policy_step", "Step of the version served", registry=registry)
        self.weight_push_seconds = Histogram(
            "leeway_inference_weight_push_seconds",
            "Announcement to acknowledgement",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.weight_pause_seconds = Histogram(
            "leeway_inference_weight_pause_seconds",
            "Decoding stood still for a swap",
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.weight_stage_seconds = Histogram(
            "leeway_inference_weight_stage_seconds",
            "Time of a push by stage: transfer, stage (deltas applied, digests checked), swap (its pause included)",
            ["stage"],
            buckets=_SECONDS_BUCKETS,
            registry=registry,
        )
        self.received_weight_bytes = Counter(
            "leeway_inference_received_weight_bytes_total",
            "Weight bytes received, as snapshots or deltas",
            ["transport", "kind"],
            registry=registry,
        )
        self.weight_fallbacks = Counter(
            "leeway_inference_weight_fallbacks_total",
            "Transfers given up for the next way, by what was given up: delta, zmq, collective",
            ["from"],
            registry=registry,
        )
        for given_up in ("delta", "zmq", "collective"):
            self.weight_fallbacks.labels(given_up)
        self.reward_seconds = Histogram(
            "leeway_inference_reward_seconds", "Time of one reward call", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.reward_failures = Counter(
            "leeway_inference_reward_failures_total",
            "Reward calls without a reward, by cause: raised, invalid (no finite number), memory, timeout, crashed",
            ["cause"],
            registry=registry,
        )
        for cause in ("raised", "invalid", "memory", "timeout", "crashed"):
            self.reward_failures.labels(cause)
        self.unacknowledged_items = Gauge(
            "leeway_inference_unacknowledged_items", "Writes on their way to the buffer", registry=registry
        )
        self.ticket_wait_seconds = Histogram(
            "leeway_inference_ticket_wait_seconds", "Wait for work", buckets=_SECONDS_BUCKETS, registry=registry
        )


class LearnerMetrics:
    """What the learner shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.step = Gauge("leeway_learner_step", "Newest optimizer step", registry=registry)
        self.statistic = Gauge(
            "leeway_learner_statistic", "Statistics of the newest step, by name", ["name"], registry=registry
        )
        self.heldout_reward = Gauge("leeway_learner_heldout_reward", "Newest held-out mean reward", registry=registry)
        self.epoch = Gauge("leeway_learner_epoch", "This incarnation of the learner", registry=registry)
        self.trained_tokens = Counter(
            "leeway_learner_trained_tokens_total",
            "Tokens in the loss, by staleness in steps (rounded down to a bucket)",
            ["staleness"],
            registry=registry,
        )
        self.batch_wait_seconds = Histogram(
            "leeway_learner_batch_wait_seconds", "Wait for a batch", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.step_seconds = Histogram(
            "leeway_learner_step_seconds", "Time of one training step", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.checkpoint_seconds = Histogram(
            "leeway_learner_checkpoint_seconds", "Time of one checkpoint", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.rejected_groups = Counter(
            "leeway_learner_rejected_groups_total", "Groups that could not be trained on", registry=registry
        )
        self.server_policy_step = Gauge(
            "leeway_learner_server_policy_step", "Step acknowledged by each server", ["server"], registry=registry
        )
        self.published_bytes = Counter(
            "leeway_learner_published_bytes_total",
            "Weight bytes sent to servers, as snapshots or deltas",
            ["transport", "kind"],
            registry=registry,
        )
        self.failed_broadcasts = Counter(
            "leeway_learner_failed_broadcasts_total",
            "Broadcasts that were given up, whose servers fetched over gRPC",
            registry=registry,
        )
        self.delta_seconds = Histogram(
            "leeway_learner_delta_seconds", "Time to encode one delta", buckets=_SECONDS_BUCKETS, registry=registry
        )
        self.delta_ratio = Gauge(
            "leeway_learner_delta_ratio", "Newest delta's bytes over its snapshot's; 1 without one", registry=registry
        )
        self.server_mismatch_nats = Gauge(
            "leeway_learner_server_mismatch_nats",
            "Mean distance of log pi and log mu of a server's recent tokens beyond the others' at equal staleness",
            ["server"],
            registry=registry,
        )
        self.suspect_servers = Gauge(
            "leeway_learner_suspect_servers",
            "Servers that diverge or are slow and were not drained: nobody else is at work, or it is turned off",
            registry=registry,
        )
        self.refusing_servers = Gauge(
            "leeway_learner_refusing_servers", "Servers that could not apply the newest weights", registry=registry
        )
