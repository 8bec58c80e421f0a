"""The gRPC surface of the replay buffer."""
