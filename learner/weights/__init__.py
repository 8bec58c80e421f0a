"""Weights on their way out: what is published, announced, and by which way it travels."""
