"""Images from Python: a teacher or a student samples prompts with boxes, or records of a set."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from both_stages.prompts import Prompt, RecordOf, TextLine, What, read_prompt, read_prompts, require_size
from both_stages.samples import Asked, Samples, describe_model, lines_of, seed_of
from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.denoiser import Denoiser
from common.anytext2.vae import VAE
from common.config import Config
from common.errors import UsageError
from stage2_student.evaluation.counting import count_evaluations
from stage2_student.student.adapter import find_adapter
from stage2_student.student.sample import LoadedStudent, Start, decode, draw_noise, load_decoder, read_start

if TYPE_CHECKING:
    from stage1_teacher.teacher.teacher import Teacher

__all__ = [
    "ImageSampler",
    "Prompt",
    "RecordOf",
    "Samples",
    "TextLine",
    "What",
    "read_prompt",
    "read_prompts",
    "require_size",
]

logger = logging.getLogger(__name__)


class ImageSampler:
    """A teacher or a student that samples; each network is loaded once, when it is first needed.

    Example:
        >>> from pathlib import Path
        >>> from both_stages.sampling import ImageSampler, Prompt, RecordOf, TextLine
        >>> from common.config import load_config
        >>> student = ImageSampler(load_config(Path("configs/tiny.toml")), adapter=Path("demo/run"))
        >>> prompt = Prompt(text='a sign that says "OPEN"', boxes=[(8, 16, 56, 40)], colors=["#d01818"])
        >>> samples = student.sample(prompt, seed=7, num_images=2)
        >>> [(picture.ndim, picture.dtype.name) for picture in samples.pictures]  # (H, W, 3) uint8 RGB
        [(3, 'uint8'), (3, 'uint8')]
        >>> [(texts["prompt"], texts["seed"], texts["image"]) for texts in samples.texts]
        [('a sign that says "OPEN"', '7', '0'), ('a sign that says "OPEN"', '7', '1')]
        >>> other = Prompt(text="a shop", lines=[TextLine(text="24H", box=(8, 8, 60, 40), color="#1818d0")])
        >>> batch = student.sample_batch([prompt, other], seeds=[7, 8])  # side by side, one image of each
        >>> len(batch.pictures), batch.unet_calls == len(student.timesteps)
        (2, True)
        >>> recorded = student.sample(RecordOf(shards="demo/shards", index=0), compare=True)
        >>> len(recorded.pictures), len(recorded.teacher)  # of the same noise
        (1, 1)
    """

    def __init__(
        self,
        config: Config,
        *,
        adapter: Path | None = None,
        steps: int | None = None,
        encoders_of: ImageSampler | None = None,
    ) -> None:
        """Load a student; the teacher is loaded when it is first needed.

        Args:
            config: model, teacher, inputs and precompute are used.
            adapter: a run's folder, a checkpoint, an adapter's folder, or what `export` wrote; None: the teacher.
            steps: of the teacher, None for precompute.solver_steps; a student has its own number.
            encoders_of: another sampler of the same configuration, whose teacher is used instead of a second one
                in memory.

        Raises:
            UsageError: the student was trained for another number of steps.
            DataError: no adapter there, or it belongs to another base.
        """
        self._config, self._steps, self._shared = config, steps, encoders_of
        self._warned_of: set[tuple[int, int]] = set()
        self._adapter = None if adapter is None else find_adapter(adapter)
        self._student = None if self._adapter is None else LoadedStudent.load(config, self._adapter, steps)

    def sample(
        self,
        what: What,
        *,
        seed: int | None = None,
        num_images: int = 1,
        compare: bool = False,
        size: tuple[int, int] | None = None,
        before_call: Callable[[], None] | None = None,
    ) -> Samples:
        """Sample images of one prompt or record, side by side in one batch.

        From a record a student needs no part of the teacher, not even its code.

        Args:
            what: what the images are to show; an `Input` is a line of a prompts file, see `read_prompts`.
            seed: keys the noise, with an image's number. None: 0; of a record, the noise that the teacher had. An
                `Input` that has a seed keeps to it.
            num_images: B, each of other noise.
            compare: of a student: also the teacher's pictures of the same noise; of a record, as recorded.
            size: (W, H) of the images in pixels, None for `inputs.size`; a record has its own.
            before_call: called before each call of the UNet; what it raises ends the sampling.

        Raises:
            UsageError: the prompt or the record is wrong, or there is nothing to compare.
            DataError: the set cannot be read, or belongs to another base.
        """
        self._require_student(compare)
        begun = time.perf_counter()
        start, says, seed, doubts = self._start(what, seed, num_images, size)
        asked = [Asked(start=start, says=says, seed=seed, number=number) for number in range(num_images)]
        return self._draw(asked, doubts, compare, time.perf_counter() - begun, before_call)

    def sample_batch(
        self,
        whats: Sequence[What],
        *,
        seeds: Sequence[int | None] | int | None = None,
        compare: bool = False,
        size: tuple[int, int] | None = None,
        before_call: Callable[[], None] | None = None,
    ) -> Samples:
        """Sample different prompts or records side by side, one image of each, in one batch.

        Each image is the one that `sample` makes of the same prompt and seed, to rounding.

        Args:
            whats: B of them, of one image size.
            seeds: of each, or one for all; see `sample`.
            compare: see `sample`, as for the others.
            size: (W, H) of the images.
            before_call: see `sample`.

        Raises:
            UsageError: there is nothing to sample, seeds are missing, sizes differ; and as `sample`.
            DataError: a set cannot be read, or belongs to another base.
        """
        each = [seeds] * len(whats) if seeds is None or isinstance(seeds, int) else list(seeds)
        if not whats or len(each) != len(whats):
            raise UsageError(
                f"received {len(whats)} prompts and {len(each)} seeds; expected a seed for each prompt"
            )
        self._require_student(compare)
        begun, asked, doubts = time.perf_counter(), [], []
        for what, seed in zip(whats, each, strict=True):
            start, says, meant, found = self._start(what, seed, 1, size)
            asked.append(Asked(start=start, says=says, seed=meant, number=0))
            doubts += found
        return self._draw(asked, doubts, compare, time.perf_counter() - begun, before_call)

    def load(self) -> None:
        """Load now what sampling from a prompt needs, so that no image waits for it."""
        _ = self.teacher, self._decoder, self.model

    def encode(self, what: What, *, size: tuple[int, int] | None = None) -> Conditioning:
        """Return what the networks take of a prompt or a record: contexts and hints, float32.

        Args:
            what: see `sample`, as for the errors.
            size: (W, H) of the image in pixels.
        """
        return self._start(what, None, 1, size)[0].conditioning

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Where the network is called, descending."""
        if self._student is not None:
            return self._student.card.timesteps
        from common.schedule import trailing_timesteps

        return tuple(trailing_timesteps(self._steps or self._config.precompute.solver_steps).tolist())

    @property
    def student(self) -> LoadedStudent:
        """The student that samples.

        Raises:
            UsageError: the teacher does.
        """
        if self._student is None:
            raise UsageError("no student samples here; give an adapter")
        return self._student

    def _require_student(self, compare: bool) -> None:
        if compare and self._student is None:
            raise UsageError("--compare goes with --adapter: it adds the teacher's picture")

    def _draw(
        self,
        asked: Sequence[Asked],
        doubts: list[str],
        compare: bool,
        encode_seconds: float,
        before_call: Callable[[], None] | None,
    ) -> Samples:
        """Sample images of one size in one batch."""
        if compare and any(one.start.meta is not None and one.start.x0 is None for one in asked):
            raise UsageError(
                "--compare with --record shows a recorded solve: leave --seed out, give a record of source"
                ' "rollout", or sample with --teacher'
            )
        conditionings = [one.start.conditioning for one in asked]
        shape = tuple(conditionings[0].masked_latents.shape)
        if any(tuple(conditioning.masked_latents.shape) != shape for conditioning in conditionings):
            raise UsageError("images of different sizes cannot be sampled in one batch; sample them one by one")
        decoder = self._decoder  # loaded before the clock runs, as the networks
        with self._watch(before_call) as counts:
            begun = time.perf_counter()
            noise = self._noise(asked, shape)
            if self._student is None:
                latents = self._solve(conditionings, noise[:, 0], self._steps)
            else:
                latents = self._student.latents(ConditioningBatch.stack(conditionings), noise)
            pictures = decode(decoder, latents)
            seconds = time.perf_counter() - begun
        teacher = decode(decoder, self._compared(asked, noise[:, 0])) if compare else None
        return Samples(
            latents=latents,
            pictures=pictures,
            teacher=teacher,
            texts=[one.says | seed_of(one) | {"model": self.model} for one in asked],
            doubts=doubts,
            seconds=seconds,
            encode_seconds=encode_seconds,
            unet_calls=counts["unet"] // len(asked),
        )

    def _noise(self, asked: Sequence[Asked], shape: tuple[int, ...]) -> Tensor:
        """Return the noise of each image, (B, K, C, h, w): the recorded one where it is meant."""
        needed = 1 if self._student is None else self._student.card.num_noises
        noise = torch.stack([draw_noise(one.seed or 0, one.number, shape, needed) for one in asked])
        for row, one in enumerate(asked):
            if one.start.noise is not None:
                noise[row, 0] = one.start.noise[one.number]
        return noise

    def _compared(self, asked: Sequence[Asked], noise: Tensor) -> Tensor:
        """Return the teacher's latents of the same noise, (B, C, h, w): as recorded, or solved now."""
        known = {row: one.start.x0[one.number] for row, one in enumerate(asked) if one.start.x0 is not None}
        rows = [row for row in range(len(asked)) if row not in known]
        if rows:
            solved = self._solve([asked[row].start.conditioning for row in rows], noise[rows], None)
            known |= dict(zip(rows, solved.cpu(), strict=True))
        return torch.stack([known[row] for row in range(len(asked))])

    def _start(
        self, what: What, seed: int | None, num_images: int, size: tuple[int, int] | None
    ) -> tuple[Start, dict[str, str], int | None, list[str]]:
        """Return what is sampled from, what it says, the seed that is meant, and doubts."""
        if isinstance(what, RecordOf):
            if size is not None:
                raise UsageError("--size: a record has its own; leave --size out")
            start = read_start(self._config, what.shards, what.index, seed, num_images)
            meta = start.meta
            assert meta is not None
            lines = lines_of(meta.texts, meta.polygons, [()] * len(meta.texts))
            return start, {"prompt": meta.caption, "lines": lines, "record": meta.input_id}, seed, []
        from stage1_teacher.teacher.sample import encode_input

        require_size(self._config, size)
        content = read_prompt(self._config, what, size) if isinstance(what, Prompt) else what
        seed = seed if content.seed is None else content.seed
        self._warn_of(size)
        encoded, rendered, doubts = encode_input(self._config, self.teacher, content, size)
        for doubt in doubts:
            logger.warning("%s: %s", content.where, doubt)
        lines = lines_of(rendered.texts, rendered.polygons, rendered.colors.tolist()) if content.lines else "[]"
        return Start(conditioning=encoded), {"prompt": content.caption, "lines": lines}, seed, doubts

    def _warn_of(self, size: tuple[int, int] | None) -> None:
        usual = self._config.inputs.size
        if size is None or size == (usual, usual) or size in self._warned_of:
            return
        self._warned_of.add(size)
        logger.warning(
            "%dx%d is not the size that the model was trained at, %dx%d (inputs.size): text may come out worse",
            *size,
            usual,
            usual,
        )

    @cached_property
    def model(self) -> str:
        """Say who samples and how, as JSON; see `describe_model`."""
        card = None if self._student is None else self._student.card
        return describe_model(self._config, self._steps, card, self._adapter)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, whose encoders a student uses too; loaded when it is first needed."""
        if self._shared is not None:
            return self._shared.teacher
        from stage1_teacher.teacher.teacher import Teacher

        return Teacher.load(self._config)

    @cached_property
    def _decoder(self) -> VAE:
        if self._shared is not None:
            return self._shared._decoder
        return self.teacher.vae if "teacher" in self.__dict__ else load_decoder(self._config)

    @contextmanager
    def _watch(self, before_call: Callable[[], None] | None) -> Iterator[dict[str, int]]:
        """Count the calls of the UNet that samples, and announce each."""
        networks: Denoiser = self.teacher.denoiser if self._student is None else self._student.student
        if networks.device.type == "cuda":
            torch.cuda.synchronize(networks.device)  # encoding must not be timed as sampling
        with count_evaluations(unet=networks.unet) as counts:
            hook = networks.unet.register_forward_pre_hook(_announce(before_call)) if before_call else None
            try:
                yield counts
            finally:
                if hook is not None:
                    hook.remove()

    def _solve(self, conditionings: Sequence[Conditioning], noise: Tensor, steps: int | None) -> Tensor:
        from stage1_teacher.teacher.sample import sample_latents

        return sample_latents(self._config, self.teacher, conditionings, noise, steps)


def _announce(before_call: Callable[[], None]) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        before_call()

    return hook
