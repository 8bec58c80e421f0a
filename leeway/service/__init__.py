"""What every service process needs: signals and exit codes, ports, metrics, durable files, user functions."""
