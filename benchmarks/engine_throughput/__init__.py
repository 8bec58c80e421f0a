"""Leeway's inference server beside the engine that it serves."""
