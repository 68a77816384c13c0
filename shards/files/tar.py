"""The tar container: headers are a function of name and size, so a shard's bytes depend on its records alone."""

from __future__ import annotations

import tarfile

BLOCK = 512
END = b"\0" * (2 * BLOCK)
"""Two empty blocks end an archive."""


def header_block(name: str, size: int) -> bytes:
    """Return the 512-byte header of a regular file: mtime 0, owner 0, mode 0644.

    Args:
        name: at most 100 ASCII characters.
        size: of the content, bytes, below 8 GiB.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int) -> bytes:
    """Return the zeros that fill a member's last block."""
    return b"\0" * (-size % BLOCK)
