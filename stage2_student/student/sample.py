"""Sampling a student: its M steps at its own timesteps, one UNet call a step and no guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.anytext2.checkpoint import load_denoiser, load_vae
from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.fingerprint import fingerprint
from common.anytext2.vae import VAE
from common.config import Config
from common.ddim import CLEAN, Crossing, consistency_value, cross_by_ddim, integrate
from common.errors import UsageError
from common.machine import resolve_device
from common.pictures import Picture
from common.schedule import diffuse
from common.seeding import generator
from shards.reading.reader import ShardSet
from shards.records.meta import SampleMeta
from stage2_student.student.adapter import Card, attach_adapter, find_adapter, read_card
from stage2_student.student.exported import read_metadata
from stage2_student.student.lora import merge
from stage2_student.student.shard_facts import read_facts, require_base
from stage2_student.student.student import DTYPES, Student, load_base


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedStudent:
    """A student ready to sample: its adapter is in the weights."""

    student: Student
    """With its adapter merged into the weights."""
    card: Card
    """How it is to be sampled."""
    device: torch.device
    """Where it computes."""

    @staticmethod
    def load(config: Config, adapter: Path, steps: int | None = None) -> LoadedStudent:
        """Load the base and a run's adapter.

        Args:
            config: its [model] section.
            adapter: a run's folder, a checkpoint, an adapter's folder, or a file that `export` wrote.
            steps: the number of steps that was asked for, or None for the student's own.

        Raises:
            UsageError: the student was trained for another number of steps.
            DataError: no adapter there, or it belongs to another base.
        """
        folder = find_adapter(adapter)
        card = read_card(folder)
        card.require_steps(steps)  # before the base is loaded
        device, dtype = resolve_device(config.model.device), DTYPES[config.model.dtype]
        if folder.is_file() and read_metadata(folder).get("layout") == "merged":
            card.require_base(fingerprint(config.find_checkpoint(), "base"), folder)
            base = load_denoiser(config.load_network(), folder, dtype, device)
            student = Student(base.unet, base.writenet)
            return LoadedStudent(student=student.requires_grad_(False), card=card, device=device)
        student, checkpoint = load_base(config, dtype, device)
        attach_adapter(student, folder, fingerprint(checkpoint, "base"))
        for model in student.parts.values():
            merge(model)  # sampling changes no adapter: what it adds to every layer's work can be spared
        return LoadedStudent(student=student.requires_grad_(False), card=card, device=device)

    def noise(self, seed: int, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """Draw the noise of numbered images; an image's depends on (seed, number) alone.

        Args:
            seed: chosen by the user.
            numbers: B of them.
            shape: of the latents, (C, h, w).

        Returns:
            (B, K, C, h, w): z at the first timestep, then, for sampler "lcm", the noise added before each later
            step.
        """
        return torch.stack([draw_noise(seed, number, shape, self.card.num_noises) for number in numbers])

    @torch.no_grad()
    def latents(
        self,
        conditioning: ConditioningBatch,
        noise: Tensor,
        on_state: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample B images.

        Args:
            conditioning: of B images.
            noise: see `noise`, (B, K, C, h, w).
            on_state: given the timestep at which each step ends, `CLEAN` for the last one's, and the state there,
                (B, C, h, w); of sampler "lcm" only the end, as noise of its own is in every other state.

        Returns:
            Latents, (B, C, h, w) float32.

        Source: Song et al. 2021 (DDIM), equation 12, eta = 0; Luo et al. 2023 (LCM), algorithm 3, for "lcm".
        """
        conditioning = conditioning.to(self.device, self.student.dtype)
        noise = noise.to(self.device, torch.float32)
        control = self.student.control(conditioning)  # depends on neither z_t nor t: once

        def predict(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
            return self.student(noisy_latents, timesteps, conditioning, control).float()

        def cross_by_consistency(noisy_latents: Tensor, eps: Tensor, crossing: Crossing) -> Tensor:
            clean = consistency_value(noisy_latents, eps, crossing.timesteps, crossing.alphas_cumprod)
            later = crossing.index + 1
            if later == grid.num_steps:
                return clean
            return diffuse(clean, noise[:, later], crossing.alphas_cumprod_end)

        grid = self.card.solve
        ends = [*self.card.timesteps[1:], CLEAN]

        def on_step(index: int, z: Tensor) -> Tensor:
            if on_state is not None and index and (index == grid.num_steps or self.card.sampler == "ddim"):
                on_state(ends[index - 1], z)
            return z

        cross = cross_by_ddim if self.card.sampler == "ddim" else cross_by_consistency
        return integrate(predict, noise[:, 0], grid, on_step, cross=cross)


def draw_noise(seed: int, number: int, shape: tuple[int, ...], count: int = 1) -> Tensor:
    """Draw the noise of one numbered image, (count, C, h, w); more of it leaves the first unchanged."""
    return torch.randn((count, *shape), generator=generator(seed, "sample", number))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Start:
    """What images are sampled from."""

    conditioning: Conditioning
    """Of all of them."""
    noise: Tensor | None = None
    """The noise that the teacher had, (B, C, h, w) float32; None if any will do."""
    x0: Tensor | None = None
    """What the teacher made of it, likewise."""
    meta: SampleMeta | None = None
    """Of a record, what it says of itself."""


def read_start(config: Config, location: str, index: int, seed: int | None, num_images: int) -> Start:
    """Read a record to sample from; its own noise and solved latents unless a seed asks for others.

    Args:
        config: its [model] section.
        location: the set's folder or URL.
        index: of the record.
        seed: chosen by the user; None for the recorded noise.
        num_images: B.

    Raises:
        UsageError: there is no such record, or it holds fewer solves.
        DataError: the set cannot be read, or belongs to another base.
    """
    shards = ShardSet.open(location, allow_incomplete=True)
    if not 0 <= index < len(shards):
        raise UsageError(f"--record {index}: {location} holds records 0 to {len(shards) - 1}")
    require_base(read_facts(shards), fingerprint(config.find_checkpoint(), "base"), location)
    record = shards[index]
    if seed is not None or record.meta.source == "noised":
        return Start(conditioning=record.conditioning, meta=record.meta)
    if num_images > record.num_rollouts:
        raise UsageError(
            f"--num-images {num_images}: the record holds {record.num_rollouts} solves; give --seed for more"
        )
    solves = record.rollout_latents[:num_images].float()  # (B, S + 1, C, h, w)
    x0 = solves[:, -1] if record.meta.source == "rollout" else None  # else it did not start from this noise
    return Start(conditioning=record.conditioning, noise=solves[:, 0], x0=x0, meta=record.meta)


def load_decoder(config: Config) -> VAE:
    """Load the autoencoder that turns latents into images.

    Raises:
        DataError: the checkpoint lacks it, or is of another network.
    """
    where = DTYPES[config.model.dtype], resolve_device(config.model.device)
    return load_vae(config.load_network(), config.find_checkpoint(), *where)


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> list[Picture]:
    """Decode latents one by one.

    Args:
        vae: on any device, in any float type.
        latents: (B, C, h, w), any float type and device.
    """
    parameter = next(vae.parameters())
    pictures = []
    for one in latents.to(parameter.device, parameter.dtype).split(1):
        image = vae.decode(one)[0].float().clamp(-1, 1)  # (3, H, W)
        pictures.append(((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    return pictures
