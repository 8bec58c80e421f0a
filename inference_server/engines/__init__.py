"""Engines, each behind the Protocol of `inference_server.engine`."""
