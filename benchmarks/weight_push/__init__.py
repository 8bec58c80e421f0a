"""What a weight push costs; see benchmarks/weight_push/__main__.py."""
