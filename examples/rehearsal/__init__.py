"""The rehearsal's task; ../rehearsal.toml runs it."""
