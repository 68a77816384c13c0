from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.anytext2.config import ClipConfig, NetworkConfig
from common.errors import DataError
from stage1_teacher.conversion.clip_vocab import vocabulary
from stage1_teacher.teacher.text_encoder import TextEncoder, chunk_tokens, load_clip, load_tokenizer
from tests.small_network import SMALL, TOKENIZER_FOLDER, teacher_checkpoint


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(
        load_clip(SMALL, teacher_checkpoint()), load_tokenizer(TOKENIZER_FOLDER, SMALL), SMALL.placeholder_token_id
    )


def test_the_shipped_vocabulary_is_clips() -> None:
    tokenizer = load_tokenizer(TOKENIZER_FOLDER, SMALL)
    assert len(tokenizer) == 49408
    assert tokenizer.convert_tokens_to_ids("*</w>") == 265
    ids = tokenizer("a photo of a storefront with a sign")["input_ids"]  # as upstream's tokenizer has them
    assert ids == [49406, 320, 1125, 539, 320, 17769, 2184, 593, 320, 2292, 49407]
    assert tokenizer("Texts are * , * . ")["input_ids"] == [49406, 12767, 631, 265, 267, 265, 269, 49407]


def test_tokens_are_cut_into_chunks_of_75_and_filled_up_with_the_end_token() -> None:
    assert chunk_tokens([], 1, 2) == [[1, *[2] * 76]]
    assert chunk_tokens([7] * 75, 1, 2) == [[1, *[7] * 75, 2]]
    first, second = chunk_tokens(list(range(10, 86)), 1, 2)
    assert first == [1, *range(10, 85), 2]
    assert second == [1, 85, *[2] * 75]


def test_a_captions_context_does_not_depend_on_longer_neighbours(encoder: TextEncoder) -> None:
    captions = ["a cat", "neon signs and " * 40, ""]
    together = encoder.encode_image_captions(captions)
    assert [len(context) for context in together] == [77, 154, 77]
    for caption, context in zip(captions, together, strict=True):
        torch.testing.assert_close(encoder.encode_image_captions([caption])[0], context, rtol=1e-5, atol=1e-5)


def test_placeholders_become_lines_in_order_and_only_they_matter(encoder: TextEncoder) -> None:
    lines = torch.randn(2, SMALL.context_dim)
    encoded = encoder.encode_text_captions(["Texts are * , * . "] * 3, [lines, lines.flip(0), lines[:1]])
    assert encoded.shape == (3, 77, SMALL.context_dim)
    before = 3  # start, "texts", "are": attention looks back only
    torch.testing.assert_close(encoded[0, :before], encoded[1, :before])
    assert not torch.allclose(encoded[0, before], encoded[1, before])
    torch.testing.assert_close(encoded[0, : before + 2], encoded[2, : before + 2])
    assert not torch.allclose(encoded[0, before + 2], encoded[2, before + 2])


def test_lines_whose_placeholder_was_cut_off_are_dropped(encoder: TextEncoder) -> None:
    caption = "word " * 74 + "* *"
    lines = torch.randn(2, SMALL.context_dim)
    encoded = encoder.encode_text_captions([caption, caption], [lines, lines[:1]])
    torch.testing.assert_close(encoded[0], encoded[1])


def test_an_encoding_with_lines_leaves_nothing_behind(encoder: TextEncoder) -> None:
    plain = encoder.encode_text_captions(["* is a star"], [torch.empty(0, SMALL.context_dim)])
    encoder.encode_text_captions(["* is a star"], [torch.randn(1, SMALL.context_dim)])
    assert torch.equal(encoder.encode_text_captions(["* is a star"], [torch.empty(0, SMALL.context_dim)]), plain)
    assert not encoder.clip.get_input_embeddings()._forward_hooks


def test_the_hook_goes_even_when_encoding_fails(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="zip"):
        encoder.encode_text_captions(["*", "*"], [torch.randn(1, SMALL.context_dim)])
    with pytest.raises(RuntimeError):
        encoder.encode_text_captions(["*"], [torch.randn(1, 3)])
    assert not encoder.clip.get_input_embeddings()._forward_hooks


def test_gradients_reach_the_lines_for_training_the_embedding(encoder: TextEncoder) -> None:
    lines = torch.randn(1, SMALL.context_dim, requires_grad=True)
    encoder.encode_text_captions(["Text: *"], [lines]).sum().backward()
    assert lines.grad is not None
    assert bool(lines.grad.abs().max() > 0)


def test_a_folder_without_a_tokenizer_or_with_another_is_an_error_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no vocab\.json"):
        load_tokenizer(tmp_path, SMALL)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("broken")
    with pytest.raises(DataError, match="CLIP folder"):
        load_tokenizer(tmp_path, SMALL)
    small = NetworkConfig(clip=ClipConfig(vocab_size=500))
    with pytest.raises(DataError, match="49408 tokens, the network expects 500"):
        load_tokenizer(TOKENIZER_FOLDER, small)
    with pytest.raises(DataError, match="`\\*` has id 265, the network expects 266"):
        load_tokenizer(TOKENIZER_FOLDER, NetworkConfig(placeholder_token_id=266))


def test_a_list_that_is_not_clips_makes_no_vocabulary() -> None:
    with pytest.raises(DataError, match="twice"):
        vocabulary(["a b", "a b"])
