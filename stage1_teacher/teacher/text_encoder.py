"""CLIP's text encoder as AnyText2 uses it: long captions in chunks, lines of text in place of placeholders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common.anytext2.checkpoint import load_part
from common.anytext2.config import NetworkConfig
from common.errors import DataError
from common.faults import raise_disk_fault

CAPTION_TOKENS = 75
"""Of a chunk of 77, between its start and end tokens."""


def build_clip(config: NetworkConfig) -> CLIPTextModel:
    """Build CLIP's text model with transformers' initial weights."""
    sizes = config.clip
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            vocab_size=sizes.vocab_size,
            max_position_embeddings=sizes.max_positions,
            hidden_act=sizes.hidden_act,
            attn_implementation="sdpa",
        )
    )


load_clip = partial(load_part, build_clip, "clip")
"""Loads CLIP's text model from an AnyText2 checkpoint; see `load_part`."""


def load_tokenizer(folder: Path, config: NetworkConfig) -> CLIPTokenizer:
    """Load a CLIP tokenizer from a folder, without network.

    Raises:
        DataError: the folder holds no CLIP tokenizer, or one of another vocabulary.
    """
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise DataError(
                f"CLIP folder {folder}: no {name}; expected the tokenizer files of clip-vit-large-patch14"
            )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the tokenizers library raises on a damaged file
        raise_disk_fault(error, folder)
        raise DataError(f"CLIP folder {folder}: {' '.join(str(error).split())}") from None
    if len(tokenizer) != config.clip.vocab_size:
        raise DataError(
            f"CLIP folder {folder}: {len(tokenizer)} tokens, the network expects {config.clip.vocab_size}"
        )
    placeholder = tokenizer.convert_tokens_to_ids("*</w>")
    if placeholder != config.placeholder_token_id:
        raise DataError(
            f"CLIP folder {folder}: `*` has id {placeholder}, the network expects {config.placeholder_token_id}"
        )
    return tokenizer


def chunk_tokens(tokens: Sequence[int], start: int, end: int) -> list[list[int]]:
    """Cut a caption's tokens into chunks of [start, 75 tokens, end]; the last one is filled up with `end`.

    Args:
        tokens: without start and end; none at all make one chunk.
        start: id of the start token.
        end: id of the end token, also CLIP's padding.

    Returns:
        k lists of 77 ids.
    """
    pieces = [list(tokens[i : i + CAPTION_TOKENS]) for i in range(0, max(1, len(tokens)), CAPTION_TOKENS)]
    return [[start, *piece, *[end] * (CAPTION_TOKENS - len(piece)), end] for piece in pieces]


def caption_chunks(tokenizer: CLIPTokenizer, caption: str) -> list[list[int]]:
    """Return a caption's tokens as `chunk_tokens` cuts them."""
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return chunk_tokens(ids, tokenizer.bos_token_id, tokenizer.eos_token_id)


def encode_tokens(clip: CLIPTextModel, token_ids: Tensor) -> Tensor:
    """Encode tokens, (N, 77) int64, to the last hidden state after the final norm, (N, 77, c)."""
    encoded: Tensor = clip(input_ids=token_ids).last_hidden_state
    return encoded


def encode_with_lines(clip: CLIPTextModel, token_ids: Tensor, lines: Sequence[Tensor], placeholder: int) -> Tensor:
    """Encode text captions whose placeholders stand for lines of text.

    The first placeholder's embedding is replaced by the first line's, and so on; lines beyond the last
    placeholder (cut off with the caption) are dropped, placeholders beyond the last line stay as they are.

    Args:
        clip: the text model.
        token_ids: (N, 77) int64.
        lines: for each caption its lines' embeddings, (n, c); n may be 0.
        placeholder: the placeholder's token id.

    Returns:
        (N, 77, c).
    """
    embedding = clip.get_input_embeddings()
    width = embedding.weight.shape[1]
    replaced = torch.zeros(token_ids.shape, dtype=torch.bool, device=token_ids.device)
    values = embedding.weight.new_zeros(*token_ids.shape, width)  # (N, 77, c)
    for row, (ids, embeddings) in enumerate(zip(token_ids, lines, strict=True)):
        places = (ids == placeholder).nonzero()[: len(embeddings), 0]
        replaced[row, places] = True
        values[row, places] = embeddings[: len(places)].to(values)

    def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return torch.where(replaced[..., None], values, output)

    # transformers 5 takes no `inputs_embeds` here; the hook lives for this call only.
    handle = embedding.register_forward_hook(replace)
    try:
        return encode_tokens(clip, token_ids)
    finally:
        handle.remove()


class TextEncoder:
    """CLIP's text model with its tokenizer."""

    def __init__(self, clip: CLIPTextModel, tokenizer: CLIPTokenizer, placeholder: int) -> None:
        """Join the two; `placeholder` is the token id that stands for a line."""
        self.clip = clip
        self._tokenizer = tokenizer
        self._placeholder = placeholder

    def encode_image_captions(self, captions: Sequence[str]) -> list[Tensor]:
        """Encode image captions in chunks of 75 tokens, each chunk alone.

        Returns:
            For each caption its own context, (77 k, c): never padded to another caption's length.
        """
        chunks = [caption_chunks(self._tokenizer, caption) for caption in captions]
        flat = [chunk for caption in chunks for chunk in caption]
        encoded = encode_tokens(self.clip, self._tensor(flat))  # (sum k, 77, c)
        pieces = encoded.split([len(caption) for caption in chunks])
        return [piece.flatten(0, 1) for piece in pieces]

    def encode_text_captions(self, captions: Sequence[str], lines: Sequence[Tensor]) -> Tensor:
        """Encode text captions, cut at 77 tokens, with their lines' embeddings, (n, c) each: (N, 77, c)."""
        ids = [caption_chunks(self._tokenizer, caption)[0] for caption in captions]
        return encode_with_lines(self.clip, self._tensor(ids), lines, self._placeholder)

    def _tensor(self, ids: list[list[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.clip.device)
