from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import DataError
from stage1_teacher.conversion.clip_vocab import convert
from stage1_teacher.conversion.ppocr import assign_in_order, read_onnx
from stage1_teacher.teacher.recognizer import Recognizer
from tests.small_network import TOKENIZER_FOLDER

PADDLE = {"weight": "w_0", "bias": "b_0", "running_mean": "w_1", "running_var": "w_2"}


def as_paddle(recognizer: Recognizer) -> dict[str, Tensor]:
    """Name weights as the ONNX file does: by kind, numbered from an arbitrary start in order of creation."""
    weights: dict[str, Tensor] = {}
    counts = {"conv2d": 27, "batch_norm": 27, "batch_norm2d": 5, "layer_norm": 5, "linear": 12}
    for name, module in recognizer.named_modules():
        kind = {nn.Conv2d: "conv2d", nn.LayerNorm: "layer_norm", nn.Linear: "linear"}.get(type(module))
        if isinstance(module, nn.BatchNorm2d):
            kind = "batch_norm" if name.startswith("backbone") else "batch_norm2d"
        if kind is None:
            continue
        for attribute, suffix in PADDLE.items():
            value = getattr(module, attribute, None)
            if value is not None:
                is_matrix = kind == "linear" and attribute == "weight"
                weights[f"{kind}_{counts[kind]}.{suffix}"] = (value.T if is_matrix else value).detach().clone()
        counts[kind] += 1
    return weights


@pytest.fixture
def recognizer() -> Recognizer:
    made = Recognizer().eval()
    with torch.no_grad():
        for value in made.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value))
    return made


def test_paddles_weights_are_assigned_in_order_and_strictly(recognizer: Recognizer) -> None:
    weights = as_paddle(recognizer)
    assert len(weights) == 196
    shuffled = dict(sorted(weights.items(), key=lambda item: item[0][::-1]))
    again = assign_in_order(shuffled).state_dict()
    assert all(torch.equal(again[name], value) for name, value in recognizer.state_dict().items())


def test_a_weight_too_many_or_too_few_or_of_another_shape_is_an_error(recognizer: Recognizer) -> None:
    weights = as_paddle(recognizer)
    with pytest.raises(DataError, match="linear: the file has 10 layers, the network 9"):
        assign_in_order({**weights, "linear_99.w_0": torch.zeros(1)})
    with pytest.raises(DataError, match=r"left over: \['conv2d_27\.b_0'\]"):
        assign_in_order({**weights, "conv2d_27.b_0": torch.zeros(16)})
    with pytest.raises(DataError, match=r"conv2d_27\.w_0 has shape"):
        assign_in_order({**weights, "conv2d_27.w_0": torch.zeros(1)})


def test_another_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"onnx")
    with pytest.raises(DataError, match="SHA-256"):
        read_onnx(tmp_path / "x.onnx")


def test_the_shipped_vocabulary_follows_from_its_merges(tmp_path: Path) -> None:
    merges = (TOKENIZER_FOLDER / "merges.txt").read_bytes()
    source = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    source.write_bytes(gzip.compress(merges + b"more merges\n" * 3))
    convert(source, tmp_path / "clip")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "clip" / name).read_bytes() == (TOKENIZER_FOLDER / name).read_bytes()
    ids = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    assert (ids["!"], ids["*</w>"], ids["<|startoftext|>"], ids["<|endoftext|>"]) == (0, 265, 49406, 49407)


def test_a_list_cut_short_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "list.gz"
    source.write_bytes(gzip.compress(b"#version\na b\n"))
    with pytest.raises(DataError, match="merges, expected 48894"):
        convert(source, tmp_path / "clip")
    source.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="expected bpe_simple"):
        convert(source, tmp_path / "clip")
