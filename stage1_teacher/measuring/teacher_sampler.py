"""The teacher as one who samples in an evaluation: on any grid, also with a part of it left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.denoiser import predict_branches
from common.anytext2.fingerprint import fingerprint
from common.anytext2.unet import UNet
from common.anytext2.writenet import WriteNet
from common.config import Config
from common.ddim import Grid, parse_grid
from common.errors import UsageError
from stage1_teacher.measuring.ablations import ABLATIONS, split_parts
from stage1_teacher.teacher.solver import record_rollout
from stage1_teacher.teacher.teacher import Teacher

BASELINE_STEPS = (8, 4, 2, 1)
"""Steps on the trailing grid: what a user gets who samples the undistilled teacher in a student's few steps."""
UNGUIDED_STEPS = (4, 2, 1)
"""Likewise without guidance: the undistilled network at a student's very price, a UNet call a step."""
ABLATION_GRID = "upstream:20"


class Encodes(Protocol):
    """Knows inputs by their ids, and what the teacher is given of them."""

    def encode(self, teacher: Teacher, input_ids: Sequence[str], without: str = "") -> list[Conditioning]:
        """Return the conditioning of inputs, with a part left out as `split_parts` takes it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherSampler:
    """The teacher, set to sample in one way."""

    label: str
    """For the tables."""
    held_out: Encodes
    load: Callable[[], tuple[Teacher, Uncond]]
    """Loads the networks once, when they are needed."""
    grid: Grid
    guidance_scale: float
    """s in eps_u + s (eps_c - eps_u)."""
    settings: dict[str, Any]
    """What the images depend on, besides the inputs."""
    record_every: int = 0
    """Round every this many-th state to float16, as a rollout does; 0 rounds none."""
    without: str = ""
    """What of AnyText2 to leave out, as `split_parts` takes it; empty for the whole network."""

    @property
    def kind(self) -> str:
        """Say who samples."""
        return "teacher"

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return self.grid.num_steps

    @property
    def noises(self) -> int:
        """Noises needed per image."""
        return 1

    def modules(self) -> tuple[UNet, WriteNet]:
        """Return the networks whose evaluations are counted."""
        teacher, _ = self.load()
        return teacher.denoiser.unet, teacher.denoiser.writenet

    def prepare(self, input_ids: Sequence[str]) -> list[Conditioning]:
        """Encode inputs."""
        return self.held_out.encode(self.load()[0], input_ids, self.without)

    @torch.no_grad()
    def latents(
        self,
        conditionings: Sequence[Conditioning],
        noise: Tensor,
        on_state: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Solve from noise to image latents.

        Args:
            conditionings: B of one image size.
            noise: (B, 1, C, h, w).
            on_state: given the timestep at which each step ends, `CLEAN` for x0, and the state there, (B, C, h, w)
                rounded to float16.

        Returns:
            (B, C, h, w) float32.

        Raises:
            DataError: the teacher produced NaN or Inf.
        """
        teacher, uncond = self.load()
        rounds, left_out = self.record_every > 0, split_parts(self.without)
        # As objects of their own: images that share an input must not share its WriteNet evaluations, or the cost
        # of an image would depend on how many are rendered of it.
        predict = predict_branches(
            teacher.denoiser,
            [replace(item) for item in conditionings],
            None if self.guidance_scale == 1 else uncond,
            attnx_scale=0.0 if "attnx" in left_out else 1.0,
            with_writenet="writenet" not in left_out,
        )
        rollout = record_rollout(
            predict,
            noise[:, 0].to(teacher.device, torch.float32),
            self.grid,
            guidance_scale=self.guidance_scale,
            keep=range(0, self.grid.num_steps, self.record_every) if rounds else (),
            round_states=rounds,
            keep_all=on_state is not None,
        )
        if on_state is not None and rollout.all_states is not None:
            ends = [*self.grid.timesteps.tolist()[1:], int(self.grid.end)]
            for timestep, state in zip(ends, rollout.all_states.unbind(dim=1)[1:], strict=True):
                on_state(timestep, state)
        return rollout.states[:, -1].float()


def teacher_samplers(
    config: Config,
    held_out: Encodes,
    load: Callable[[], tuple[Teacher, Uncond]],
    grids: Sequence[str],
    without: Sequence[str],
) -> list[TeacherSampler]:
    """Return the ways in which the teacher is to sample.

    Args:
        config: model and precompute are used.
        held_out: the inputs.
        load: loads the networks; called when the first image is rendered.
        grids: like "upstream:20", or "trailing:4@1" with another guidance scale than precompute.guidance_scale.
            The one that stage one records on samples as it does there, rounding included.
        without: what to leave out, each as `split_parts` takes it, on `ABLATION_GRID`.

    Raises:
        UsageError: a grid, a guidance scale or a part is unknown.
    """
    settings = {"teacher": fingerprint(config.find_checkpoint(), "teacher"), "dtype": config.model.dtype}

    def make(text: str, part: str = "") -> TeacherSampler:
        name, guidance = _split_guidance(text, config.precompute.guidance_scale)
        grid, usual = parse_grid(name), guidance == config.precompute.guidance_scale
        recorded = name == recorded_grid(config) and usual and not part
        notes = "as recorded" if recorded else f"{name.partition(':')[0]} grid"
        if not usual:
            notes += ", no guidance" if guidance == 1 else f", guidance {guidance:g}"
        left_out = f" without {part.replace('-', ' ').replace('+', ' and ')}" if part else ""
        return TeacherSampler(
            label=f"teacher, {grid.num_steps} step{'s' if grid.num_steps > 1 else ''} ({notes}){left_out}",
            held_out=held_out,
            load=load,
            grid=grid,
            guidance_scale=guidance,
            settings={
                **settings,
                "guidance_scale": guidance,
                "grid": name,
                "without": part,
                "rounds_states": recorded,
            },
            record_every=config.precompute.record_every if recorded else 0,
            without=part,
        )

    if "" in without:
        raise UsageError(f"--without: received nothing, expected one of {', '.join(sorted(ABLATIONS))}")
    without = list(dict.fromkeys("+".join(split_parts(part)) for part in without))
    if without:  # with what it is compared
        grids = [*grids, ABLATION_GRID]
    found = [make(name) for name in grids] + [make(ABLATION_GRID, part) for part in without]
    return list({one.label: one for one in found}.values())  # a solve may be named in two ways


def _split_guidance(text: str, usual: float) -> tuple[str, float]:
    """Split GRID:STEPS[@S] into the grid's name and the guidance scale."""
    name, at, scale = text.partition("@")
    if not at:
        return name, usual
    try:
        guidance = float(scale)
    except ValueError:
        guidance = math.nan
    if not 1 <= guidance < math.inf:
        raise UsageError(f"teacher {text!r}: received guidance {scale!r}, expected a number from 1, e.g. {name}@1")
    return name, guidance


def recorded_grid(config: Config) -> str:
    """Return the grid that stage one records on: the ceiling of what its students can learn."""
    return f"trailing:{config.precompute.solver_steps}"


def default_grids(config: Config) -> tuple[str, ...]:
    """Return the grids of the usual comparison, the upstream project's own first."""
    few = (f"trailing:{steps}" for steps in BASELINE_STEPS)
    unguided = (f"trailing:{steps}@1" for steps in UNGUIDED_STEPS if config.precompute.guidance_scale != 1)
    return tuple(dict.fromkeys((ABLATION_GRID, recorded_grid(config), *few, *unguided)))
