from __future__ import annotations

from pathlib import Path

import pytest

from common.config import load_config
from shards.records.size import estimate_record_bytes
from tests.stage1_teacher.small_teacher import write_teacher


@pytest.mark.parametrize("predictions", ["false", "true"])
def test_the_estimate_is_that_of_a_set(tmp_path: Path, predictions: str) -> None:
    from stage1_teacher.precompute import precompute
    from tests.stage1_teacher.small_teacher import write_prompts

    overrides = [
        "shards.samples_per_shard=4",
        f"precompute.store_predictions={predictions}",
        "precompute.num_rollouts=3",
    ]
    config = load_config(write_teacher(tmp_path), overrides)
    precompute(config, tmp_path / "set", prompts=[write_prompts(tmp_path / "p.jsonl", 4)])
    (shard,) = (tmp_path / "set").glob("*.tar")
    # Small members are estimated for pictures of 512 pixels, and a tar ends with up to 10 KB of zeros.
    assert shard.stat().st_size == pytest.approx(4 * estimate_record_bytes(config), abs=4 * 4096 + 10240)


def test_a_record_of_the_released_model_takes_half_a_megabyte() -> None:
    root = Path(__file__).parents[3]
    config = load_config(root / "configs" / "sd15.toml")
    context, latents = 77 * 768 * 2, 4 * 64 * 64 * 2
    exact = 2 * context + latents + 9 * latents
    assert estimate_record_bytes(config) == pytest.approx(exact, rel=0.02)
