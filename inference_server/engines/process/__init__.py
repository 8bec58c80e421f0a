"""Engines with processes of their own: what they share, and the interface that each of them implements."""
