"""What images look like to a text detector: features by which `kernel_distance` compares sets of images.

The network is PP-OCR's detector, which the judge's wheel ships beside the judge's own file. Four of its feature
maps are read, one for each of the strides 2, 4, 8 and 16: of every channel the mean and the standard deviation
over the image. So they tell colours, edges, noise and shapes, and hardly where these lie.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, UsageError
from common.faults import raise_disk_fault
from common.files import sha256_file
from stage2_student.evaluation.judges import find_ocr_model, make_session

logger = logging.getLogger(__name__)

DETECTOR_FILE = "models/ch_PP-OCRv4_det_infer.onnx"
MAPS = ("p2o.Add.15", "p2o.Add.43", "p2o.Add.71", "p2o.Add.147")
"""Names in the file of the last maps at strides 2, 4, 8 and 16."""
CHANNELS = (32, 48, 96, 192)
"""Of these maps."""
SIDE_MULTIPLE = 32
"""The network takes sides that are multiples of this, pixels."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of its input's channels, as PaddleOCR normalises them: in this order, although it is given BGR."""
BATCH = 16


class Detector:
    """PP-OCRv4 detection on onnxruntime, offline; only its inner feature maps are used."""

    def __init__(self, model: Path) -> None:
        """Load the network.

        Args:
            model: the ONNX file, as rapidocr-onnxruntime 1.4.4 ships it.

        Raises:
            UsageError: onnxruntime is not installed.
            DataError: the file cannot be loaded, or has not the maps.
        """
        try:
            self._session = make_session(_with_outputs(model.read_bytes(), MAPS))
        except UsageError:
            raise
        except Exception as error:
            raise_disk_fault(error, model)
            raise _wrong_file(model, f"{type(error).__name__}: {error}") from None
        shapes = {output.name: output.shape for output in self._session.get_outputs()}
        channels = tuple(shapes[name][1] for name in MAPS)
        if channels != CHANNELS:
            raise _wrong_file(model, f"received maps of {channels} channels, expected {CHANNELS}")
        self.identity = f"ppocr_v4_det {sha256_file(model)[:12]}"

    def features(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Return what images look like, (B, 736): of each map the channels' means, then their deviations.

        Args:
            images: B, each (H, W, 3) uint8 RGB. Where H or W is no multiple of `SIDE_MULTIPLE` they are scaled to
                the nearest.
        """
        found: list[NDArray[np.float32]] = []
        for start in range(0, len(images), BATCH):
            scaled = [_to_multiple(image) for image in images[start : start + BATCH]]
            if len({image.shape for image in scaled}) == 1:
                found.append(self._run(np.stack(scaled)))
            else:
                found += [self._run(image[None]) for image in scaled]
        return np.concatenate(found)

    def _run(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the features (B, 736) of images (B, H, W, 3) of one size."""
        normalised = (images[..., ::-1] / 255 - MEAN) / DEVIATION
        batch = np.ascontiguousarray(normalised.transpose(0, 3, 1, 2), np.float32)
        maps = self._session.run(list(MAPS), {self._session.get_inputs()[0].name: batch})  # each (B, C, h, w)
        pooled = [value for map_ in maps for value in (map_.mean(axis=(2, 3)), map_.std(axis=(2, 3)))]
        return np.concatenate(pooled, axis=1)


def load_detector() -> Detector | None:
    """Return the detector, or None, which is said, if the wheel that ships it is not installed."""
    try:
        return Detector(find_ocr_model(DETECTOR_FILE, "KID's detector"))
    except UsageError as error:
        logger.warning("KID is left out: %s", error)
        return None


def _wrong_file(model: Path, what: str) -> DataError:
    return DataError(
        f"KID's detector {model}: {what}; expected the PP-OCRv4 detection ONNX file of rapidocr-onnxruntime 1.4.4"
    )


def _to_multiple(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = (max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in image.shape[:2])
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


def _with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """Add outputs to an ONNX file, by the names of values inside of its graph.

    Two Protocol Buffers messages written one after the other are read as one, in which lists are joined; so a
    message that has nothing but the outputs adds them, and nobody needs the package onnx for it.

    Source: https://protobuf.dev/programming-guides/encoding/#last-one-wins; the numbers are onnx.proto's:
    ModelProto.graph = 7, GraphProto.output = 12, ValueInfoProto.name = 1.
    """
    outputs = b"".join(_field(12, _field(1, name.encode())) for name in names)
    return model + _field(7, outputs)


def _field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes: its number and kind, its length, its content."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
