"""In-memory state of a serving replay buffer, beside the durable state that the rules own."""
