"""The model card: what an adapter's folder and every export say of themselves, in the README.md that a hub shows.

Its front matter is what the Hugging Face Hub reads: library, base model, licence, tags.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

from common.files import canonical_json
from stage2_student.student.ancestors import Ancestor

CARD_NAME = "README.md"
SAMPLES_DIR = "samples"
"""Of sample images, beside the card."""
RELEASED = "iic/cv_anytext2"
"""The released AnyText2, by ModelScope's name; its network is called sd15 here."""
_LIBRARIES = {"adapter": "peft", "merged": "anytext2"}  # all others: diffusers
_TAGS = ("anytext2", "text-rendering", "text-to-image", "distillation", "few-step")
_MARK = "<!-- written by anytext2-distill for the student {} -->"
_SECTIONS = ("train", "lora")
"""Of the training's configuration; the others name folders of the machine."""


class Card(Protocol):
    """What a model card says of a student: `adapter.Card` is one."""

    @property
    def objective(self) -> str: ...  # noqa: D102 (as in adapter.Card, all of them)
    @property
    def sampler(self) -> str: ...  # noqa: D102
    @property
    def timesteps(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def num_steps(self) -> int: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def base_fingerprint(self) -> str: ...  # noqa: D102
    @property
    def set_hash(self) -> str: ...  # noqa: D102
    @property
    def config(self) -> Mapping[str, Any]: ...  # noqa: D102
    @property
    def grid(self) -> str: ...  # noqa: D102
    @property
    def ancestors(self) -> Sequence[Ancestor]: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an evaluation found, as a card shows it."""

    note: str
    """On how much of what."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """A run each, with as many cells as the head."""
    samples: Mapping[str, bytes]
    """Images by file name."""


def base_name(model: Mapping[str, Any]) -> str:
    """Return what the base is called, of a [model] section: the released model, or the checkpoint's own name.

    "base" where the section says nothing.
    """
    if model.get("network") == "sd15":
        return RELEASED
    return Path(str(model.get("checkpoint") or "base")).stem


def student_mark(card: Card) -> str:
    """Return the line by which a card of this student is known again, so that no other file is written over."""
    known = [card.base_fingerprint, card.set_hash, card.objective, list(card.timesteps), card.step, card.rank]
    return _MARK.format(hashlib.sha256(canonical_json(known)).hexdigest()[:16])


def render_card(
    card: Card,
    layout: str,
    *,
    files: Sequence[str],
    base: str,
    measured: Measured | None = None,
    usage: str | None = None,
) -> str:
    """Write a model card.

    Args:
        card: the student's own.
        layout: "adapter", or a format of `export`.
        files: names of the weights' files, those of the folder.
        base: name of the base model.
        measured: what an evaluation found; None if there was none.
        usage: how to sample, Markdown; None for what goes with the layout.
    """
    steps = f"{card.num_steps} step{'s' * (card.num_steps != 1)}"
    parts = [
        _front_matter(layout, base),
        student_mark(card),
        f"# AnyText2 in {steps}",
        "A student of [AnyText2](https://github.com/tyxsspa/AnyText2), which draws images that contain exactly the"
        f" text asked for, where it is asked for. It calls the UNet {card.num_steps} times an image, without"
        " guidance; the teacher that it was distilled from has two calls a step. Made with anytext2-distill.",
        "## Files",
        "\n".join(f"- `{name}`" for name in files),
        "## How to sample",
        usage or _usage(card, layout, files),
        "## What it is",
        _table(("", ""), _facts(card, base)),
    ]
    settings = [
        (f"{section}.{key}", _cell(value)) for section in _SECTIONS for key, value in _section(card, section)
    ]
    if settings:
        parts += ["## Settings of its training", _table(("key", "value"), settings)]
    if measured is not None:
        parts += [
            "## Measured",
            measured.note,
            _table(measured.head, [[_text(cell) for cell in row] for row in measured.rows]),
        ]
        if measured.samples:
            shown = " ".join(f"![{name}]({SAMPLES_DIR}/{name})" for name in measured.samples)
            parts += ["Images of this evaluation, not chosen by hand:", shown]
    parts += ["## Licence", _licence_note(base)]
    return "\n\n".join(parts) + "\n"


def _front_matter(layout: str, base: str) -> str:
    relation = "adapter" if layout in ("adapter", "diffusers", "kohya") else "finetune"
    tags = [*_TAGS, "lora"] if relation == "adapter" else list(_TAGS)
    values: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": relation,
        "library_name": _LIBRARIES.get(layout, "diffusers"),
        "license": "creativeml-openrail-m" if base == RELEASED else "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": tags,
    }
    # Each value is JSON, which is YAML too.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _licence_note(base: str) -> str:
    if base == RELEASED:
        return (
            "AnyText2's code is under Apache-2.0. Its weights were trained from Stable Diffusion 1.5, whose"
            " licence (CreativeML Open RAIL-M, with its restrictions of use) passes on to what is made of them."
            " Read both before you publish this."
        )
    return (
        "Apache-2.0, as the base that comes with anytext2-distill; another base's own licence where there is one."
    )


def _facts(card: Card, base: str) -> list[tuple[str, str]]:
    rows = [
        ("base", f"`{base}`, UNet and WriteNet with the fingerprint `{card.base_fingerprint}`"),
        ("shards", f"set hash `{card.set_hash}`"),
        ("objective", card.objective),
        ("steps", f"{card.num_steps}, at t = {list(card.timesteps)} of the grid {card.grid}"),
        ("sampler", f"{card.sampler}, guidance scale 1"),
        ("trained", f"{card.step} optimizer steps"),
        ("LoRA", f"rank {card.rank}, alpha {card.alpha:g}"),
    ]
    rows += [
        (
            "started from",
            f"{ancestor.objective}, {ancestor.num_phases} steps, {ancestor.step} optimizer steps on the set"
            f" `{ancestor.set_hash}`; its weights' SHA-256 `{ancestor.adapter_sha256}`",
        )
        for ancestor in card.ancestors
    ]
    return rows


def _section(card: Card, name: str) -> list[tuple[str, Any]]:
    section = card.config.get(name)
    return sorted(section.items()) if isinstance(section, Mapping) else []


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")


def _text(value: str) -> str:
    """Have what others named shown as text: no markup, no cell's end."""
    return escape(value, quote=False).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]  # cells are Markdown already
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def scheduler_arguments(card: Card) -> tuple[str, dict[str, Any]]:
    """Return diffusers' scheduler for this student, and what tells its grid; SD1.5's betas go with it."""
    if card.sampler == "lcm":
        return "LCMScheduler", {}
    if card.grid == "upstream":
        return "DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    return "DDIMScheduler", {"timestep_spacing": "trailing", "steps_offset": 0, "set_alpha_to_one": True}


def _usage(card: Card, layout: str, files: Sequence[str]) -> str:
    name = files[0] if files else "FILE"
    scheduler, arguments = scheduler_arguments(card)
    written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    ours = (
        "With anytext2-distill:\n\n```bash\npython pipeline.py sample --config configs/sd15.toml"
        f" --adapter {'.' if layout == 'adapter' else name} \\\n  --prompt 'a sign that says \"OPEN\"'"
        " --box 100,180,412,300 --out open.png\n```"
    )
    if layout == "merged":
        grid = (
            "In AnyText2's own program: put the file in the checkpoint's place, set steps to"
            f" {card.num_steps} and the CFG scale to 1."
            if card.grid == "upstream"
            else "AnyText2's own program calls other timesteps than this student was trained for: sample it as"
            " above."
        )
        return f"A whole AnyText2 checkpoint with the student in the teacher's place. {ours}\n\n{grid}"
    elsewhere = (
        f"With other code: eps-prediction, one UNet call a step and guidance scale 1, `{scheduler}({written})` of"
        f" diffusers at t = {list(card.timesteps)}. AnyText2's AttnX and WriteNet are needed; a stock Stable"
        " Diffusion pipeline has neither, and its text encoder does not know the lines of text."
    )
    return f"{ours}\n\n{elsewhere}"
