"""Images from Python: a teacher or a student samples a prompt with boxes, or a record of a set."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.fingerprint import fingerprint
from common.anytext2.vae import VAE
from common.config import Config
from common.errors import UsageError
from common.files import canonical_json, sha256_file
from common.pictures import Picture
from stage2_student.student.adapter import adapter_files, find_adapter
from stage2_student.student.sample import LoadedStudent, Start, decode, draw_noise, load_decoder, read_start

if TYPE_CHECKING:
    from stage1_teacher.inputs.input import Input
    from stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A sentence, and where its texts go."""

    text: str
    """The caption; the texts to show stand in it in quotation marks, unless `texts` has them."""
    texts: Sequence[str] = ()
    """To show, as they are; no quotation mark in the sentence then means anything."""
    boxes: Sequence[str | Sequence[float]] = ()
    """Of each text x0, y0, x1, y1 in pixels of the image, as numbers or as "x0,y0,x1,y1"."""
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


What = Union[Prompt, RecordOf, "Input"]
"""That images are sampled from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """B sampled images."""

    latents: Tensor
    """(B, C, h, w) float32."""
    pictures: list[Picture]
    """Each (H, W, 3) uint8 RGB."""
    teacher: list[Picture] | None
    """With `compare`, the teacher's pictures of the same noise."""
    texts: list[dict[str, str]]
    """What each picture's file is to say of itself: prompt, lines, seed, model; `write_png` takes it."""


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
        >>> [(texts["prompt"], texts["seed"], texts["image"]) for texts in samples.texts]
        [('a sign that says "OPEN"', '7', '0'), ('a sign that says "OPEN"', '7', '1')]
        >>> recorded = student.sample(RecordOf(shards="demo/shards", index=0), compare=True)
        >>> len(recorded.pictures), len(recorded.teacher)  # of the same noise
        (1, 1)
    """

    def __init__(self, config: Config, *, adapter: Path | None = None, steps: int | None = None) -> None:
        """Load a student; the teacher is loaded when it is first needed.

        Args:
            config: model, teacher, inputs and precompute are used.
            adapter: a run's folder, a checkpoint, an adapter's folder, or what `export` wrote; None: the teacher.
            steps: of the teacher, None for precompute.solver_steps; a student has its own number.

        Raises:
            UsageError: the student was trained for another number of steps.
            DataError: no adapter there, or it belongs to another base.
        """
        self._config, self._steps = config, steps
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
    ) -> Samples:
        """Sample images, side by side in one batch.

        From a record a student needs no part of the teacher, not even its code.

        Args:
            what: what the images are to show; an `Input` is a line of a prompts file, see `read_prompts`.
            seed: keys the noise, with an image's number. None: 0; of a record, the noise that the teacher had. An
                `Input` that has a seed keeps to it.
            num_images: B, each of other noise.
            compare: of a student: also the teacher's pictures of the same noise; of a record, as recorded.
            size: (W, H) of the images in pixels, None for `inputs.size`; a record has its own.

        Raises:
            UsageError: the prompt or the record is wrong, or there is nothing to compare.
            DataError: the set cannot be read, or belongs to another base.
        """
        if compare and self._student is None:
            raise UsageError("--compare goes with --adapter: it adds the teacher's picture")
        start, said, seed = self._start(what, seed, num_images, size)
        if compare and isinstance(what, RecordOf) and start.x0 is None:
            raise UsageError(
                "--compare with --record shows what was recorded: leave --seed out, or sample with --teacher"
            )
        shape = tuple(start.conditioning.masked_latents.shape)
        needed = 1 if self._student is None else self._student.card.num_noises
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
        texts = [said | _seed_of(start, seed, number) | {"model": self.model} for number in range(num_images)]
        return Samples(latents=latents, pictures=decode(self._decoder, latents), teacher=teacher, texts=texts)

    def _start(
        self, what: What, seed: int | None, num_images: int, size: tuple[int, int] | None
    ) -> tuple[Start, dict[str, str], int | None]:
        """Return what is sampled from, what it says, and the seed that is meant."""
        if isinstance(what, RecordOf):
            if size is not None:
                raise UsageError("--size: a record has its own; leave --size out")
            start = read_start(self._config, what.shards, what.index, seed, num_images)
            meta = start.meta
            assert meta is not None
            lines = _lines(meta.texts, meta.polygons, [()] * len(meta.texts))
            return start, {"prompt": meta.caption, "lines": lines, "record": meta.input_id}, seed
        from stage1_teacher.teacher.sample import encode_input

        require_size(self._config, size)
        content = read_prompt(self._config, what, size) if isinstance(what, Prompt) else what
        seed = seed if content.seed is None else content.seed
        self._warn_of(size)
        encoded, rendered = encode_input(self._config, self._teacher, content, size)
        lines = _lines(rendered.texts, rendered.polygons, rendered.colors.tolist()) if content.lines else "[]"
        return Start(conditioning=encoded), {"prompt": content.caption, "lines": lines}, seed

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
        """Say who samples and how, as JSON: steps, guidance, and the fingerprints of the weights."""
        checkpoint = self._config.find_checkpoint()
        if self._student is None or self._adapter is None:
            who: dict[str, Any] = {
                "who": "teacher",
                "steps": self._steps or self._config.precompute.solver_steps,
                "guidance_scale": self._config.precompute.guidance_scale,
                "fingerprint": fingerprint(checkpoint, "teacher"),
            }
        else:
            card = self._student.card
            files = {name: sha256_file(path) for name, path in adapter_files(self._adapter).items()}
            who = {
                "who": "student",
                "steps": card.num_steps,
                "timesteps": list(card.timesteps),
                "sampler": card.sampler,
                "guidance_scale": 1.0,
                "adapter": hashlib.sha256(canonical_json(files)).hexdigest(),
                "base_fingerprint": card.base_fingerprint,
                **({"ancestors": card.to_json()["ancestors"]} if card.ancestors else {}),
            }
        return canonical_json(who).decode().strip()

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


def require_size(config: Config, size: tuple[int, int] | None) -> None:
    """Refuse a size of images that the network cannot have.

    Args:
        config: model and inputs are used.
        size: (W, H) in pixels; None for `inputs.size`.

    Raises:
        UsageError: a side is no multiple of the network's size_multiple.
    """
    multiple, usual = config.load_network().size_multiple, config.inputs.size
    if size is not None and any(side < multiple or side % multiple for side in size):
        raise UsageError(
            f"--size {size[0]}x{size[1]}: expected WIDTHxHEIGHT in multiples of {multiple}, e.g."
            f" {usual + multiple}x{usual}"
        )


def read_prompt(config: Config, prompt: Prompt, size: tuple[int, int] | None = None) -> Input:
    """Read a prompt as a person types it, before any network is loaded.

    Args:
        config: inputs is used.
        prompt: the prompt.
        size: (W, H) of the image to be, in pixels, to which its boxes refer; None for `inputs.size`.

    Raises:
        UsageError: its parts do not match, or a value is wrong.
    """
    from stage1_teacher.teacher.sample import prompt_input

    return prompt_input(
        config,
        prompt.text,
        prompt.boxes,
        texts=prompt.texts,
        colors=prompt.colors,
        font=prompt.font,
        image=prompt.image,
        size=size,
    )


def read_prompts(config: Config, path: Path, size: tuple[int, int] | None = None) -> list[Input]:
    """Read a prompts file, JSON lines as precompute takes them, and see that each can be rendered.

    Args:
        config: inputs, teacher and precompute are used.
        path: the file.
        size: (W, H) of the images to be, in pixels; None for `inputs.size`.

    Raises:
        DataError: the file or one of its prompts is wrong.
    """
    from stage1_teacher.teacher.sample import read_prompts as read

    return read(config, path, size)


def _seed_of(start: Start, seed: int | None, number: int) -> dict[str, str]:
    """Say which noise an image was sampled from."""
    if start.noise is not None and start.meta is not None:
        return {"seed": str(start.meta.seeds[number]), "noise": "of the record"}
    return {"seed": str(seed or 0), "image": str(number)}


def _lines(
    texts: Sequence[str], polygons: Sequence[Sequence[Sequence[float]]], colors: Sequence[Sequence[float]]
) -> str:
    """Say in JSON which texts are where, in pixels of the image, and in which colours if these are known."""
    lines = []
    for text, polygon, color in zip(texts, polygons, colors, strict=True):
        known = {"color": list(color)} if color and max(color) <= 255 else {}
        lines.append({"text": text, "polygon": [list(corner) for corner in polygon], **known})
    return canonical_json(lines).decode().strip()
