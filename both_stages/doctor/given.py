"""What is given to a run: the checkpoint, the tokenizer, fonts, and credentials for a bucket."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator

from both_stages.doctor.finding import Finding, warning, well
from common.config import Config
from common.errors import DataError

_TOKENIZER = ("vocab.json", "merges.txt")
_PROBE = b"written by pipeline.py doctor\n"


def check_checkpoint(config: Config) -> Iterator[Finding]:
    """Open the checkpoint's headers, and look for its fingerprint or a place to keep that."""
    from common.anytext2.checkpoint_file import CheckpointFile

    path = config.find_checkpoint()
    file = CheckpointFile(path)
    size = sum(each.stat().st_size for each in file.files)
    said = f"{path}: {len(file.shapes):,} tensors, {size / 1e9:.2f} GB"
    cache = path.with_name(path.name + ".fingerprint.json")
    if cache.exists() or os.access(path.parent, os.W_OK):
        yield well("checkpoint", said)
    else:
        yield warning(
            "checkpoint",
            f"{said}; {path.parent} cannot be written and has no {cache.name}: every task hashes the file when it"
            " starts; run a command once where it can",
        )


def check_tokenizer(config: Config) -> Iterator[Finding]:
    """Look for CLIP's tokenizer."""
    folder = config.resolve(config.model.clip, "model.clip")
    lacks = [name for name in _TOKENIZER if not (folder / name).is_file()]
    if lacks:
        raise DataError(
            f"config model.clip: {folder} has no {' and no '.join(lacks)}; copy CLIP's tokenizer there"
        )
    yield well("tokenizer", f"{folder}")


def check_fonts(config: Config) -> Iterator[Finding]:
    """Open every configured font, and see how text is laid out here."""
    from stage1_teacher.inputs.fonts import configured_fonts, fallback_fonts, load_font, text_layout

    fonts = configured_fonts(config)
    files = [config.resolve(config.inputs.font, "inputs.font"), *fonts.values(), *fallback_fonts(config, fonts)]
    for path in files:
        load_font(path, 32)
    said = f"{len(set(files))} font{'s' * (len(set(files)) > 1)}"
    if text_layout() == "raqm":
        yield well("fonts", f"{said}; text is kerned and shaped")
    else:
        yield warning(
            "fonts",
            f"{said}; no libfribidi, so text is neither kerned nor shaped: a set is made all with or all without"
            " it; install libfribidi0 (Debian) on every machine",
        )


def check_credentials(url: str) -> Iterator[Finding]:
    """Write, read and remove a small file at a URL."""
    from shards.remote.connection import RemoteFolder

    remote = RemoteFolder(url)
    name = f".doctor-{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    path = remote.path
    try:
        remote.attempt(lambda fs: fs.pipe_file(path(name), _PROBE), "writing a small file")
        found = remote.attempt(lambda fs: bytes(fs.cat_file(path(name))), "reading it")
        remote.attempt(lambda fs: fs.rm_file(path(name)), "removing it")
    except FileNotFoundError as error:
        raise DataError(f"{url}: {error}; does the bucket exist?") from None
    if found != _PROBE:
        raise DataError(f"{url}: a file that was written reads otherwise; choose another URL")
    yield well("credentials", f"{url}: a file was written, read and removed")
