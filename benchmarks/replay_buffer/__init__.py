"""What durability costs: the replay buffer beside a bare gRPC stream, Reverb and Redis, in one run.

workload        trajectories of 7 KB to 9 MB
contenders      insert and draw, measured the same way for each
processes       their servers, and the environments of the peers
throughput, tokens, recovery, growth    the four measurements
report          tables and verdicts
"""
