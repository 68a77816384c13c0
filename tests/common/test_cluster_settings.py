from __future__ import annotations

from pathlib import Path

import pytest

from common.cluster_settings import ClusterConfig, parse_time
from common.config import load_config
from common.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("2-0", 172800),
        ("1-06:30", 109800),
        ("1-00:00:01", 86401),
    ],
)
def test_times_are_those_of_sbatch(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("partion='x'", r"unknown key cluster.partion; did you mean partition\?"),
        ("time='soon'", "cluster.time: received 'soon', expected a time as sbatch takes it"),
        ("time='1:59'", r"expected more than the 120 s ahead .* \(cluster.batch_seconds, 60\) and 60 s"),
        ("time='00:20:00'\nbatch_seconds=1140", "expected more than the 1200 s"),
        ("memory='32'", "cluster.memory: received '32', expected a number with K, M, G or T"),
        ("threads=5", r"cluster.threads: received 5, expected at most cluster.cpus \(4\)"),
        ("gpus=2", "cluster.gpus: received 2, expected at most 1"),
        ("volumes={shards='x'}", "cluster.volumes: received 'shards', expected absolute folders"),
        ("system='pbs'", "'slurm' or 'kubernetes'"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(tmp_path: Path, setting: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f"[cluster]\n{setting}\n")
    with pytest.raises(UsageError, match=said):
        load_config(path)


def test_a_time_needs_no_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[cluster]\ntime = 04:00:00\n")
    assert load_config(path).cluster.time == "04:00:00"
    assert load_config(None, ["cluster.time=00:30:00"]).cluster.time_seconds == 1800
    assert load_config(None, ["cluster.time=90"]).cluster.time_seconds == 5400


def test_the_warning_comes_one_batch_and_a_minute_ahead() -> None:
    assert ClusterConfig(batch_seconds=12.5).warning_seconds == 73
    assert (ClusterConfig(cpus=8).pinned_threads, ClusterConfig(cpus=8, threads=2).pinned_threads) == (8, 2)
