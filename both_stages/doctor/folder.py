"""What a set's folder can do: the file system's operations that commits rest on, and its space."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from both_stages.doctor.finding import Finding, examine, warning, well
from common.config import Config
from common.errors import DataError, MachineError, reason
from common.faults import naming
from common.files import fsync_dir, write_bytes_atomic
from shards.files.manifest import read_manifest
from shards.files.plan import read_outline
from shards.looking.status import read_status
from shards.records.size import SIDECAR_BYTES, estimate_record_bytes

_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def check_folder(folder: Path) -> Iterator[Finding]:
    """Try a folder, or the nearest above it that is there, in a temporary folder that is removed."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    try:
        with naming(place):
            trial = Path(tempfile.mkdtemp(prefix=".doctor-", dir=place))
    except OSError as error:
        message = (
            f"{place}: nothing can be made there ({reason(error)}); give this user the right, or choose another"
        )
        yield Finding(check="folder", level="fault", said=message, exit_code=MachineError.exit_code)
        return
    try:
        yield from examine("rename", lambda: _check_rename(trial, place))
        yield from examine("hard links", lambda: _check_links(trial, place))
        yield from examine("flock", lambda: _check_flock(trial, place))
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _check_rename(trial: Path, place: Path) -> Iterator[Finding]:
    file = trial / "renamed"
    for content in (b"first", b"second"):
        write_bytes_atomic(file, content)
    if file.read_bytes() != b"second":
        raise MachineError(
            f"{place}: a file that was renamed over another reads as the other; choose another folder"
        )
    fsync_dir(trial)
    yield well("rename", f"{place}: a file takes another's place at once, and is on disk")


def _check_links(trial: Path, place: Path) -> Iterator[Finding]:
    file, link = trial / "file", trial / "link"
    file.write_bytes(b"whole")
    try:
        os.link(file, link)
    except OSError as error:
        raise MachineError(
            f"{place}: no hard links ({reason(error)}), by which tasks commit; choose a folder of a POSIX file"
            " system, and copy its shards away by --upload"
        ) from None
    try:
        os.link(file, link)
    except FileExistsError:
        yield well("hard links", f"{place}: a name is given once, whoever asks for it")
        return
    raise MachineError(f"{place}: a hard link took the place of another file; choose another folder")


def _check_flock(trial: Path, place: Path) -> Iterator[Finding]:
    import fcntl

    without = "all works without it: only work may be done twice, never a shard lost or mixed"
    with (trial / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield warning("flock", f"{place}: no locks ({reason(error)}); {without}")
            return
        command = [sys.executable, "-I", "-c", _LOCK, lock.name]
        refused = subprocess.run(command, capture_output=True, check=False).returncode != 0
    if refused:
        yield well("flock", f"{place}: a second process is kept out, on this machine")
    else:
        yield warning("flock", f"{place}: two processes hold one lock; {without}")


def check_space(folder: Path, config: Config, inputs: int | None) -> Iterator[Finding]:
    """Compare free space, and free files, with what the set still needs."""
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    left, each = _inputs_left(folder, inputs), _record_bytes(folder, config)
    system = os.statvfs(place)
    free = system.f_bavail * system.f_frsize
    if left is None:
        yield warning(
            "space",
            f"{place}: {_gigabytes(free)} free, for about {free // each:,} inputs of {each / 1e3:.0f} KB; give"
            " --inputs N to compare with the set",
        )
        return
    need, files = left * each, 2 * -(-left // config.shards.samples_per_shard)
    said = f"{place}: {_gigabytes(free)} free, {left:,} inputs need {_gigabytes(need)} in {files:,} files"
    if free < need:
        raise MachineError(f"{said}; free space, or choose another folder")
    if system.f_files and system.f_favail < files:
        raise MachineError(f"{said}, and only {system.f_favail:,} more files fit; raise shards.samples_per_shard")
    yield well("space", said)


def _inputs_left(folder: Path, inputs: int | None) -> int | None:
    done = 0
    try:
        read_manifest(folder)
    except DataError:
        return inputs
    found = read_status(folder)
    done = found.inputs_done
    return max((inputs or read_outline(folder).num_inputs) - done, 0)


def _record_bytes(folder: Path, config: Config) -> int:
    """Return the bytes of a record with its part of the sidecar: this set's if there are any, else estimated."""
    tars = list(folder.glob("shard-*.tar"))[:16]
    if tars and (records := _records_in(tars)):
        return sum(tar.stat().st_size for tar in tars) // records + SIDECAR_BYTES
    return estimate_record_bytes(config) + SIDECAR_BYTES


def _records_in(tars: list[Path]) -> int:
    from shards.files.sidecar import HEADER_READ_BYTES, decode_header

    records = 0
    for tar in tars:
        sidecar = tar.with_suffix(".json")
        if sidecar.exists():
            with sidecar.open("rb") as file:
                records += decode_header(file.read(HEADER_READ_BYTES), sidecar.name).count
    return records


def _gigabytes(number: int) -> str:
    size, unit = next(pair for pair in ((1e12, "TB"), (1e9, "GB"), (0.0, "MB")) if number >= pair[0])
    return f"{number / (size or 1e6):.1f} {unit}"
