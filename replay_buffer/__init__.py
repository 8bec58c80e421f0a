"""The durable replay buffer between inference servers and the learner."""
