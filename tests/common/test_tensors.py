"""Changing all tensors of a dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from common.anytext2.conditioning import ConditioningBatch, Hints
from common.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inner(Tensors):
    values: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outer(Tensors):
    inner: Inner
    by_name: dict[str, Tensor] = field(default_factory=dict)
    missing: Tensor | None = None
    name: str = ""
    counts: tuple[int, ...] = ()


def make(value: float) -> Outer:
    return Outer(
        inner=Inner(values=torch.tensor(value)), by_name={"a": torch.tensor(-value)}, name="n", counts=(1,)
    )


def test_every_tensor_changes_and_nothing_else() -> None:
    before = make(3.0)
    after = before.map(lambda tensor: tensor * 2)
    assert (float(after.inner.values), float(after.by_name["a"])) == (6, -6)
    assert (after.missing, after.name, after.counts) == (None, "n", (1,))
    assert float(before.inner.values) == 3


def test_tensors_at_the_same_place_meet() -> None:
    joined = make(1.0).map(lambda one, other: torch.stack([one, other]), make(2.0))
    assert joined.inner.values.tolist() == [1, 2] and joined.by_name["a"].tolist() == [-1, -2]


def test_moving_to_a_type_leaves_masks_of_booleans() -> None:
    conditioning = ConditioningBatch(
        image_context=torch.zeros(1, 2, 4).half(),
        context_mask=torch.tensor([[True, False]]),
        text_context=torch.zeros(1, 2, 4).half(),
        hints=Hints(
            glyphs=torch.zeros(1, 1, 8, 8).byte(),
            positions=torch.zeros(1, 1, 8, 8).byte(),
            masked_latents=torch.zeros(1, 4, 1, 1).half(),
        ),
    )
    moved = conditioning.to("cpu", torch.float32)
    tensors = (moved.image_context, moved.text_context, moved.hints.glyphs, moved.hints.masked_latents)
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert moved.context_mask is not None and moved.context_mask.dtype == torch.bool
    assert conditioning.to("cpu").hints.glyphs.dtype == torch.uint8  # no type is asked for


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA driver")
def test_every_tensor_is_pinned() -> None:
    pinned = make(1.0).pin_memory()
    assert pinned.inner.values.is_pinned() and pinned.by_name["a"].is_pinned()


def test_what_is_sent_is_what_is_moved() -> None:
    sent = make(3.0).send("cpu")
    assert (float(sent.inner.values), float(sent.by_name["a"]), sent.missing) == (3, -3, None)
