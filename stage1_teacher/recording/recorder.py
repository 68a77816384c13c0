"""From rendered inputs to records: encode, solve or noise, round to what is stored.

On a GPU the next inputs are encoded, and finished solves are made records and written, while it solves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.denoiser import predict_branches
from common.ddim import trailing_grid
from common.on_device import own_stream, send_to_host, used_here
from common.overlap import Behind
from common.schedule import diffuse, make_alphas_cumprod, predict_x0
from common.sections import PrecomputeConfig
from common.seeding import rng
from stage1_teacher.recording.assembly import Assembly, Encoded, Item, Recorded, Solved, Stored, naming
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.teacher.solver import solve
from stage1_teacher.teacher.student_states import PhaseGrid, StudentStates, Walk, phase_grids, solve_from
from stage1_teacher.teacher.teacher import Teacher

Numbered = tuple[int, RenderedInput]
"""An input with its index in the plan."""
Batches = Generator[Callable[[], Recorded], None, None]
"""Batches of solves as they come: what makes the records of each."""


def round_half(values: Tensor) -> Tensor:
    """Round to what float16 can hold and go on in float32: the teacher sees exactly what is stored."""
    return values.half().float()


class Recorder:
    """Makes records of rendered inputs, `solve_size` solves side by side."""

    def __init__(
        self,
        teacher: Teacher,
        uncond: Uncond,
        settings: PrecomputeConfig,
        *,
        student: StudentStates | None = None,
        whole_rollouts: bool = False,
        overlaps: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """Take the networks and how they are run.

        Args:
            teacher: the networks.
            uncond: the set's unconditional contexts, as it stores them.
            settings: how inputs are solved.
            student: whose states are solved from, with source "student".
            whole_rollouts: give every state of the solves too; records are the same with and without them.
            overlaps: encode the next inputs while a batch is solved, and let the caller make records meanwhile;
                None: where the teacher is on a GPU. Records are the same with and without.
            compiled: the networks compile themselves for each shape that they meet. So a shard's last batch is
                filled up with copies, and no other thread runs a network while one may be compiled: tracing one
                patches PyTorch's modules for all threads.
        """
        self._teacher, self._settings, self._compiled = teacher, settings, compiled
        self._uncond, self._whole_rollouts = uncond.to(teacher.device, torch.float32), whole_rollouts
        self._grid = trailing_grid(settings.solver_steps)
        self._keep = range(0, settings.solver_steps, settings.record_every)
        self._solve_batch: Callable[[Sequence[Item]], Solved]
        if student is not None:
            grids = phase_grids(student.timesteps, settings.solver_steps, settings.record_every)
            timesteps = torch.tensor(student.recorded_timesteps)
            self._solve_batch = partial(self._solve_from, student.load(), grids, timesteps)
        else:
            self._solve_batch = self._solve if settings.source == "rollout" else self._noise
        self.overlaps = teacher.device.type == "cuda" if overlaps is None else overlaps
        """Whether work beside the solves pays."""
        self._shapes: set[object] = set()
        self._stream = own_stream(teacher.device) if self.overlaps else None

    def record(self, groups: Iterable[Sequence[Numbered]], where: str) -> Batches:
        """Encode and solve inputs; yields after every batch of solves, so that the caller may stop in between.

        What a record holds depends on which inputs are given together, to about 1e-6 of its values.

        Args:
            groups: inputs of one size, those of a group encoded side by side. Solves cross their borders.
            where: the inputs' shard, named in errors.

        Yields:
            What makes the records of a batch, once its values are on the CPU; to be called batch by batch, in this
            thread or in one other.

        Raises:
            DataError: the teacher produced NaN or Inf; names the inputs.
        """
        size, rollouts = self._settings.side_by_side, range(self._settings.num_rollouts)
        groups_a_solve = -(-self._settings.inputs_a_solve // self._settings.batch_size)
        assembly, waiting = Assembly(self._settings, where), deque[Item]()
        with self._encoding(groups_a_solve) as encoding:
            pieces = (partial(self.encode, group, where) for group in groups if group)
            for group in encoding.ahead(pieces, groups_a_solve):
                waiting.extend(Item(encoded, rollout) for encoded in group for rollout in rollouts)
                while len(waiting) >= size:
                    yield self._run([waiting.popleft() for _ in range(size)], assembly, encoding)
            if waiting:
                yield self._run(list(waiting), assembly, encoding)

    def encode(self, group: Sequence[Numbered], where: str) -> list[Encoded]:
        """Encode inputs of one size side by side.

        Raises:
            DataError: names `where` and the inputs.
        """
        indices, inputs = zip(*group, strict=True)
        with naming(where, *indices):
            encoded = []
            for index, rendered, exact in zip(indices, inputs, self._teacher.encode(inputs), strict=True):
                stored = Stored(
                    image_context=exact.image_context.half(),
                    text_context=exact.text_context.half(),
                    masked_latents=exact.masked_latents.half(),
                )
                sent = send_to_host(stored, self._teacher.device)
                encoded.append(Encoded(index, rendered, _round_conditioning(exact), sent))
            return encoded

    def _encoding(self, groups_a_solve: int) -> Behind:
        if self._stream is None:
            return Behind("encode", threaded=False)
        return Behind("encode", threaded=True, most_waiting=groups_a_solve + 1, within=self._stream)

    def _run(self, batch: list[Item], assembly: Assembly, encoding: Behind) -> Callable[[], Recorded]:
        with naming(assembly.where, *(item.encoded.index for item in batch)):
            for encoded in {id(item.encoded): item.encoded for item in batch}.values():
                used_here(encoded.conditioning)
            items = self._filled_up(batch) if self._compiled else batch
            with encoding.paused() if self._compiled and self._is_new_shape(items) else nullcontext():
                solved = self._solve_batch(items)
            return partial(assembly.add, batch, send_to_host(solved[: len(batch)], self._teacher.device))

    def _is_new_shape(self, items: Sequence[Item]) -> bool:
        """Tell whether networks may meet this batch's shape for the first time."""
        contexts = frozenset(item.conditioning.image_context.shape[0] for item in items)
        shape = (len({id(item.conditioning) for item in items}), contexts, items[0].encoded.rendered.size)
        is_new = shape not in self._shapes
        self._shapes.add(shape)
        return is_new

    def _filled_up(self, batch: list[Item]) -> list[Item]:
        """Put copies of the last item behind a batch; each counts as an input of its own, for WriteNet too."""
        last, missing = batch[-1], self._settings.side_by_side - len(batch)
        encoded = last.encoded
        copies = (replace(encoded, conditioning=replace(encoded.conditioning)) for _ in range(missing))
        return batch + [Item(copy, last.rollout) for copy in copies]

    def _draw_noise(self, item: Item, count: int = 1) -> Tensor:
        """Draw on the CPU, so that devices agree, (count, C, h, w)."""
        generator = torch.Generator().manual_seed(item.seed)
        return torch.randn((count, *item.conditioning.masked_latents.shape), generator=generator)

    def _solve_from(
        self, walk: Walk, grids: Sequence[PhaseGrid], timesteps: Tensor, batch: Sequence[Item]
    ) -> Solved:
        """Let the student walk from the noise of each, and the teacher solve every phase from where it came."""
        conditionings = [item.conditioning for item in batch]
        noise = round_half(torch.cat([self._draw_noise(item) for item in batch]))
        states = solve_from(
            self._teacher,
            conditionings,
            self._uncond,
            walk(conditionings, noise),
            grids,
            guidance_scale=self._settings.guidance_scale,
        )
        return Solved(states=states, timesteps=timesteps.expand(len(batch), -1), x0_cond=None, x0_uncond=None)

    def _solve(self, batch: Sequence[Item]) -> Solved:
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
        return Solved(
            states=rollout.states,
            timesteps=rollout.timesteps.expand(len(batch), -1),
            x0_cond=rollout.x0_cond,
            x0_uncond=rollout.x0_uncond,
            rollouts=rollout.all_states,
        )

    @torch.no_grad()
    def _noise(self, batch: Sequence[Item]) -> Solved:
        """Noise data latents at timesteps rendered from the whole grid: z_t = alpha_t x0 + sigma_t eps.

        Source: Luo et al. 2023 (LCM), algorithm 1.
        """
        teacher, steps = self._teacher, len(self._keep)
        images = torch.stack([image for item in batch if (image := item.encoded.rendered.image) is not None])
        x0 = round_half(teacher.vae.encode(images.to(teacher.device, teacher.dtype)).float())  # (B, C, h, w)
        noise = torch.stack([self._draw_noise(item, steps) for item in batch]).to(x0.device)  # (B, S, C, h, w)
        timesteps = torch.stack([self._draw_timesteps(item) for item in batch])  # (B, S)
        alphas = make_alphas_cumprod()[timesteps].to(x0.device)[..., None, None, None]  # (B, S, 1, 1, 1)
        states = round_half(diffuse(x0[:, None], noise, alphas))  # (B, S, C, h, w)
        predicted = (
            self._predict(batch, states, timesteps, alphas) if self._settings.store_predictions else (None,) * 2
        )
        whole = torch.cat([states, x0[:, None]], dim=1).half()  # (B, S + 1, C, h, w)
        return Solved(states=whole, timesteps=timesteps, x0_cond=predicted[0], x0_uncond=predicted[1])

    def _draw_timesteps(self, item: Item) -> Tensor:
        """Draw S different timesteps of the solver's grid, the same for all rollouts, descending, (S,)."""
        rendered, grid = item.encoded.rendered, self._grid.timesteps.tolist()
        random = rng(rendered.seed, rendered.input_id, "timesteps")
        return torch.tensor(sorted(random.sample(grid, len(self._keep)), reverse=True))

    def _predict(
        self, batch: Sequence[Item], states: Tensor, timesteps: Tensor, alphas: Tensor
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


def _round_conditioning(conditioning: Conditioning) -> Conditioning:
    return replace(
        conditioning,
        image_context=round_half(conditioning.image_context),
        text_context=round_half(conditioning.text_context),
        masked_latents=round_half(conditioning.masked_latents),
    )
