"""The rollout worker: tickets in, scored trajectories out."""
