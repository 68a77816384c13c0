"""What a set and a training cost, by the benchmarks' constants: the tables of docs/scaling.md.

    python bench/scaling.py                       AnyWord-3M with configs/sd15.toml
    python bench/scaling.py --rate 410 --images 500000 --config my.toml --slice-hours 12

A model, and no measurement: it multiplies what was measured on one GPU.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.config import PROJECT_ROOT, Config, load_config
from common.scripts import make_parser, run_script
from shards.records.size import SIDECAR_BYTES, estimate_record_bytes

ANYWORD = 3_034_486
"""Images of AnyWord-3M."""
ROWS_PER_SECOND = 225.0
"""UNet rows a second of `precompute` with configs/sd15.toml on an H100, bfloat16, 16 rows side by side."""
TRAIN_SAMPLES_PER_SECOND = 16 / 0.345
"""Of `train` on an H100: steps of 16 samples, rank 64, took 0.318 to 0.371 s."""
WRITENET_ROWS = 2
"""WriteNet runs once an image and branch. A third of a UNet row each; counted as whole ones."""
START_SECONDS = 120.0
"""Imports, reading and hashing a checkpoint of 6 GB: a guess, for file systems differ."""
GPUS_PER_NODE = 8
PART_BYTES = 50 * 2**20
"""s3fs sends and fetches larger files in parts of this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What is multiplied."""

    config: Config
    images: int = ANYWORD
    rate: float = ROWS_PER_SECOND
    slice_hours: float = 4.0

    @property
    def rows(self) -> int:
        """UNet rows an image: every step twice, for guidance, and WriteNet's."""
        settings = self.config.precompute
        return settings.num_rollouts * 2 * settings.solver_steps + WRITENET_ROWS

    @property
    def shards(self) -> int:
        """Of the set."""
        return -(-self.images // self.config.shards.samples_per_shard)

    @property
    def shard_bytes(self) -> int:
        """Of a full shard."""
        return estimate_record_bytes(self.config) * self.config.shards.samples_per_shard

    @property
    def shard_seconds(self) -> float:
        """That one GPU takes for a shard."""
        return self.config.shards.samples_per_shard * self.rows / self.rate

    @property
    def set_bytes(self) -> int:
        """Of shards and sidecars."""
        return self.images * (estimate_record_bytes(self.config) + SIDECAR_BYTES)

    def hours(self, gpus: int) -> float:
        """Of `precompute`: its rows, and of each slice the start and half a shard that is made again."""
        useful = self.images * self.rows / self.rate / 3600
        lost = (START_SECONDS + self.shard_seconds / 2) / 3600
        return useful / gpus * self.slice_hours / (self.slice_hours - lost)

    def slices(self, gpus: int) -> int:
        """Slices that each GPU's tasks are cut into."""
        return math.ceil(self.hours(gpus) / self.slice_hours)


def upload_requests(shard_bytes: int) -> int:
    """Return the requests that send one shard: two look for its sidecar, and what is sent is looked at again."""
    parts = -(-shard_bytes // PART_BYTES)
    return 2 + (parts + 2 if parts > 1 else 1) + 1 + 2


def download_requests(shard_bytes: int) -> int:
    """Return the requests that a node fetches one shard with: its parts and one more, its sidecar's two halves."""
    parts = -(-shard_bytes // PART_BYTES)
    return parts + 1 + 2


def precompute_table(assumed: Assumed) -> list[str]:
    """Return the table of `precompute`, in Markdown."""
    lines = [
        "| GPUs | hours | slices a GPU | a shard every | set | files | requests of `--upload` |",
        "| --- " * 7 + "|",
    ]
    files = 2 * assumed.shards
    requests = assumed.shards * upload_requests(assumed.shard_bytes)
    for gpus in (1, 8, 64):
        every = assumed.shard_seconds / gpus
        lines.append(
            f"| {gpus} | {assumed.hours(gpus):,.1f} | {assumed.slices(gpus)} | {every:.1f} s"
            f" | {assumed.set_bytes / 1e12:.2f} TB | {files:,} | {requests:,} |"
        )
    return lines


def train_table(assumed: Assumed) -> list[str]:
    """Return the table of one epoch of `train`, in Markdown."""
    lines = ["| GPUs | nodes | hours an epoch | read from a bucket | requests |", "| --- " * 5 + "|"]
    for gpus in (1, 8, 64):
        nodes = -(-gpus // GPUS_PER_NODE)
        hours = assumed.images / TRAIN_SAMPLES_PER_SECOND / gpus / 3600
        requests = nodes * assumed.shards * download_requests(assumed.shard_bytes)
        lines.append(
            f"| {gpus} | {nodes} | {hours:.1f} | {nodes * assumed.set_bytes / 1e12:.1f} TB | {requests:,} |"
        )
    return lines


def slice_table(assumed: Assumed) -> list[str]:
    """Return what of a slice is lost, by its length and the size of a shard, in Markdown."""
    hours = (0.5, 1.0, 4.0, 12.0)
    lines = ["| samples a shard | a shard takes | " + " | ".join(f"{each:g} h" for each in hours) + " |"]
    lines.append("| --- " * (2 + len(hours)) + "|")
    for samples in (64, 256, 1024):
        seconds = samples * assumed.rows / assumed.rate
        lost = [(START_SECONDS + seconds / 2) / (each * 3600) for each in hours]
        lines.append(f"| {samples} | {seconds:.0f} s | " + " | ".join(f"{share:.1%}" for share in lost) + " |")
    return lines


def report(assumed: Assumed) -> str:
    """Return all tables with their headings, as docs/scaling.md holds them."""
    record = estimate_record_bytes(assumed.config)
    return "\n".join(
        [
            f"{assumed.images:,} images x {assumed.rows} rows at {assumed.rate:g} rows/s;"
            f" {record / 1e3:.0f} KB a record, {assumed.shards:,} shards of {assumed.shard_bytes / 1e6:.0f} MB;"
            f" slices of {assumed.slice_hours:g} h that take {START_SECONDS:g} s to start.",
            "",
            *precompute_table(assumed),
            "",
            f"An epoch of training, {TRAIN_SAMPLES_PER_SECOND:.0f} samples/s a GPU, {GPUS_PER_NODE} GPUs a node:",
            "",
            *train_table(assumed),
            "",
            "Share of a slice that is lost to its start and to the shard that its end cuts:",
            "",
            *slice_table(assumed),
        ]
    )


def main() -> None:
    """Print the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "configs" / "sd15.toml")
    parser.add_argument("--images", type=int, default=ANYWORD)
    parser.add_argument("--rate", type=float, default=ROWS_PER_SECOND, help="UNet rows a second of one GPU")
    parser.add_argument("--slice-hours", type=float, default=4.0)
    options = parser.parse_args()
    config = load_config(options.config)
    print(
        report(Assumed(config=config, images=options.images, rate=options.rate, slice_hours=options.slice_hours))
    )


if __name__ == "__main__":
    run_script(main)
