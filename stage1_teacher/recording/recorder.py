"""From drawn inputs to records: encode, solve or noise, round to what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.config import PrecomputeConfig
from common.schedule import make_alphas_cumprod, predict_x0, trailing_timesteps
from common.seeding import derive_seed, rng
from shards.records import record as shard_record
from shards.records.meta import SampleMeta
from shards.records.record import Record
from stage1_teacher.rendering.rendered_input import DrawnInput
from stage1_teacher.teacher.solver import make_predict, solve
from stage1_teacher.teacher.teacher import Conditioning, Teacher, Uncond


def round_half(values: Tensor) -> Tensor:
    """Round to what float16 can hold and go on in float32: the teacher sees exactly what is stored."""
    return values.half().float()


def round_uncond(uncond: shard_record.Uncond, teacher: Teacher) -> Uncond:
    """Take the unconditional contexts as a set stores them."""
    return Uncond(
        image_context=uncond.image_context.float().to(teacher.device),
        text_context=uncond.text_context.float().to(teacher.device),
    )


def make_stored_uncond(teacher: Teacher) -> shard_record.Uncond:
    """Encode the unconditional contexts as a set stores them."""
    uncond = teacher.unconditional()
    return shard_record.Uncond(
        image_context=uncond.image_context.half().cpu(), text_context=uncond.text_context.half().cpu()
    )


@dataclass(frozen=True, slots=True)
class _Item:
    """One solve: an input and which of its rollouts."""

    drawn: DrawnInput
    conditioning: Conditioning
    rollout: int

    @property
    def seed(self) -> int:
        return derive_seed(self.drawn.seed, self.drawn.input_id, "noise", self.rollout)


@dataclass(frozen=True, slots=True)
class _Solved:
    """What came of one item: S called states and the end, on the teacher's device."""

    states: Tensor  # (S + 1, C, h, w) float16
    timesteps: Tensor  # (S,)
    x0_cond: Tensor | None  # (S, C, h, w) float16
    x0_uncond: Tensor | None


class Recorder:
    """Makes records of drawn inputs, `batch_size` solves side by side."""

    def __init__(
        self,
        teacher: Teacher,
        uncond: shard_record.Uncond,
        settings: PrecomputeConfig,
        *,
        between_batches: Callable[[], None] = lambda: None,
        keep_rollouts: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Take the networks and how they are run.

        Args:
            teacher: the networks.
            uncond: the set's unconditional contexts.
            settings: how inputs are solved.
            between_batches: called before every batch of solves; may raise to stop.
            keep_rollouts: given whole rollouts, (B, N + 1, C, h, w) float16 on the CPU, of every batch of solves:
                inputs in order, of each its rollouts in order. Records are the same with and without it.
        """
        self._teacher, self._settings = teacher, settings
        self._uncond = round_uncond(uncond, teacher)
        self._between_batches, self._keep_rollouts = between_batches, keep_rollouts
        network = teacher.network
        side = settings.size // network.stride
        self._latent_shape = (network.latent_channels, side, side)
        self._grid = trailing_timesteps(settings.solver_steps)
        self._keep = range(0, settings.solver_steps, settings.record_every)

    def record(self, inputs: Sequence[DrawnInput]) -> list[Record]:
        """Encode and solve inputs.

        What a record holds depends on which inputs are given together, to about 1e-6 of its values.

        Args:
            inputs: at most `batch_size`, of one size; with `num_rollouts` R they make R full batches of solves.

        Raises:
            DataError: the teacher produced NaN or Inf.
        """
        if not inputs:
            return []
        conditionings = [_round_conditioning(item) for item in self._teacher.encode(inputs)]
        items = [
            _Item(drawn, conditioning, rollout)
            for drawn, conditioning in zip(inputs, conditionings, strict=True)
            for rollout in range(self._settings.num_rollouts)
        ]
        run = self._solve if self._settings.source == "rollout" else self._noise
        solved: list[_Solved] = []
        for start in range(0, len(items), self._settings.batch_size):
            self._between_batches()
            solved += run(items[start : start + self._settings.batch_size])
        count = self._settings.num_rollouts
        starts = range(0, len(items), count)
        return [self._assemble(items[start : start + count], solved[start : start + count]) for start in starts]

    def _draw_noise(self, item: _Item, count: int = 1) -> Tensor:
        """Draw on the CPU, so that devices agree, (count, C, h, w)."""
        generator = torch.Generator().manual_seed(item.seed)
        return torch.randn((count, *self._latent_shape), generator=generator)

    def _solve(self, batch: Sequence[_Item]) -> list[_Solved]:
        rollout = solve(
            self._teacher,
            [item.conditioning for item in batch],
            self._uncond,
            torch.cat([self._draw_noise(item) for item in batch]),
            self._grid,
            guidance_scale=self._settings.guidance_scale,
            keep=self._keep,
            store_predictions=self._settings.store_predictions,
            keep_all=self._keep_rollouts is not None,
        )
        if self._keep_rollouts is not None and rollout.all_states is not None:
            self._keep_rollouts(rollout.all_states.cpu())
        return [
            _Solved(states, rollout.timesteps, *predictions)
            for states, predictions in zip(
                rollout.states, _rows(len(batch), rollout.x0_cond, rollout.x0_uncond), strict=True
            )
        ]

    @torch.no_grad()
    def _noise(self, batch: Sequence[_Item]) -> list[_Solved]:
        """Noise data latents at timesteps drawn from the whole grid: z_t = alpha_t x0 + sigma_t eps.

        Source: Luo et al. 2023 (LCM), algorithm 1.
        """
        teacher, steps = self._teacher, len(self._keep)
        images = torch.stack([item.drawn.image for item in batch if item.drawn.image is not None])
        x0 = round_half(teacher.vae.encode(images.to(teacher.device, teacher.dtype)).float())  # (B, C, h, w)
        noise = torch.stack([self._draw_noise(item, steps) for item in batch]).to(x0.device)  # (B, S, C, h, w)
        timesteps = torch.stack([self._draw_timesteps(item) for item in batch])  # (B, S)
        alphas = make_alphas_cumprod()[timesteps].to(x0.device)[..., None, None, None]  # (B, S, 1, 1, 1)
        states = round_half(alphas.sqrt() * x0[:, None] + (1 - alphas).sqrt() * noise)  # (B, S, C, h, w)
        predicted = (
            self._predict(batch, states, timesteps, alphas) if self._settings.store_predictions else (None,) * 2
        )
        whole = torch.cat([states, x0[:, None]], dim=1).half()  # (B, S + 1, C, h, w)
        return [
            _Solved(rows, t, *predictions)
            for rows, t, predictions in zip(whole, timesteps, _rows(len(batch), *predicted), strict=True)
        ]

    def _draw_timesteps(self, item: _Item) -> Tensor:
        """Draw S different timesteps of the solver's grid, the same for all rollouts, descending, (S,)."""
        drawn = rng(item.drawn.seed, item.drawn.input_id, "timesteps").sample(self._grid.tolist(), len(self._keep))
        return torch.tensor(sorted(drawn, reverse=True))

    def _predict(
        self, batch: Sequence[_Item], states: Tensor, timesteps: Tensor, alphas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict x0 with and without the condition at every state, (B, S, C, h, w) float16 each."""
        predict = make_predict(self._teacher, [item.conditioning for item in batch], self._uncond)
        cond, uncond = [], []
        for step in range(states.shape[1]):
            z, alpha = states[:, step], alphas[:, step]
            eps_cond, eps_uncond = predict(z, timesteps[:, step].to(z.device))
            assert eps_uncond is not None
            cond.append(predict_x0(z, eps_cond, alpha).half())
            uncond.append(predict_x0(z, eps_uncond, alpha).half())
        return torch.stack(cond, dim=1), torch.stack(uncond, dim=1)

    def _assemble(self, items: Sequence[_Item], solved: Sequence[_Solved]) -> Record:
        """Join an input's rollouts into its record, on the CPU."""
        drawn, conditioning = items[0].drawn, items[0].conditioning

        def stack(values: Sequence[Tensor | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            return torch.stack(present).cpu() if present else None  # (R, ...)

        states = stack([rollout.states for rollout in solved])
        assert states is not None
        return Record(
            meta=SampleMeta(
                input_id=drawn.input_id,
                caption=drawn.caption,
                text_caption=drawn.text_caption,
                texts=drawn.texts,
                languages=drawn.languages,
                polygons=drawn.polygons,
                mode=drawn.mode,
                source=self._settings.source,
                seeds=tuple(item.seed for item in items),
                size=drawn.size,
                guidance_scale=self._settings.guidance_scale,
            ),
            image_context=conditioning.image_context.half().cpu(),
            text_context=conditioning.text_context.half().cpu(),
            masked_latents=conditioning.masked_latents.half().cpu(),
            rollout_latents=states,
            rollout_timesteps=solved[0].timesteps.cpu(),
            x0_cond=stack([rollout.x0_cond for rollout in solved]),
            x0_uncond=stack([rollout.x0_uncond for rollout in solved]),
            glyphs=drawn.glyphs,
            positions=drawn.positions.sum(0, keepdim=True, dtype=torch.uint8),
        )


def _round_conditioning(conditioning: Conditioning) -> Conditioning:
    return replace(
        conditioning,
        image_context=round_half(conditioning.image_context),
        text_context=round_half(conditioning.text_context),
        masked_latents=round_half(conditioning.masked_latents),
    )


def _rows(count: int, cond: Tensor | None, uncond: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]]:
    """Take predictions (B, S, C, h, w) apart by sample; both None if there are none."""
    if cond is None or uncond is None:
        return [(None, None)] * count
    return list(zip(cond, uncond, strict=True))
