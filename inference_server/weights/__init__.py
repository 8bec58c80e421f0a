"""Receiving weights: announced, fetched, staged, verified, applied."""
