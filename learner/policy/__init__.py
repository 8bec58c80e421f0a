"""The model that is trained: loading, output head, routing replay, adapters."""
