"""Images from Python: a teacher or a student samples a prompt with boxes, or a record of a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.vae import VAE
from common.config import Config
from common.errors import UsageError
from common.pictures import Picture
from stage2_student.student.sample import LoadedStudent, Start, decode, draw_noise, load_decoder, read_start

if TYPE_CHECKING:
    from stage1_teacher.teacher.teacher import Teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sentence, and where its quoted texts go."""

    text: str
    """The caption; the texts to show stand in it in quotation marks."""
    boxes: Sequence[str | Sequence[float]] = ()
    """Of each quoted text x0, y0, x1, y1 in pixels of the image, as numbers or as "x0,y0,x1,y1"."""
    colors: Sequence[str] = ()
    """"#rrggbb" of each text, none at all, or one for all."""
    font: str | None = None
    """A configured font's name, or a font file."""
    image: Path | None = None
    """The image to edit; None generates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordOf:
    """A record of a set of shards, for its conditioning."""

    shards: str
    """The set's folder or URL."""
    index: int
    """Of the record."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """B sampled images."""

    latents: Tensor
    """(B, C, h, w) float32."""
    pictures: list[Picture]
    """Each (H, W, 3) uint8 RGB."""
    teacher: list[Picture] | None
    """With `compare`, the teacher's pictures of the same noise."""


class ImageSampler:
    """A teacher or a student that samples; each network is loaded once, when it is first needed.

    Example:
        >>> from pathlib import Path
        >>> from both_stages.sampling import ImageSampler, Prompt, RecordOf
        >>> from common.config import load_config
        >>> student = ImageSampler(load_config(Path("configs/tiny.toml")), adapter=Path("demo/run"))
        >>> prompt = Prompt(text='a sign that says "OPEN"', boxes=[(8, 16, 56, 40)], colors=["#d01818"])
        >>> samples = student.sample(prompt, seed=7, num_images=2)
        >>> [(picture.ndim, picture.dtype.name) for picture in samples.pictures]  # (H, W, 3) uint8 RGB
        [(3, 'uint8'), (3, 'uint8')]
        >>> recorded = student.sample(RecordOf(shards="demo/shards", index=0), compare=True)
        >>> len(recorded.pictures), len(recorded.teacher)  # of the same noise
        (1, 1)
    """

    def __init__(self, config: Config, *, adapter: Path | None = None, steps: int | None = None) -> None:
        """Load a student; the teacher is loaded when it is first needed.

        Args:
            config: model, teacher, inputs and precompute are used.
            adapter: a run's folder, a checkpoint, or an adapter's folder; None for the teacher.
            steps: of the teacher, None for precompute.solver_steps; a student has its own number.

        Raises:
            UsageError: the student was trained for another number of steps.
            DataError: no adapter there, or it belongs to another base.
        """
        self._config, self._steps = config, steps
        self._student = None if adapter is None else LoadedStudent.load(config, adapter, steps)

    def sample(
        self, what: Prompt | RecordOf, *, seed: int | None = None, num_images: int = 1, compare: bool = False
    ) -> Samples:
        """Sample images, side by side in one batch.

        From a record a student needs no part of the teacher, not even its code.

        Args:
            what: what the images are to show.
            seed: keys the noise, with an image's number. None: 0; of a record, the noise that the teacher had.
            num_images: B, each of other noise.
            compare: of a student: also the teacher's pictures of the same noise; of a record, as recorded.

        Raises:
            UsageError: the prompt or the record is wrong, or there is nothing to compare.
            DataError: the set cannot be read, or belongs to another base.
        """
        if compare and self._student is None:
            raise UsageError("--compare goes with --adapter: it adds the teacher's picture")
        start = self._start(what, seed, num_images)
        if compare and isinstance(what, RecordOf) and start.x0 is None:
            raise UsageError(
                "--compare with --record shows what was recorded: leave --seed out, or sample with --teacher"
            )
        shape = tuple(start.conditioning.masked_latents.shape)
        needed = 1 if self._student is None else self._student.noises_needed
        noise = torch.stack([draw_noise(seed or 0, number, shape, needed) for number in range(num_images)])
        if start.noise is not None:
            noise[:, 0] = start.noise
        if self._student is None:
            latents = self._solve(start.conditioning, noise[:, 0], self._steps)
        else:
            latents = self._student.latents(ConditioningBatch.stack([start.conditioning] * num_images), noise)
        teacher = None
        if compare:
            solved = self._solve(start.conditioning, noise[:, 0], None) if start.x0 is None else start.x0
            teacher = decode(self._decoder, solved)
        return Samples(latents=latents, pictures=decode(self._decoder, latents), teacher=teacher)

    def _start(self, what: Prompt | RecordOf, seed: int | None, num_images: int) -> Start:
        if isinstance(what, RecordOf):
            return read_start(self._config, what.shards, what.index, seed, num_images)
        from stage1_teacher.teacher.sample import encode_prompt

        encoded = encode_prompt(
            self._config,
            self._teacher,
            what.text,
            what.boxes,
            colors=what.colors,
            font=what.font,
            image=what.image,
        )
        return Start(conditioning=encoded)

    @cached_property
    def _teacher(self) -> Teacher:
        from stage1_teacher.teacher.teacher import Teacher

        return Teacher.load(self._config)

    @cached_property
    def _decoder(self) -> VAE:
        return self._teacher.vae if "_teacher" in self.__dict__ else load_decoder(self._config)

    def _solve(self, conditioning: Conditioning, noise: Tensor, steps: int | None) -> Tensor:
        from stage1_teacher.teacher.sample import sample_latents

        return sample_latents(self._config, self._teacher, conditioning, noise, steps)
