from __future__ import annotations

from collections import Counter

import pytest

from stage1_teacher.inputs.captions import (
    MAX_WORDS,
    TEXT_PHRASES,
    describe_watermark,
    image_caption,
    refine_language,
    text_caption,
)


def caption_of(caption: str, *, suffix: str = "", seed: int = 0, input_id: str = "x") -> str:
    return image_caption(caption, suffix=suffix, seed=seed, input_id=input_id)


def test_a_caption_gets_its_full_stop_then_the_suffix() -> None:
    assert caption_of("a red sign") == "a red sign. "
    assert caption_of("a red sign", suffix="best quality") == "a red sign. , best quality"
    assert caption_of("") == ". "


def test_placeholders_in_a_caption_become_spaces() -> None:
    assert "*" not in caption_of("5* hotel, **new**", suffix="")
    assert caption_of("a*b") == "a b. "


def test_a_caption_is_cut_at_500_characters() -> None:
    assert len(caption_of("abcdefghi " * 200)) == 500


def test_a_caption_of_2000_words_keeps_its_first_sentence_and_at_most_128_words() -> None:
    sentences = [" ".join(f"{chr(97 + n)}{w}" for w in range(9)) for n in range(20)]
    caption = ". ".join(sentences) + "x " * 1800
    cut = caption_of(caption)
    assert cut.startswith(sentences[0])
    assert len(cut.split()) <= MAX_WORDS + 1  # a cut sentence ends with a full stop of its own
    assert caption_of(caption) == cut


def test_which_sentences_stay_is_keyed_by_seed_and_input() -> None:
    caption = ". ".join(f"{chr(97 + n)} " * 12 for n in range(20))
    cuts = {caption_of(caption, seed=seed, input_id=name) for seed in range(4) for name in "abcd"}
    assert len(cuts) > 8
    assert all(cut.startswith("a a a") and len(cut.split()) <= MAX_WORDS + 1 for cut in cuts)


def test_a_first_sentence_that_is_too_long_is_cut_by_words() -> None:
    cut = caption_of("ab " * 166)
    assert cut == " ".join(["ab"] * MAX_WORDS)


def test_a_watermark_score_is_put_into_words() -> None:
    assert describe_watermark("a", None) == "a"
    assert describe_watermark("a", 0.5) == "a no watermarks "
    assert describe_watermark("a", 0.51) == "a with watermarks "


def test_a_text_caption_has_one_placeholder_a_line_and_any_of_the_phrases() -> None:
    assert text_caption(3, seed=1, input_id="x").endswith("* , * , * . ")
    rendered = Counter(text_caption(1, seed=0, input_id=str(n)).removesuffix("* . ") for n in range(600))
    assert set(rendered) == set(TEXT_PHRASES)
    assert min(rendered.values()) > 60


@pytest.mark.parametrize(
    ("annotated", "text", "expected"),
    [
        ("Chinese", "說話", "Chinese_tra"),
        ("Chinese", "说话", "Chinese_sim"),
        ("Latin", "說話", "Latin"),
        (None, "說話", "Chinese_tra"),
        (None, "OPEN 24H", "Latin"),
        (None, "カフェ 東京", "Japanese"),
        (None, "한국어", "Korean"),
        (None, "مرحبا", "Arabic"),
        (None, "नमस्ते", "Hindi"),
        (None, "বাংলা", "Bangla"),
        (None, "2024!", "Latin"),
    ],
)
def test_languages_are_named_as_upstream_names_them(annotated: str | None, text: str, expected: str) -> None:
    assert refine_language(annotated, text) == expected
