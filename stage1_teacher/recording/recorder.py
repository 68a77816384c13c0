"""From rendered inputs to records: encode, solve or noise, round to what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.denoiser import predict_branches
from common.ddim import trailing_grid
from common.schedule import diffuse, make_alphas_cumprod, predict_x0
from common.sections import PrecomputeConfig
from common.seeding import derive_seed, rng
from common.tensors import Tensors
from shards.records.meta import SampleMeta
from shards.records.record import Record
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.teacher import Teacher


def round_half(values: Tensor) -> Tensor:
    """Round to what float16 can hold and go on in float32: the teacher sees exactly what is stored."""
    return values.half().float()


@dataclass(frozen=True, slots=True)
class _Item:
    """One solve: an input and which of its rollouts."""

    rendered: RenderedInput
    conditioning: Conditioning
    rollout: int

    @property
    def seed(self) -> int:
        return derive_seed(self.rendered.seed, self.rendered.input_id, "noise", self.rollout)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solved(Tensors):
    """What came of a batch of items, in their order: S called states and the end of each, on one device."""

    states: Tensor
    """(B, S + 1, C, h, w) float16."""
    timesteps: Tensor
    """(B, S) int64."""
    x0_cond: Tensor | None
    """(B, S, C, h, w) float16."""
    x0_uncond: Tensor | None
    """Likewise."""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> _Solved:
        return self.map(lambda values: values[rows])

    def then(self, later: _Solved) -> _Solved:
        """Put a later batch's items behind these."""
        return self.map(lambda *values: torch.cat(values), later)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """What a batch of solves gave."""

    records: list[Record]
    """Of the inputs whose last rollout was in the batch, in order."""
    rollouts: Tensor | None
    """Every state of the batch's solves, (B, N + 1, C, h, w) float16 on the CPU, if they are wanted: inputs in
    order, of each its rollouts in order."""


class Recorder:
    """Makes records of rendered inputs, `batch_size` solves side by side."""

    def __init__(
        self, teacher: Teacher, uncond: Uncond, settings: PrecomputeConfig, *, whole_rollouts: bool = False
    ) -> None:
        """Take the networks and how they are run.

        Args:
            teacher: the networks.
            uncond: the set's unconditional contexts, as it stores them.
            settings: how inputs are solved.
            whole_rollouts: give every state of the solves too; records are the same with and without them.
        """
        self._teacher, self._settings = teacher, settings
        self._uncond, self._whole_rollouts = uncond.to(teacher.device, torch.float32), whole_rollouts
        self._grid = trailing_grid(settings.solver_steps)
        self._keep = range(0, settings.solver_steps, settings.record_every)

    def record(self, inputs: Sequence[RenderedInput]) -> Iterator[Recorded]:
        """Encode and solve inputs; yields after every batch of solves, so that the caller may stop in between.

        What a record holds depends on which inputs are given together, to about 1e-6 of its values.

        Args:
            inputs: at most `batch_size`, of one size; with `num_rollouts` R they make R full batches of solves.

        Raises:
            DataError: the teacher produced NaN or Inf.
        """
        if not inputs:
            return
        encoded = [_round_conditioning(item) for item in self._teacher.encode(inputs)]
        count = self._settings.num_rollouts
        items = [_Item(*pair, rollout) for pair in zip(inputs, encoded, strict=True) for rollout in range(count)]
        done, waiting = 0, None  # items in records; solves of an input that is not whole yet
        for start in range(0, len(items), self._settings.batch_size):
            batch = items[start : start + self._settings.batch_size]
            solved, rollouts = self._run(batch)
            solved = solved.to("cpu")  # where records are
            waiting = solved if waiting is None else waiting.then(solved)
            records = []
            while len(waiting) >= count:
                records.append(self._assemble(items[done : done + count], waiting[:count]))
                done, waiting = done + count, waiting[count:]
            yield Recorded(records=records, rollouts=rollouts)

    def _run(self, batch: Sequence[_Item]) -> tuple[_Solved, Tensor | None]:
        return self._solve(batch) if self._settings.source == "rollout" else (self._noise(batch), None)

    def _draw_noise(self, item: _Item, count: int = 1) -> Tensor:
        """Draw on the CPU, so that devices agree, (count, C, h, w)."""
        generator = torch.Generator().manual_seed(item.seed)
        return torch.randn((count, *item.conditioning.masked_latents.shape), generator=generator)

    def _solve(self, batch: Sequence[_Item]) -> tuple[_Solved, Tensor | None]:
        rollout = solve(
            self._teacher,
            [item.conditioning for item in batch],
            self._uncond,
            torch.cat([self._draw_noise(item) for item in batch]),
            self._grid,
            guidance_scale=self._settings.guidance_scale,
            keep=self._keep,
            store_predictions=self._settings.store_predictions,
            keep_all=self._whole_rollouts,
        )
        solved = _Solved(
            states=rollout.states,
            timesteps=rollout.timesteps.expand(len(batch), -1),
            x0_cond=rollout.x0_cond,
            x0_uncond=rollout.x0_uncond,
        )
        return solved, None if rollout.all_states is None else rollout.all_states.cpu()

    @torch.no_grad()
    def _noise(self, batch: Sequence[_Item]) -> _Solved:
        """Noise data latents at timesteps rendered from the whole grid: z_t = alpha_t x0 + sigma_t eps.

        Source: Luo et al. 2023 (LCM), algorithm 1.
        """
        teacher, steps = self._teacher, len(self._keep)
        images = torch.stack([item.rendered.image for item in batch if item.rendered.image is not None])
        x0 = round_half(teacher.vae.encode(images.to(teacher.device, teacher.dtype)).float())  # (B, C, h, w)
        noise = torch.stack([self._draw_noise(item, steps) for item in batch]).to(x0.device)  # (B, S, C, h, w)
        timesteps = torch.stack([self._draw_timesteps(item) for item in batch])  # (B, S)
        alphas = make_alphas_cumprod()[timesteps].to(x0.device)[..., None, None, None]  # (B, S, 1, 1, 1)
        states = round_half(diffuse(x0[:, None], noise, alphas))  # (B, S, C, h, w)
        predicted = (
            self._predict(batch, states, timesteps, alphas) if self._settings.store_predictions else (None,) * 2
        )
        whole = torch.cat([states, x0[:, None]], dim=1).half()  # (B, S + 1, C, h, w)
        return _Solved(states=whole, timesteps=timesteps, x0_cond=predicted[0], x0_uncond=predicted[1])

    def _draw_timesteps(self, item: _Item) -> Tensor:
        """Draw S different timesteps of the solver's grid, the same for all rollouts, descending, (S,)."""
        random, grid = rng(item.rendered.seed, item.rendered.input_id, "timesteps"), self._grid.timesteps.tolist()
        return torch.tensor(sorted(random.sample(grid, len(self._keep)), reverse=True))

    def _predict(
        self, batch: Sequence[_Item], states: Tensor, timesteps: Tensor, alphas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict x0 with and without the condition at every state, (B, S, C, h, w) float16 each."""
        conditionings = [item.conditioning for item in batch]
        predict = predict_branches(self._teacher.denoiser, conditionings, self._uncond)
        cond, uncond = [], []
        for step in range(states.shape[1]):
            z, alpha = states[:, step], alphas[:, step]
            eps_cond, eps_uncond = predict(z, timesteps[:, step].to(z.device))
            assert eps_uncond is not None
            cond.append(predict_x0(z, eps_cond, alpha).half())
            uncond.append(predict_x0(z, eps_uncond, alpha).half())
        return torch.stack(cond, dim=1), torch.stack(uncond, dim=1)

    def _assemble(self, items: Sequence[_Item], solved: _Solved) -> Record:
        """Join an input and its R rollouts to its record."""
        rendered, conditioning = items[0].rendered, items[0].conditioning
        return Record(
            meta=SampleMeta(
                input_id=rendered.input_id,
                caption=rendered.caption,
                text_caption=rendered.text_caption,
                texts=rendered.texts,
                languages=rendered.languages,
                polygons=rendered.polygons,
                mode=rendered.mode,
                source=self._settings.source,
                seeds=tuple(item.seed for item in items),
                size=rendered.size,
                guidance_scale=self._settings.guidance_scale,
            ),
            image_context=conditioning.image_context.half().cpu(),
            text_context=conditioning.text_context.half().cpu(),
            masked_latents=conditioning.masked_latents.half().cpu(),
            rollout_latents=solved.states,
            rollout_timesteps=solved.timesteps[0],
            x0_cond=solved.x0_cond,
            x0_uncond=solved.x0_uncond,
            glyphs=rendered.glyphs,
            positions=rendered.positions.sum(0, keepdim=True, dtype=torch.uint8),
        )


def _round_conditioning(conditioning: Conditioning) -> Conditioning:
    return replace(
        conditioning,
        image_context=round_half(conditioning.image_context),
        text_context=round_half(conditioning.text_context),
        masked_latents=round_half(conditioning.masked_latents),
    )
