"""The ways that weights take, by [network]: what learner and servers must read alike. Torch-free."""

from __future__ import annotations

import importlib.util
from typing import Final

from leeway.config import NetworkOptions
from leeway.errors import ConfigError
from leeway.rpc import is_loopback

_EVERYWHERE: Final = ("0.0.0.0", "[::]", "*")  # noqa: S104 (refused)


def uses_zeromq(network: NetworkOptions) -> bool:
    """Whether the learner offers weights to its own host over ZeroMQ."""
    return network.weights == "zmq" or (network.weights == "auto" and is_loopback(network.policy))


def uses_broadcasts(network: NetworkOptions) -> bool:
    """Whether the learner broadcasts weights to all servers at once.

    Raises:
        ConfigError: it is configured to, and cannot.
    """
    if network.weights != "collective":
        return False
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            f'network.weights: "{network.weights}" needs torch in every process that sends or takes weights; install '
            'it or set "grpc"'
        )
    if network.policy.rpartition(":")[0] in _EVERYWHERE:
        raise ConfigError(
            f"network.policy: {network.policy} names no host at which broadcasts could meet; name one, or set "
            'network.weights = "grpc"'
        )
    if not (is_loopback(network.policy) or network.insecure):
        raise ConfigError(
            f'network.weights: "{network.weights}" would send weights beyond this host unencrypted (digests still '
            'guard every byte); set network.insecure = true if that network is yours alone, or "grpc"'
        )
    return True
