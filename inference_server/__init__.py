"""Inference servers: an engine behind the contract, and the rollout worker that feeds a run from it."""
