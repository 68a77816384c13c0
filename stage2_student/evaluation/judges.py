"""Judges by name: what reads the text of a cropped line.

The judge is PP-OCRv4, which never conditions the model (that one is PP-OCRv3); another is plugged in by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import DataError, UsageError
from common.faults import raise_disk_fault
from common.files import sha256_file

PPOCR_V4_PACKAGE = "rapidocr_onnxruntime"
PPOCR_V4_FILE = "models/ch_PP-OCRv4_rec_infer.onnx"
PPOCR_HEIGHT, PPOCR_MIN_WIDTH = 48, 320
"""Input height of PP-OCRv4 recognition, and the width up to which it was trained with padding, pixels."""
PPOCR_WIDTH_MULTIPLE = 64
"""Wider crops are padded to a multiple of this, pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a judge read in one crop."""

    text: str
    """The text, empty if nothing was read."""
    confidence: float
    """Mean probability of the characters kept, 0 to 1; 0 for an empty text."""


def make_session(model: str | bytes, threads: int | None = None) -> Any:
    """Load an ONNX network to run on the CPU.

    Args:
        model: path or content of the file.
        threads: of onnxruntime; by default OMP_NUM_THREADS, which it does not look at itself, or all cores.

    Raises:
        UsageError: onnxruntime is not installed; onnxruntime's own errors say what is wrong with the file.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise UsageError("reading images: onnxruntime is not installed; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    if threads is None:
        threads = int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0])  # "4,2" is for nested regions
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])


class Judge(Protocol):
    """Reads crops of single, upright lines."""

    identity: str
    """Name and version (a hash of the weights), stored beside the results that it gave."""

    def read(self, crops: Sequence[NDArray[np.uint8]]) -> list[Reading]:
        """Read crops, each (h, w, 3) uint8 RGB of any size; one reading per crop, in order."""
        ...


class PPOCRv4:
    """PP-OCRv4 recognition (Chinese and English, 6,625 classes) on onnxruntime, offline."""

    def __init__(self, model: Path, threads: int | None = None, batch_size: int = 16) -> None:
        """Load the network.

        Args:
            model: the ONNX file, its characters in its metadata, as rapidocr-onnxruntime 1.4.4 ships it.
            threads: of onnxruntime; by default OMP_NUM_THREADS, which it does not look at itself, or all cores.
            batch_size: crops of similar width that are read together.

        Raises:
            DataError: the file cannot be loaded or holds no list of characters.
        """
        try:
            self._session = make_session(str(model), threads)
            characters = self._session.get_modelmeta().custom_metadata_map["character"]
        except UsageError:
            raise
        except Exception as error:
            raise_disk_fault(error, model)
            raise DataError(
                f"judge {model}: {type(error).__name__}: {error}; expected the PP-OCRv4 recognition"
                f" ONNX file of rapidocr-onnxruntime 1.4.4"
            ) from None
        self._characters = ["", *characters.splitlines(), " "]  # class 0 is CTC's blank
        self._batch_size = batch_size
        self.identity = f"ppocr_v4 {sha256_file(model)[:12]}"

    def read(self, crops: Sequence[NDArray[np.uint8]]) -> list[Reading]:
        """Read crops, each (h, w, 3) uint8 RGB; one reading per crop, in order."""
        # Only crops of one padded width share a batch: a reading depends on its padding, and must not depend on
        # its neighbours.
        by_width: dict[int, list[int]] = {}
        for i, crop in enumerate(crops):
            by_width.setdefault(_padded_width(_scaled_width(crop)), []).append(i)
        readings: dict[int, Reading] = {}
        for width, members in by_width.items():
            for start in range(0, len(members), self._batch_size):
                indices = members[start : start + self._batch_size]
                probabilities = self._run([crops[i] for i in indices], width)  # (B, T, classes)
                readings.update(zip(indices, map(self._decode, probabilities), strict=True))
        return [readings[i] for i in range(len(crops))]

    def _run(self, crops: Sequence[NDArray[np.uint8]], padded_width: int) -> NDArray[np.float32]:
        batch = np.zeros((len(crops), 3, PPOCR_HEIGHT, padded_width), np.float32)
        for row, crop in zip(batch, crops, strict=True):
            width = _scaled_width(crop)
            resized = Image.fromarray(crop).resize((width, PPOCR_HEIGHT), Image.Resampling.BICUBIC)
            bgr = np.asarray(resized, np.float32)[:, :, ::-1].transpose(2, 0, 1)  # PP-OCR was trained on BGR
            row[:, :, :width] = bgr / 127.5 - 1
        name = self._session.get_inputs()[0].name
        probabilities: NDArray[np.float32] = self._session.run(None, {name: batch})[0]
        return probabilities

    def _decode(self, classes: NDArray[np.float32]) -> Reading:
        """Greedy CTC: the best class of each column, repeats merged, blanks dropped; classes (T, C)."""
        best = classes.argmax(axis=1)  # (T,)
        kept = (best != 0) & np.append(True, best[1:] != best[:-1])
        text = "".join(self._characters[i] for i in best[kept]).strip()
        return Reading(text=text, confidence=float(classes.max(axis=1)[kept].mean()) if text else 0.0)


def _scaled_width(crop: NDArray[np.uint8]) -> int:
    """Return a crop's width once it is as high as the network's input, pixels."""
    return max(1, math.ceil(PPOCR_HEIGHT * crop.shape[1] / crop.shape[0]))


def _padded_width(width: int) -> int:
    return max(PPOCR_MIN_WIDTH, math.ceil(width / PPOCR_WIDTH_MULTIPLE) * PPOCR_WIDTH_MULTIPLE)


def find_ppocr_v4() -> Path:
    """Return the ONNX file that the package rapidocr-onnxruntime ships, without importing the package.

    Its import would need OpenCV's desktop build, and with it libGL; only its model file is used.

    Raises:
        UsageError: the package, or the file in it, is not there.
    """
    return find_ocr_model(PPOCR_V4_FILE, "judge ppocr_v4")


def find_ocr_model(name: str, what: str) -> Path:
    """Return a file of that package's; arguments: the file in it, and whose it is, for the error.

    Raises:
        UsageError: the package, or the file in it, is not there.
    """
    spec = importlib.util.find_spec(PPOCR_V4_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / name).is_file():
            return path
    raise UsageError(
        f"{what}: its model was not found in the package rapidocr-onnxruntime;"
        " pip install --no-deps rapidocr-onnxruntime==1.4.4"
    )


def load_judge(name: str) -> Judge:
    """Return a judge.

    Args:
        name: "ppocr_v4", or `module:factory`, a callable without arguments of any importable module, e.g.
            `my_ocr:make`.

    Raises:
        UsageError: there is none of this name.
    """
    if name == "ppocr_v4":
        return PPOCRv4(find_ppocr_v4())
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"evaluate.judge: received {name!r}, expected ppocr_v4 or module:factory")
    try:
        factory: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"evaluate.judge {name!r}: {error}") from None
    judge: Judge = factory()
    return judge
