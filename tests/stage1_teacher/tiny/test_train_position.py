from __future__ import annotations

import torch

from stage1_teacher.tiny.train_position import bumps, draw_boxes


def test_masks_cover_their_boxes() -> None:
    masks, boxes = draw_boxes(16, 96, 0, 0)
    assert masks.shape == (16, 1, 96, 96)
    area = boxes[:, 2] * boxes[:, 3]
    assert torch.allclose(masks.mean((1, 2, 3)), area, atol=0.02)
    at = (torch.arange(96) + 0.5) / 96
    y = (masks[:, 0].sum(2) * at).sum(1) / masks.sum((1, 2, 3))
    assert torch.allclose(y, boxes[:, 0], atol=0.02)


def test_bumps_tell_where_a_box_is() -> None:
    boxes = torch.tensor([[0.2, 0.5, 0.3, 0.9], [0.8, 0.5, 0.3, 0.9]])
    encoded = bumps(boxes, 64)
    assert encoded.shape == (2, 64)
    peaks = encoded[:, :24].argmax(1) / 23
    assert torch.allclose(peaks, boxes[:, 0], atol=0.05)
    assert torch.allclose(encoded[0, 24:], encoded[1, 24:])
