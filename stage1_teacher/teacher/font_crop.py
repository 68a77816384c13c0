"""Cutting a line's font hint out of the image, straightened along the line."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FALLBACK_BOX = np.array([[0, 0], [100, 0], [100, 100], [0, 100]], dtype=np.float64)
"""What is cut for a line whose position mask is empty, as upstream has it."""


def crop_along_line(image: Tensor, position: Tensor) -> Tensor:
    """Cut out the smallest rectangle around a line and turn it upright.

    Args:
        image: (c, H, W), any float values from 0 to 255.
        position: the line's mask, (H, W), 0 or 1.

    Returns:
        (c, h, w), h and w at least 1.
    """
    box = line_box((position > 0.5).cpu().numpy())
    width = max(np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[2] - box[3]))
    height = max(np.linalg.norm(box[0] - box[3]), np.linalg.norm(box[1] - box[2]))
    upright = np.array([[0, 0], [width, 0], [width, height], [0, height]])
    to_upright = similarity(box, upright)  # (3, 3), pixels to pixels
    rows, columns = image.shape[1:]
    # torch samples in coordinates of [-1, 1] and wants the map from the result back to the source. With aligned
    # corners the scale would be 2 / (size - 1): upstream's is a pixel off at the far side, and kept.
    to_unit = np.array([[2 / columns, 0, -1], [0, 2 / rows, -1], [0, 0, 1]])
    back = np.linalg.inv(to_unit @ to_upright @ np.linalg.inv(to_unit))
    theta = torch.from_numpy(back[:2]).to(image)[None]  # (1, 2, 3)
    grid = functional.affine_grid(theta, [1, *image.shape], align_corners=True)
    turned = functional.grid_sample(image[None], grid, align_corners=True)[0].clamp(0, 255)
    return turned[:, : max(1, int(height)), : max(1, int(width))]


def line_box(mask: np.ndarray) -> np.ndarray:
    """Return the corners of the smallest rectangle around the largest blob of a mask, (4, 2) whole pixels.

    They come as top left, top right, bottom right, bottom left; the two with smaller x are the left ones.
    """
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) == 0:
        return FALLBACK_BOX
    largest = max(contours, key=cv2.contourArea)
    corners = np.trunc(cv2.boxPoints(cv2.minAreaRect(largest))).astype(np.float64)
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.stack([left[0], right[0], right[1], left[1]])


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the rotation, scale and shift that takes points closest to others, (3, 3).

    In the complex plane it is the least-squares fit of w = a z + b; the same as Umeyama 1991 without
    reflection. Points that all coincide are only shifted.
    """
    z, w = source @ np.array([1, 1j]), target @ np.array([1, 1j])
    spread = np.sum(np.abs(z - z.mean()) ** 2)
    a = np.sum(np.conj(z - z.mean()) * (w - w.mean())) / spread if spread > 0 else 1.0 + 0j
    if abs(a) < 1e-6:
        a = 1.0 + 0j
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag], [0, 0, 1]])
