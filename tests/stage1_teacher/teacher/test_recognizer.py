from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from common.anytext2.config import NetworkConfig
from stage1_teacher.teacher.recognizer import NUM_CLASSES, Reading, Recognizer, load_recognizer, normalize_line

MODELS = Path(__file__).parents[3] / "models"


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    weights = MODELS / "tiny" / "recognizer.safetensors"
    return load_recognizer(NetworkConfig.sd15(), weights)


@pytest.fixture(scope="module")
def characters() -> list[str]:
    listed = (MODELS / "tiny" / "recognizer_characters.txt").read_text().splitlines()
    return ["", *listed, " "]


def greedy_classes(logits: Tensor) -> list[int]:
    """Decode a line's logits, (40, 6625), by CTC: the best class of each step, without repeats and blanks."""
    return [int(index) for index in torch.unique_consecutive(logits.argmax(dim=1)) if index != 0]


def draw(text: str, size: int = 40) -> Tensor:
    font = ImageFont.truetype(str(MODELS / "fonts" / "DejaVuSans.ttf"), size)
    image = Image.new("L", (int(font.getlength(text)) + 20, size + 20))
    ImageDraw.Draw(image).text((10, 5), text, font=font, fill=255)
    return torch.from_numpy(np.array(image)).float()[None]


@pytest.mark.parametrize("text", ["HELLO", "world", "Cafe 24", "OPEN 9:30"])
def test_the_shipped_weights_read_what_was_drawn(recognizer: Recognizer, characters: list[str], text: str) -> None:
    assert len(characters) == NUM_CLASSES
    reading = recognizer(normalize_line(draw(text))[None])
    assert reading.neck.shape == (1, 40, 64)
    assert "".join(characters[index] for index in greedy_classes(reading.logits[0])) == text


def test_vertical_text_is_turned_left_before_it_is_read(recognizer: Recognizer, characters: list[str]) -> None:
    upright = draw("HELLO")
    vertical = upright.flip(1).transpose(1, 2)  # turned right: read from top to bottom
    assert torch.equal(normalize_line(vertical), normalize_line(upright))


def test_a_line_is_scaled_to_48_pixels_and_padded_with_zeros() -> None:
    line = normalize_line(torch.full((1, 24, 50), 255.0))
    assert line.shape == (3, 48, 320)
    torch.testing.assert_close(line[:, :, :100], torch.ones(3, 48, 100))
    assert not bool(line[:, :, 100:].any())


def test_a_long_line_is_squeezed_into_the_frame() -> None:
    line = normalize_line(torch.zeros(1, 10, 500))
    assert torch.equal(line, -torch.ones(3, 48, 320))


def test_folded_norms_change_nothing_but_rounding(recognizer: Recognizer) -> None:
    lines = torch.stack([normalize_line(draw(text)) for text in ("Cafe 24", "OPEN")])
    folded = copy.deepcopy(recognizer)
    folded.fold_norms()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    exact = copy.deepcopy(recognizer).double()
    truth = exact(lines.double())

    def errors(reading: Reading) -> list[float]:
        pairs = zip(reading, truth, strict=True)
        return [float((values - true).norm() / true.norm()) for values, true in pairs]

    assert max(errors(folded(lines))) < 5e-6  # of float32, as without
    assert max(errors(folded(lines))) < 2 * max(errors(recognizer(lines)))
    exact.fold_norms()
    assert max(errors(exact(lines.double()))) < 1e-12
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    folded.fold_norms()  # a second time finds nothing
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())


def test_lines_are_read_independently_of_their_batch(recognizer: Recognizer) -> None:
    lines = torch.stack([normalize_line(draw(text)) for text in ("one", "two", "three")])
    together = recognizer.features(lines)
    for row in range(3):
        torch.testing.assert_close(
            together[row], recognizer.features(lines[row : row + 1])[0], rtol=1e-4, atol=1e-5
        )
