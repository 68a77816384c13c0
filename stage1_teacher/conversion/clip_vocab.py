"""Write CLIP's vocabulary as a folder for transformers' CLIPTokenizer; run once by hand, its output is shipped.

    pip download --no-deps open_clip_torch        # MIT; a wheel is a zip file
    unzip -j open_clip_torch-*.whl '*/bpe_simple_vocab_16e6.txt.gz'
    python -m stage1_teacher.conversion.clip_vocab bpe_simple_vocab_16e6.txt.gz models/tiny/clip

The vocabulary is OpenAI CLIP's (MIT).
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from common.errors import DataError, reason
from common.faults import raise_disk_fault
from common.files import write_bytes_atomic
from common.scripts import run_script

NUM_MERGES = 48894
"""CLIP uses this many of the list's merges: 49,152 words less 256 bytes less 2 special tokens."""
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """Return the printable stand-ins of the 256 bytes, in the vocabulary's order.

    Bytes that print stand for themselves and come first; the others get characters from U+0100 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printing)
    return [chr(byte) for byte in printing] + [chr(256 + n) for n in range(others)]


def vocabulary(merges: list[str]) -> dict[str, int]:
    """Return every token's id: bytes, bytes that end a word, merges, start, end."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [merge.replace(" ", "") for merge in merges] + [START, END]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise DataError(f"the merges make {len(tokens) - len(ids)} tokens twice; is it CLIP's list?")
    return ids


def convert(source: Path, folder: Path) -> None:
    """Write vocab.json, merges.txt and the tokenizer's configuration.

    Raises:
        DataError: the source is not CLIP's list of merges.
    """
    try:
        lines = gzip.decompress(source.read_bytes()).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise_disk_fault(error, source)
        raise DataError(f"{source}: {reason(error)}; expected bpe_simple_vocab_16e6.txt.gz") from None
    merges = lines[1 : 1 + NUM_MERGES]  # the first line is a version
    if len(merges) != NUM_MERGES:
        raise DataError(f"{source}: {len(merges)} merges, expected {NUM_MERGES} or more")
    ids = vocabulary(merges)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": 77,
        "errors": "replace",
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    special = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    files = {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    for name, text in files.items():
        write_bytes_atomic(folder / name, text.encode())


def main() -> None:
    """Convert, as the module's text says."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.folder)


if __name__ == "__main__":
    run_script(main)
