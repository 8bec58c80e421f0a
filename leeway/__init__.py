"""What the services of Leeway share."""
