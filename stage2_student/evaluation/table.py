"""The table of an evaluation: what was found of each run and of each pair of runs, as `evaluation.json` has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from common.layouts import Color
from stage2_student.evaluation.metrics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class HeightRow:
    """Accuracy of a run's lines of one class of text height."""

    from_: int
    """Least height, pixels."""
    to: int
    """Height that the next class begins with, pixels; 0: this is the last."""
    sen_acc: Estimate
    ned: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class MapRow:
    """Accuracy of a run's lines that the glyph map shows, or of the others."""

    in_glyph_map: bool
    sen_acc: Estimate
    ned: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class WayRow:
    """Distance of a run's states from the teacher's at one timestep."""

    timestep: int
    """Where a step ends; -1 at the end of the solve."""
    error: Estimate
    """As `RunRow.endpoint_error`, of the states there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """What a run scored and cost."""

    folder: str
    """Of its results, in the evaluation's `runs/`."""
    label: str
    """Unique in the table."""
    kind: str
    """"truth", "vae", "teacher", "student" or "images"."""
    steps: int
    """Solver steps; 0 if there are none."""
    settings: Mapping[str, Any]
    """What its images depend on."""
    images: int
    """Sampled and read."""
    sen_acc: Estimate | None
    """Lines read exactly as asked for; None without lines, as all scores."""
    sen_acc_folded: Estimate | None
    """Lines read as asked for but for case and spaces."""
    ned: Estimate | None
    """Normalised edit similarity of the lines."""
    color_acc: Estimate | None
    """Lines of the colour asked for, of those with one."""
    ground: Estimate | None
    """Colour difference (Delta E*ab) from the true images outside the lines, of images that can be compared."""
    by_height: tuple[HeightRow, ...]
    """Classes of text height that have lines, low ones first."""
    by_map: tuple[MapRow, ...]
    """Lines in the glyph map, then those out of it, where there are any."""
    unet_evaluations: float
    """UNet calls of an image, mean."""
    writenet_evaluations: float
    """WriteNet calls of an image, mean."""
    seconds_per_image: float
    """The median: a machine that is shared for a while should not decide."""
    endpoint_error: Estimate | None = None
    """Distance of the latents from the teacher's own solve of the same noise, root of the mean square over images;
    None where nothing was sampled, or it was not measured, as the three that follow."""
    endpoint_error_inside: Estimate | None = None
    """In the latent cells that hold text, of images that have any."""
    endpoint_error_outside: Estimate | None = None
    """In the others."""
    psnr: Estimate | None = None
    """Of the images against those of the solve, dB, the mean over images that are not equal to them."""
    way: tuple[WayRow, ...] = ()
    """After each step at whose end the teacher's state is known, in order."""
    fid: float | None = None
    """If it was measured."""
    clip_score: float | None = None
    """Likewise."""
    kid: Estimate | None = None
    """Kernel distance to the true images; of these themselves, between two halves of them; None without them."""

    @property
    def is_unguided(self) -> bool:
        """Whether it is the teacher without guidance: a UNet call a step, as a student's."""
        return self.kind == "teacher" and self.settings.get("guidance_scale") == 1

    @property
    def is_ablation(self) -> bool:
        """Whether a part of the teacher was left out."""
        return bool(self.settings.get("without"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Paired differences of two runs; None where one cannot be compared."""

    run: str
    """Label of the run, less ..."""
    less: str
    """... this one's."""
    sen_acc: Estimate | None
    ned: Estimate | None
    color_acc: Estimate | None
    ground: Estimate | None
    endpoint_error: Estimate | None = None
    endpoint_error_inside: Estimate | None = None
    endpoint_error_outside: Estimate | None = None
    psnr: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The whole table."""

    settings: Mapping[str, Any]
    """What all runs share."""
    layouts: int
    """How many."""
    lines: int
    """Of all images of a run."""
    palette: tuple[Color, ...]
    """Colours that lines asked for."""
    runs: tuple[RunRow, ...]
    """Ceilings, teacher, students, many steps first; what leaves a part out comes last."""
    incomplete: tuple[str, ...]
    """Labels of runs that were begun and are not complete."""
    differences: tuple[Difference, ...]
    """Of all pairs of runs, the later in the table less the earlier."""

    def as_json(self) -> dict[str, Any]:
        """Return the content of `evaluation.json`; FID, CLIP score and KID only where they were measured."""
        return asdict(self, dict_factory=_named)


def _named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        name.rstrip("_"): value  # "from" is a word of Python's
        for name, value in pairs
        if value is not None or name not in ("fid", "clip_score", "kid")
    }
