"""Generated from proto/leeway/v1; do not edit."""
