"""Names of a record's members: the files of one webdataset sample."""

from __future__ import annotations

JSON = "json"
CONDITIONING = "conditioning.safetensors"
ROLLOUT = "rollout.safetensors"
GLYPHS = "glyphs.png"
POSITIONS = "positions.png"
PREDICTIONS = "x0.safetensors"
MEMBERS = (JSON, CONDITIONING, ROLLOUT, GLYPHS, POSITIONS, PREDICTIONS)
"""In the order in which they stand in a shard: what training reads is contiguous."""
REQUIRED_MEMBERS = MEMBERS[:-1]
