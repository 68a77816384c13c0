"""From rendered inputs to committed shards: recorder, shard maker, shares, identity."""
