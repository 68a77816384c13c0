"""The models of the page: the teacher and students, loaded once, that sample one request after the other."""

from __future__ import annotations

import base64
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from both_stages.page.asked import Asked
from both_stages.sampling import ImageSampler
from common.config import Config
from common.errors import UsageError
from common.pictures import png_bytes

TEACHER = "teacher"
"""The name that no student may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The images of one model, as the page shows them."""

    model: str
    steps: int
    seconds: float
    """From noise to pictures, of all images together."""
    unet_calls: int
    """Of each image."""
    seed: int
    images: list[str]
    """PNG files, base64, which say in their text chunks what they are."""


class Models:
    """The teacher and students by name; they share the encoders."""

    def __init__(self, config: Config, students: Mapping[str, Path]) -> None:
        """Load them all, so that what is wrong is said at the start and no request waits for it.

        Args:
            config: see `ImageSampler`.
            students: adapters by name.

        Raises:
            UsageError: a student is called as the teacher is.
            DataError: an adapter or the checkpoint is unreadable, or they do not belong together.
        """
        if TEACHER in students:
            raise UsageError(f"--adapter {TEACHER}=...: the name is the teacher's own; give another")
        self._config = config
        self._teacher = ImageSampler(config)
        self._students = {
            name: ImageSampler(config, adapter=adapter, encoders_of=self._teacher)
            for name, adapter in students.items()
        }
        self._teacher.load()

    def describe(self) -> list[dict[str, Any]]:
        """Say of each model its name, its steps, and whether another number may be asked for; students first."""
        rows = [
            {"name": name, "steps": len(sampler.timesteps), "fixed": True}
            for name, sampler in self._students.items()
        ]
        return [*rows, {"name": TEACHER, "steps": self._config.precompute.solver_steps, "fixed": False}]

    @property
    def names(self) -> list[str]:
        """Of all models, students first."""
        return [*self._students, TEACHER]

    def sample(self, asked: Asked, before_call: Callable[[], None]) -> tuple[list[Made], list[str]]:
        """Sample what was asked for, with one model after the other, from the same noise.

        Args:
            asked: the request.
            before_call: see `ImageSampler.sample`.

        Returns:
            The images of each model, and what will hardly be seen as it is asked for.

        Raises:
            UsageError: the prompt is wrong.
            DataError: the uploaded image is wrong, or no font has a text's characters.
        """
        with tempfile.TemporaryDirectory(prefix="anytext2-page-") as folder:
            upload, data = None, asked.image_bytes()
            if data is not None:
                upload = Path(folder) / "the uploaded image"
                upload.write_bytes(data)
            prompt, made, doubts = asked.prompt(upload), [], []
            for name in dict.fromkeys(asked.models):
                sampler = self._students.get(name)
                if sampler is None:
                    sampler = ImageSampler(self._config, steps=asked.steps, encoders_of=self._teacher)
                samples = sampler.sample(
                    prompt, seed=asked.seed, num_images=asked.num_images, before_call=before_call
                )
                doubts = samples.doubts
                made.append(
                    Made(
                        model=name,
                        steps=len(sampler.timesteps),
                        seconds=round(samples.seconds, 3),
                        unet_calls=samples.unet_calls,
                        seed=asked.seed,
                        images=[
                            base64.b64encode(png_bytes(picture, texts)).decode()
                            for picture, texts in zip(samples.pictures, samples.texts, strict=True)
                        ],
                    )
                )
        return made, doubts


class Gone(Exception):
    """Nobody waits for the images any more."""


class TooLong(Exception):
    """The request has sampled for as long as it may."""


def stopping(gone: Callable[[], bool], max_seconds: float) -> Callable[[], None]:
    """Return what is to be called before each call of the UNet, for a request that begins now.

    Args:
        gone: whether nobody waits any more.
        max_seconds: that it may sample.

    Returns:
        Raises `Gone` or `TooLong`.
    """
    end = time.monotonic() + max_seconds

    def check() -> None:
        if gone():
            raise Gone
        if time.monotonic() > end:
            raise TooLong

    return check
