"""Writing shards, committed whole or not at all."""
