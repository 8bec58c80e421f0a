"""Tasks and models to start from."""
