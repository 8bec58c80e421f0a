"""Routing on the wire against its entropy."""
