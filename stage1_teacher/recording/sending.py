"""Uploading a task's committed shards, and saying what is safe where that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import DataError, MachineError
from shards.remote.upload import Uploader
from stage1_teacher.recording.share import Share


def send(
    uploader: Uploader, shards: Sequence[str], share: Share, folder: Path, check_stop: Callable[[], None]
) -> None:
    """Upload committed shards, where they are not there yet.

    Args:
        uploader: to a URL.
        shards: their names.
        share: counts them.
        folder: the set's.
        check_stop: called before each; raises to end it.

    Raises:
        MachineError: the upload failed for good.
        DataError: a shard is damaged here.
    """
    try:
        for shard in shards:
            check_stop()
            share.done.uploaded += uploader.upload_shard(shard)
    except (DataError, MachineError) as error:
        raise type(error)(f"{error} ({share.committed_so_far} in {folder})") from None
