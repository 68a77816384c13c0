"""Copying a set to a URL after it was committed here: a reader there sees only whole shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import DataError
from shards.layout import FAILURES_DIR, MANIFEST, PLAN_DIR, SUMMARY, UNCOND, failures_name, sidecar_name
from shards.manifest import read_manifest
from shards.remote import RemoteFolder
from shards.writer import read_committed


def upload_set(folder: Path, url: str) -> list[str]:
    """Copy what is committed in a folder to a URL; what is there already stays.

    A shard's sidecar goes last, after the shard arrived whole, so that a reader of the URL sees only whole shards.

    Args:
        folder: the set's.
        url: of the set's folder there.

    Returns:
        Names of the shards uploaded now.

    Raises:
        DataError: the connection failed for good, or another set is there.
    """
    remote = RemoteFolder(url)
    identity = read_manifest(folder).identity_sha256
    for name in (UNCOND, MANIFEST):
        there = _read_if_there(remote, name)
        if there is not None and there != (folder / name).read_bytes():
            raise DataError(f"{url}: {name} there is of another set than {folder}; choose another URL")
        if there is None:
            _put(remote, folder / name, name)
    for path in sorted((folder / PLAN_DIR).glob("*.txt")):
        _put_if_other(remote, path, f"{PLAN_DIR}/{path.name}")
    uploaded = []
    for sidecar in sorted(folder.glob("shard-*.json")):
        shard = sidecar.with_suffix(".tar").name
        there = _read_if_there(remote, sidecar.name)
        if there == sidecar.read_bytes():
            continue
        if read_committed(folder, shard, identity) is None:
            raise DataError(f"{folder / shard}: damaged, so it is not uploaded; run precompute again to mend it")
        if there is not None:  # of an older content: it must not stand beside the new shard
            _remove(remote, sidecar_name(shard))
        failures = folder / failures_name(shard)
        if failures.exists():
            _put(remote, failures, f"{FAILURES_DIR}/{failures.name}")
        _put(remote, folder / shard, shard)
        _put(remote, sidecar, sidecar.name)
        uploaded.append(shard)
    if (folder / SUMMARY).exists():
        _put_if_other(remote, folder / SUMMARY, SUMMARY)
    return uploaded


def _read_if_there(remote: RemoteFolder, name: str) -> bytes | None:
    try:
        return remote.attempt(lambda fs: bytes(fs.cat_file(remote.path(name))), f"reading {name}")
    except FileNotFoundError:
        return None


def _put_if_other(remote: RemoteFolder, path: Path, name: str) -> None:
    if _read_if_there(remote, name) != path.read_bytes():
        _put(remote, path, name)


def _put(remote: RemoteFolder, path: Path, name: str) -> None:
    def send(fs: Any) -> None:
        target = remote.path(name)
        if "s3" not in fs.protocol:  # there a folder is only a prefix
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), target)
        arrived, size = fs.info(target)["size"], path.stat().st_size
        if arrived != size:
            raise ConnectionError(f"{arrived} of {size} bytes arrived")

    remote.attempt(send, f"uploading {name}")


def _remove(remote: RemoteFolder, name: str) -> None:
    remote.attempt(lambda fs: fs.rm_file(remote.path(name)), f"removing {name}")
