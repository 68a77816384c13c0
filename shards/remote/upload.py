"""Copying a set to a URL after it was committed here: a reader there sees only whole shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import read_bytes
from shards.files.manifest import read_manifest
from shards.files.names import FAILURES_DIR, MANIFEST, PLAN_DIR, SUMMARY, UNCOND, failures_name, sidecar_name
from shards.remote.connection import RemoteFolder
from shards.writing.writer import read_committed


def upload_set(folder: Path, url: str) -> list[str]:
    """Copy what is committed in a folder to a URL; what is there already stays.

    A shard's sidecar goes last, after the shard arrived whole, so that a reader of the URL sees only whole shards.

    Args:
        folder: the set's.
        url: of the set's folder there.

    Returns:
        Names of the shards uploaded now.

    Raises:
        MachineError: the connection failed for good.
        DataError: another set is there.
    """
    uploader = Uploader(folder, url)
    shards = [sidecar.with_suffix(".tar").name for sidecar in sorted(folder.glob("shard-*.json"))]
    uploaded = [shard for shard in shards if uploader.upload_shard(shard)]
    if (folder / SUMMARY).exists():
        _put_if_other(uploader.remote, folder / SUMMARY, SUMMARY)
    return uploaded


class Uploader:
    """Copies a set's shards to a URL one by one."""

    def __init__(self, folder: Path, url: str) -> None:
        """Copy manifest, unconditional contexts and plan, without which no shard can be read.

        Args:
            folder: the set's.
            url: of the set's folder there.

        Raises:
            MachineError: the connection failed for good.
            DataError: another set is there.
        """
        self.remote, self._folder = RemoteFolder(url), folder
        self._identity_sha256 = read_manifest(folder).identity_sha256
        for name in (UNCOND, MANIFEST):
            there = _read_if_there(self.remote, name)
            if there is not None and there != read_bytes(folder / name):
                raise DataError(f"{url}: {name} there is of another set than {folder}; choose another URL")
            if there is None:
                _put(self.remote, folder / name, name)
        for path in sorted((folder / PLAN_DIR).glob("*.txt")):
            _put_if_other(self.remote, path, f"{PLAN_DIR}/{path.name}")

    def upload_shard(self, shard: str) -> bool:
        """Copy a committed shard, then its sidecar, unless they are there.

        Args:
            shard: its file name.

        Returns:
            Whether anything was sent.

        Raises:
            MachineError: the connection failed for good.
            DataError: the shard is damaged here.
        """
        folder, sidecar = self._folder, self._folder / sidecar_name(shard)
        there = _read_if_there(self.remote, sidecar.name)
        if sidecar.exists() and there == read_bytes(sidecar):
            return False
        if read_committed(folder, shard, self._identity_sha256) is None:
            raise DataError(f"{folder / shard}: damaged, so it is not uploaded; run precompute again to mend it")
        if there is not None:  # of an older content: it must not stand beside the new shard
            _remove(self.remote, sidecar.name)
        failures = folder / failures_name(shard)
        if failures.exists():
            _put(self.remote, failures, f"{FAILURES_DIR}/{failures.name}")
        _put(self.remote, folder / shard, shard)
        _put(self.remote, sidecar, sidecar.name)
        return True


def _read_if_there(remote: RemoteFolder, name: str) -> bytes | None:
    try:
        return remote.attempt(lambda fs: bytes(fs.cat_file(remote.path(name))), f"reading {name}")
    except FileNotFoundError:
        return None


def _put_if_other(remote: RemoteFolder, path: Path, name: str) -> None:
    if _read_if_there(remote, name) != read_bytes(path):
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

    try:
        remote.attempt(send, f"uploading {name}")
    except FileNotFoundError as error:  # a bucket that does not exist
        raise DataError(f"{remote.url}: uploading {name} failed ({error}); does the bucket exist?") from None


def _remove(remote: RemoteFolder, name: str) -> None:
    remote.attempt(lambda fs: fs.rm_file(remote.path(name)), f"removing {name}")
