"""The policy losses, one file each; `leeway.config.algorithms` lists them by name."""
