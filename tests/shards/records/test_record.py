from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from common.anytext2.conditioning import Uncond
from common.errors import DataError
from shards.records.meta import SampleMeta
from shards.records.record import NonFiniteError, Record, check_uncond
from tests.shards.builders import CHANNELS, SIDE, STRIDE, make_meta, make_record, make_uncond

GOOD = make_record("good", predictions=True)


def with_value(name: str, value: float) -> torch.Tensor:
    tensor = getattr(GOOD, name).clone()
    tensor.view(-1)[-1] = value
    return tensor


BAD_FIELDS: list[tuple[str, Any]] = [
    *((name, getattr(GOOD, name).float()) for name in Record.__slots__ if name != "meta"),  # dtype
    *((name, getattr(GOOD, name)[..., :0]) for name in Record.__slots__ if name != "meta"),  # empty
    *((name, getattr(GOOD, name)[None]) for name in Record.__slots__ if name != "meta"),  # rank
    *((name, getattr(GOOD, name).tolist()) for name in Record.__slots__ if name != "meta"),  # no tensor
    *((name, getattr(GOOD, name).to("meta")) for name in Record.__slots__ if name != "meta"),  # device
    *((name, getattr(GOOD, name)[..., :-1]) for name in ("text_context", "rollout_latents", "glyphs", "x0_cond")),
    ("image_context", GOOD.image_context[:-1]),  # no multiple of 77
    ("image_context", GOOD.image_context[:0]),
    ("masked_latents", GOOD.masked_latents[:, :3]),  # no stride fits
    ("rollout_latents", GOOD.rollout_latents[:, :-1]),  # S + 1 states
    ("rollout_timesteps", torch.tensor([1000, 3, 2, 1])),
    ("rollout_timesteps", torch.tensor([3, 2, 1, -1])),
    ("rollout_timesteps", torch.tensor([9, 9, 2, 1])),  # not falling
    ("rollout_timesteps", torch.tensor(3)),
    ("glyphs", GOOD.glyphs * 2),
    ("x0_cond", None),  # without its pair
    ("x0_uncond", None),
]


@pytest.mark.parametrize("name, value", BAD_FIELDS)
def test_a_record_refuses_a_wrong_tensor_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"record 'good': .*{name}"):
        dataclasses.replace(GOOD, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["image_context", "text_context", "masked_latents", "rollout_latents", "x0_cond", "x0_uncond"]
)
def test_a_record_refuses_what_is_not_finite_with_an_error_of_its_own(name: str, value: float) -> None:
    with pytest.raises(NonFiniteError, match=name):
        dataclasses.replace(GOOD, **{name: with_value(name, value)})


@pytest.mark.parametrize("timesteps", [(999, 499), (999, 499, 498), (499, 999, 999), (999, 999, 999)])
def test_a_students_timesteps_are_starts_and_ends_in_turn(timesteps: tuple[int, ...]) -> None:
    def make(timesteps: tuple[int, ...]) -> Record:
        states = torch.zeros(1, len(timesteps) + 1, CHANNELS, SIDE // STRIDE, SIDE // STRIDE).half()
        given = {"rollout_latents": states, "rollout_timesteps": torch.tensor(timesteps)}
        return make_record("a", meta=make_meta("a", source="student"), **given)

    assert make((999, 499, 499, 249, 249)).meta.source == "student"
    with pytest.raises(DataError, match="expected t of each phase's start and end in turn"):
        make(timesteps)


def test_noised_timesteps_need_not_fall() -> None:
    timesteps = torch.tensor([5, 900, 5, 17])
    record = dataclasses.replace(GOOD, meta=make_meta("good", source="noised"), rollout_timesteps=timesteps)
    assert torch.equal(record.rollout_timesteps, timesteps)


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, None) for name in SampleMeta.model_fields),
        *((name, object()) for name in SampleMeta.model_fields),
        ("input_id", ""),
        ("caption", "\ud800"),  # a lone surrogate has no UTF-8
        ("texts", []),
        ("texts", "abc"),
        ("texts", [1]),
        ("languages", ["Latin", "Latin"]),
        ("polygons", [[(0, 0), (1, 1)]]),
        ("polygons", [[(0, 0), (1, 1), (2, float("nan"))]]),
        ("polygons", [[(0, 0), (1, 1), (2, 10**400)]]),
        ("polygons", [[(0, 0), (1, 1), (2, 2, 2)]]),
        ("polygons", [[(0, 0), (1, 1), (True, 2)]]),
        ("polygons", []),
        ("mode", "draw"),
        ("source", "noise"),
        ("seeds", []),
        ("seeds", [-1]),
        ("seeds", [2**63]),
        ("seeds", [0.5]),
        ("size", (32,)),
        ("size", (0, 32)),
        ("size", (32.0, 32.0)),
        ("guidance_scale", float("inf")),
        ("guidance_scale", "7.5"),
    ],
)
def test_metadata_refuses_a_wrong_value_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=name):
        make_meta("good", **{name: value})


def test_a_record_refuses_a_size_beyond_what_masks_can_have() -> None:
    with pytest.raises(DataError, match="glyphs has shape"):
        dataclasses.replace(GOOD, meta=make_meta("good", size=(32, 40)))
    huge = torch.zeros(1, 1, 8200, dtype=torch.uint8)
    with pytest.raises(DataError, match="at most 8192"):
        dataclasses.replace(GOOD, meta=make_meta("good", size=(1, 8200)), glyphs=huge, positions=huge)


def test_unconditional_contexts_are_checked_too() -> None:
    good = make_uncond()
    with pytest.raises(DataError, match="text_context"):
        check_uncond(Uncond(image_context=good.image_context, text_context=good.text_context[:-1]))
    with pytest.raises(NonFiniteError, match="image_context"):
        check_uncond(Uncond(image_context=good.image_context * float("nan"), text_context=good.text_context))
