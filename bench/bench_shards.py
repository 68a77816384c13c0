"""Reading, checking, writing and opening shards, each beside what one would do otherwise, in one run.

    python bench/bench_shards.py            everything (a minute or two)
    python bench/bench_shards.py --part loader|verify|writer|opening

Records have the real model's sizes: 512 px, contexts 768 wide, 8 stored states, predictions stored.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import safetensors.torch
import torch
import webdataset as wds

from common.anytext2.conditioning import Uncond
from common.scripts import make_parser, run_script
from shards.files.manifest import create_or_check
from shards.files.names import sidecar_name
from shards.files.sidecar import Entry, Member, SidecarHeader, encode_sidecar
from shards.looking.verify import verify_set
from shards.reading.order import EpochOrder
from shards.reading.reader import ShardSet
from shards.records.codec import encode_record
from shards.records.members import CONDITIONING, ROLLOUT
from shards.records.meta import SampleMeta
from shards.records.record import Record
from shards.writing.writer import ShardWriter

WIDTH, CHANNELS, SIDE, LATENT, STEPS = 768, 4, 512, 64, 8
PER_SHARD, SHARDS, ROUNDS = 32, 8, 5


def make_record(number: int) -> Record:
    """Make a record of real size with random values and a plausible layout."""
    g = torch.Generator().manual_seed(number)

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).half()

    latent = (CHANNELS, LATENT, LATENT)
    positions = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    positions[:, 100:180, 60:400] += 1
    positions[:, 160:260, 200:480] += 1
    glyphs = (
        (torch.rand(1, SIDE // 8, SIDE // 8, generator=g) > 0.6).repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    meta = SampleMeta(
        input_id=f"{number:032x}",
        caption="a shop front at night with a neon sign, best quality, extremely detailed",
        text_caption="Text says * , * . ",
        texts=("OPEN", "ALL NIGHT"),
        languages=("Latin", "Latin"),
        polygons=(
            ((60, 100), (400, 100), (400, 180), (60, 180)),
            ((200, 160), (480, 160), (480, 260), (200, 260)),
        ),
        mode="generate",
        source="rollout",
        seeds=(number,),
        size=(SIDE, SIDE),
        guidance_scale=7.5,
    )
    return Record(
        meta=meta,
        image_context=half(77, WIDTH),
        text_context=half(77, WIDTH),
        masked_latents=half(*latent),
        rollout_latents=half(1, STEPS + 1, *latent),
        rollout_timesteps=torch.arange(999, 0, -125),
        glyphs=(glyphs & (positions > 0)).byte(),
        positions=positions,
        x0_cond=half(1, STEPS, *latent),
        x0_uncond=half(1, STEPS, *latent),
    )


def join(folder: Path) -> str:
    """Make an empty set; returns its identity's hash."""
    context = torch.zeros(77, WIDTH).half()
    uncond = Uncond(image_context=context, text_context=context)
    return create_or_check(folder, {"bench": 1}, {}, lambda: uncond)[0].identity_sha256


def write_set(folder: Path) -> None:
    """Write SHARDS shards."""
    identity = join(folder)
    for shard in range(SHARDS):
        with ShardWriter(folder, shard, identity_sha256=identity, provenance={}) as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                writer.add(number, make_record(number))
            writer.commit()


def rate(run: Callable[[], Iterable[Any]]) -> float:
    """Return items per second of one pass."""
    start = time.perf_counter()
    count = sum(1 for _ in run())
    return count / (time.perf_counter() - start)


def compare(name: str, ours: Callable[[], float], theirs: Callable[[], float], aim: float) -> None:
    """Alternate two measurements and print medians and the median of the ratios of neighbouring ones."""
    pairs = [(ours(), theirs()) for _ in range(ROUNDS)]
    left, right = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{name:<44}{left:>12.0f}{right:>14.0f}{ratio:>8.2f}x   (aim {aim})")


def bench_loader(folder: Path) -> None:
    """Our reader, crc checks included, against webdataset's streaming; one process each, page cache warm."""
    print(f"\n{'records per second':<44}{'ours':>12}{'webdataset':>14}")
    shards = ShardSet.open(folder)
    urls = [str(path) for path in sorted(folder.glob("shard-*.tar"))]
    decode = wds.handle_extension("safetensors", safetensors.torch.load)

    def shuffled_indices() -> Iterator[int]:
        order = EpochOrder(shards.counts, set_hash=shards.set_hash, seed=0, epoch=0, window_shards=8)
        return iter(order.indices(0, len(order)).tolist())

    def whole(shuffle: bool) -> Callable[[], Iterable[Any]]:
        def stream() -> Iterable[Any]:
            dataset = wds.WebDataset(urls, shardshuffle=len(urls) if shuffle else False)
            return (dataset.shuffle(256) if shuffle else dataset).decode(decode, "l8")

        return stream

    def tensors() -> Iterator[Any]:
        for sample in wds.WebDataset(urls, shardshuffle=False):
            yield [safetensors.torch.load(sample[name]) for name in (CONDITIONING, ROLLOUT)]

    members = (CONDITIONING, ROLLOUT)
    ours: dict[str, Callable[[], Iterable[Any]]] = {
        "whole records, in order": lambda: iter(shards),
        "whole records, shuffled": lambda: (shards[i] for i in shuffled_indices()),
        "only its tensors, in order": lambda: (shards.arrays(i, members) for i in range(len(shards))),
        "only its tensors, shuffled": lambda: (shards.arrays(i, members) for i in shuffled_indices()),
    }
    theirs = (whole(shuffle=False), whole(shuffle=True), tensors, tensors)
    for (name, run), other, aim in zip(ours.items(), theirs, (1.5, 1.5, 3, 3), strict=True):
        compare(name, partial(rate, run), partial(rate, other), aim)


def bench_verify(folder: Path) -> None:
    """`verify` against sha256sum on the same files."""
    paths = [str(path) for path in sorted(folder.glob("shard-*.tar"))]
    size = sum(Path(path).stat().st_size for path in paths)
    shards = ShardSet.open(folder)
    print(f"\n{'verify, ' + format(size / 1e6, '.0f') + ' MB':<44}{'ours':>12}{'sha256sum':>14}")

    def timed(action: Callable[[], object]) -> float:
        start = time.perf_counter()
        action()
        return size / (time.perf_counter() - start) / 1e6

    def check(threads: int) -> None:
        assert not list(verify_set(shards, threads))

    def sha256sum() -> object:
        return subprocess.run(["sha256sum", *paths], stdout=subprocess.DEVNULL, check=True)

    for threads, label in ((1, "one thread, MB/s"), (0, "a thread per core, MB/s")):
        compare(label, partial(timed, partial(check, threads)), partial(timed, sha256sum), 0.8)


def bench_writer(folder: Path) -> None:
    """What the writer costs a record: encoding alone, and all of it with fsync, reading back and commit."""
    identity = join(folder)
    records = [make_record(number) for number in range(PER_SHARD)]
    encode, whole = [], []
    for shard in range(ROUNDS):
        start = time.perf_counter()
        for record in records:
            encode_record(record)
        encode.append((time.perf_counter() - start) / PER_SHARD)
        start = time.perf_counter()
        with ShardWriter(folder, shard, identity_sha256=identity, provenance={}) as writer:
            for number, record in enumerate(records):
                writer.add(shard * PER_SHARD + number, record)
            writer.commit()
        whole.append((time.perf_counter() - start) / PER_SHARD)
    cost = statistics.median(whole)
    print(f"\nwriter, a record of {SIDE} px with predictions: encode {statistics.median(encode) * 1e3:.1f} ms;")
    print(
        f"with fsync, read-back and commit {cost * 1e3:.1f} ms: below 2% of stage one where a record takes it more"
    )
    print(f"than {cost / 0.02:.2f} s (bench_precompute.py measures the share on the embedded teacher)")


def bench_opening(folder: Path, samples: int = 1_000_000, per_shard: int = 256) -> None:
    """Open a set of a million samples (sidecars made for it) and seek to its middle."""
    shards, identity = -(-samples // per_shard), join(folder)
    entries_of = [
        Member(name=name, offset=512, length=1000, crc32c=123456789)
        for name in ("json", CONDITIONING, ROLLOUT, "glyphs.png", "positions.png")
    ]
    ranges = {name: [-4.0, 4.0, 1e6, 1e6] for name in ("image_context", "text_context", "rollout_latents")}
    for shard in range(shards):
        name = f"shard-{shard:06d}.tar"
        (folder / name).touch()
        with (folder / name).open("r+b") as file:
            file.truncate(10**8)  # a hole: takes no space
        keys = range(shard * per_shard, min((shard + 1) * per_shard, samples))
        header = SidecarHeader(
            shard=name, identity_sha256=identity, count=len(keys), failed=0, bytes=10**8, sha256="0" * 64,
            ranges=ranges, provenance={"device": "gpu", "packages": {f"p{i}": "1.2.3" for i in range(8)}},
            table_crc32c="",
        )  # fmt: skip
        entries = [Entry(key=f"{key:09d}", members=tuple(entries_of)) for key in keys]
        (folder / sidecar_name(name)).write_bytes(encode_sidecar(header, entries))
    code = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "import shards.reading.loader\n"  # what training has imported anyway
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1024\n"
        "base = peak(); start = time.perf_counter()\n"
        "from shards.reading.reader import ShardSet\n"
        f"found = ShardSet.open({str(folder)!r}); opened = time.perf_counter() - start\n"
        "from shards.reading.order import EpochOrder\n"
        "order = EpochOrder(found.counts, set_hash=found.set_hash, seed=0, epoch=3, window_shards=8)\n"
        "index = int(order.indices(len(found) // 2, len(found) // 2 + 1)[0])\n"
        "key = found.key(index); seconds = time.perf_counter() - start\n"
        "print(f'{len(found):,} samples: opened in {opened:.2f} s, middle of epoch 3 (sample {key}) after '\n"
        "      f'{seconds:.2f} s (aim 2 s), {peak() - base:.0f} MB on top of the imports, {peak():.0f} MB '\n"
        "      'in all (aim 1 GB)')\n"
    )
    print(flush=True)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def main() -> None:
    """Run the parts asked for in a temporary folder."""
    parser = make_parser(__doc__)
    parser.add_argument("--part", choices=["loader", "verify", "writer", "opening"])
    part = parser.parse_args().part
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="bench-shards-"))
    try:
        if part in (None, "loader", "verify"):
            write_set(root / "set")
        if part in (None, "loader"):
            bench_loader(root / "set")
        if part in (None, "verify"):
            bench_verify(root / "set")
        if part in (None, "writer"):
            bench_writer(root / "writer")
        if part in (None, "opening"):
            bench_opening(root / "large")
    finally:
        shutil.rmtree(root)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    run_script(main)
