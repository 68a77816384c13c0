"""From networks to the runs of an evaluation: the same noise for all, time and evaluations measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.anytext2.conditioning import ConditioningBatch
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.files import sha256_file
from common.pictures import Picture
from common.seeding import generator
from stage2_student.evaluation.counting import count_evaluations
from stage2_student.evaluation.runs import Job, Run, Sampled
from stage2_student.evaluation.solves import EndpointMeasure
from stage2_student.student.adapter import adapter_files, find_adapter, read_card
from stage2_student.student.sample import LoadedStudent

OnState = Callable[[int, Tensor], None]
"""Takes the timestep at which a step ended, and the state there, (B, C, h, w)."""
DrawNoise = Callable[[Sequence[Job], int], Tensor]
"""(B images, K) to their noises, (B, K, C, h, w) float32 on the CPU."""


class Sampler(Protocol):
    """Networks that turn noise into image latents in one way: the teacher on some grid, a student."""

    @property
    def label(self) -> str:
        """For the tables."""

    @property
    def kind(self) -> str:
        """Say "teacher" or "student"."""

    @property
    def steps(self) -> int:
        """Solver steps."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the images depend on besides the inputs, as JSON values."""

    @property
    def noises(self) -> int:
        """Noises needed per image."""

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Return the UNet and the WriteNet whose evaluations are counted."""

    def prepare(self, input_ids: Sequence[str]) -> Any:
        """Encode inputs; not timed."""

    def latents(self, prepared: Any, noise: Tensor, on_state: OnState | None = None) -> Tensor:
        """Turn noise (B, K, C, h, w) into latents (B, C, h, w).

        Args:
            prepared: see `prepare`.
            noise: of B images.
            on_state: given the timestep at which each step ends (`CLEAN` for the last one's) and the state there,
                (B, C, h, w), where these can be compared with the teacher's.
        """


def sampler_run(
    sampler: Sampler,
    *,
    seed: int,
    noise_of: DrawNoise,
    decode: Callable[[Tensor], Sequence[Picture]],
    measure: EndpointMeasure | None = None,
    keep: Callable[[Sequence[Job], Tensor], None] | None = None,
) -> Run:
    """Return the run of a sampler.

    Args:
        sampler: the networks; loaded when it first samples.
        seed: evaluate.seed, which keys the noise.
        noise_of: the noise that images are sampled from, the same whoever samples.
        decode: latents (B, C, h, w) to pictures on the CPU.
        measure: measures batches against the teacher's own solves; None measures none.
        keep: given each batch's latents before it is measured, if they are these solves.
    """
    warm = False

    def sample(jobs: Sequence[Job]) -> Sampled:
        nonlocal warm
        prepared = sampler.prepare([layout.layout_id for layout, _ in jobs])
        noise = noise_of(jobs, sampler.noises)
        states: list[tuple[int, Tensor]] = []

        def on_state(timestep: int, state: Tensor) -> None:
            states.append((timestep, state))

        if not warm:  # one image for nothing: a network's first call allocates, chooses kernels, reads weights in
            decode(sampler.latents(sampler.prepare([jobs[0][0].layout_id]), noise[:1]))
            warm = True
        unet, writenet = sampler.modules()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # preparing must not be timed as sampling
        with count_evaluations(unet=unet, writenet=writenet) as counts:
            begun = time.perf_counter()
            latents = sampler.latents(prepared, noise, on_state if measure and measure.along_the_way else None)
            pictures = decode(latents)
            seconds = time.perf_counter() - begun
        if keep is not None:
            keep(jobs, latents)
        return Sampled(
            images=pictures,
            seconds=seconds,
            unet_evaluations=counts["unet"],
            writenet_evaluations=counts["writenet"],
            distances=() if measure is None else measure(jobs, latents, pictures, states),
        )

    return Run(
        label=sampler.label,
        kind=sampler.kind,
        sample=sample,
        steps=sampler.steps,
        settings={**sampler.settings, "seed": seed},
    )


def draw_noise(seed: int, jobs: Sequence[Job], shape: tuple[int, ...], count: int = 1) -> Tensor:
    """Draw the noise of each job: the same for every run of an evaluation, whoever samples.

    Args:
        seed: evaluate.seed.
        jobs: B of them.
        shape: of the latents, (C, h, w).
        count: noises per image; more of them leave the first unchanged.

    Returns:
        (B, count, C, h, w) float32, on the CPU.
    """
    return torch.stack(
        [
            torch.randn((count, *shape), generator=generator(seed, "evaluate", layout.layout_id, sample))
            for layout, sample in jobs
        ]
    )


class StudentSampler:
    """A trained student, sampling in its own steps. The base is loaded when it first samples."""

    kind = "student"

    def __init__(
        self, config: Config, adapter: Path, name: str, condition: Callable[[Sequence[str]], ConditioningBatch]
    ) -> None:
        """Find the adapter.

        Args:
            config: model is used.
            adapter: a run's folder, a checkpoint, an adapter's folder, or an exported file.
            name: for the label.
            condition: encodes inputs by their ids.

        Raises:
            DataError: there is no adapter.
        """
        folder = find_adapter(adapter)
        card = read_card(folder)
        self._load = cache(lambda: LoadedStudent.load(config, folder))
        self.prepare = condition
        self.label = f"{name}, {card.num_steps} step{'s' if card.num_steps > 1 else ''}"
        self.steps, self.noises = card.num_steps, card.num_noises
        self.settings: Mapping[str, Any] = {
            "adapter": {name: sha256_file(file)[:16] for name, file in adapter_files(folder).items()},
            "base": card.base_fingerprint,
            "teacher": fingerprint(config.find_checkpoint(), "teacher"),
            "objective": card.objective,
            "trained_steps": card.step,
            "timesteps": list(card.timesteps),
            "sampler": card.sampler,
            "rank": card.rank,
            "dtype": config.model.dtype,
        }

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Return UNet and WriteNet, with their adapters."""
        student = self._load().student
        return student.unet, student.writenet

    def latents(self, prepared: ConditioningBatch, noise: Tensor, on_state: OnState | None = None) -> Tensor:
        """Sample latents, (B, C, h, w), from noise (B, K, C, h, w); see `Sampler.latents`."""
        return self._load().latents(prepared, noise, on_state)
