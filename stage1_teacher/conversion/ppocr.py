"""Convert PP-OCRv3's recognizer from ONNX to our checkpoint keys; run once by hand, its output is shipped.

    pip install onnx
    pip download --no-deps rapidocr-onnxruntime==1.2.13     # Apache-2.0; a wheel is a zip file
    unzip -j rapidocr_onnxruntime-1.2.13-*.whl '*/ch_PP-OCRv3_rec_infer.onnx'
    python -m stage1_teacher.conversion.ppocr ch_PP-OCRv3_rec_infer.onnx models/tiny/recognizer.safetensors

The weights are PaddleOCR's (Apache-2.0).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from common.anytext2.checkpoint import export_state, write_checkpoint
from common.anytext2.config import NetworkConfig
from common.errors import DataError
from common.files import sha256_file, write_bytes_atomic
from common.scripts import run_script
from stage1_teacher.teacher.recognizer import Recognizer

ONNX_SHA256 = "897a3ededb38fee0dae2c1ccee38241f37df202c9509e3abca02e9217c5ee615"
"""Of ch_PP-OCRv3_rec_infer.onnx in rapidocr-onnxruntime 1.2.13."""

PADDLE_NAME = re.compile(r"(conv2d|batch_norm|batch_norm2d|layer_norm|linear)_(\d+)\.([wb]_\d)")
FAMILIES: dict[str, tuple[str, ...]] = {
    "conv2d": ("conv2d",),
    "norm": ("batch_norm", "batch_norm2d"),  # the backbone's, then the neck's
    "layer_norm": ("layer_norm",),
    "linear": ("linear",),
}
"""Paddle numbers the layers of a kind as they are made, in the order of our modules."""


def read_onnx(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the named weights of an ONNX file and its list of characters, one a line.

    Raises:
        DataError: it is not the file that this conversion was checked on.
    """
    if sha256_file(path) != ONNX_SHA256:
        raise DataError(f"{path} is not rapidocr-onnxruntime 1.2.13's ch_PP-OCRv3_rec_infer.onnx (SHA-256)")
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    weights = {
        node.output[0]: torch.from_numpy(numpy_helper.to_array(node.attribute[0].t).copy())
        for node in model.graph.node
        if node.op_type == "Constant" and PADDLE_NAME.fullmatch(node.output[0])
    }
    characters = next(entry.value for entry in model.metadata_props if entry.key == "character")
    return weights, characters


def assign_in_order(weights: dict[str, Tensor]) -> Recognizer:
    """Give our recognizer the weights, layer by layer of each kind, strictly.

    Raises:
        DataError: a layer is missing, left over, or of another shape.
    """
    recognizer = Recognizer().eval()
    ours: dict[str, list[nn.Module]] = {family: [] for family in FAMILIES}
    kinds = {nn.Conv2d: "conv2d", nn.BatchNorm2d: "norm", nn.LayerNorm: "layer_norm", nn.Linear: "linear"}
    for module in recognizer.modules():
        if type(module) in kinds:
            ours[kinds[type(module)]].append(module)
    left = dict(weights)
    for family, prefixes in FAMILIES.items():
        numbers = [
            (prefix, number)
            for prefix in prefixes
            for number in sorted({int(m[2]) for m in map(PADDLE_NAME.fullmatch, weights) if m and m[1] == prefix})
        ]
        if len(numbers) != len(ours[family]):
            raise DataError(f"{family}: the file has {len(numbers)} layers, the network {len(ours[family])}")
        for (prefix, number), module in zip(numbers, ours[family], strict=True):
            _assign(module, f"{prefix}_{number}", left)
    if left:
        raise DataError(f"weights left over: {sorted(left)}")
    return recognizer


def _assign(module: nn.Module, name: str, left: dict[str, Tensor]) -> None:
    names = {"weight": "w_0", "bias": "b_0", "running_mean": "w_1", "running_var": "w_2"}
    for attribute, suffix in names.items():
        target: Tensor | None = getattr(module, attribute, None)
        if target is None:
            continue
        value = left.pop(f"{name}.{suffix}")
        if isinstance(module, nn.Linear) and attribute == "weight":
            value = value.T  # Paddle keeps (in, out)
        if value.shape != target.shape:
            raise DataError(f"{name}.{suffix} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(value)


def main() -> None:
    """Convert, as the module's text says; the characters go beside the weights."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    arguments = parser.parse_args()
    weights, characters = read_onnx(arguments.onnx)
    recognizer = assign_in_order(weights)
    state = export_state(recognizer, "recognizer", NetworkConfig.sd15())
    dtype = getattr(torch, arguments.dtype)
    write_checkpoint(
        arguments.output, {key: x.to(dtype) if x.is_floating_point() else x for key, x in state.items()}
    )
    write_bytes_atomic(
        arguments.output.with_name("recognizer_characters.txt"),
        "\n".join(characters.splitlines()).encode() + b"\n",
    )


if __name__ == "__main__":
    run_script(main)
