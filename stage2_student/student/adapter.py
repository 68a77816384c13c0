"""A trained student on disk: LoRA files and the card that says how to sample with them; or one exported file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.ddim import CLEAN, Grid
from common.errors import DataError, UsageError, reason
from common.faults import raise_disk_fault
from common.files import canonical_json, write_bytes_atomic
from stage2_student.student import exported
from stage2_student.student.ancestors import Ancestor
from stage2_student.student.checkpoint_folders import CHECKPOINTS_DIR, LIST_FILE, newest_checkpoint
from stage2_student.student.lora import attach, load_lora, save_lora
from stage2_student.student.model_card import CARD_NAME, SAMPLES_DIR, base_name, render_card
from stage2_student.student.student import Student, split_parts

CARD_FILE = "student.json"
LORA_DIR, EMA_DIR = "lora", "ema"
"""Adapters in a checkpoint: the trained one, and the average of its weights if the run keeps one."""
FORMAT = 1
SAMPLERS = ("ddim", "lcm")
GRIDS = {"trailing": CLEAN, "upstream": 0}
"""Where a student's last step ends, by the name of its grid: at x0, or where AnyText2's own program ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What sampling needs to know, and where the student comes from."""

    objective: str
    """Of the training, e.g. "phased"."""
    sampler: str
    """"ddim" (eta 0) or "lcm" (noise is added between steps)."""
    timesteps: tuple[int, ...]
    """t at which the network is called, descending; as many as there are steps (M)."""
    step: int
    """Optimizer steps of training."""
    rank: int
    """Of the adapters."""
    alpha: float
    """Their output is scaled by alpha / rank."""
    base_fingerprint: str
    """Of the base (UNet and WriteNet) that was trained on."""
    set_hash: str
    """Of the shards that were trained on."""
    config: Mapping[str, Any]
    """The training's resolved configuration."""
    ancestors: tuple[Ancestor, ...] = ()
    """The students that it was started from, oldest first; none if its training started fresh."""
    grid: str = "trailing"
    """Of `GRIDS`."""

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        if self.sampler not in SAMPLERS or self.grid not in GRIDS or not self.timesteps or not falling:
            raise DataError(
                f"{CARD_FILE}: sampler {self.sampler!r}, grid {self.grid!r}, timesteps {self.timesteps}: not known"
            )

    @property
    def num_steps(self) -> int:
        """M."""
        return len(self.timesteps)

    @property
    def solve(self) -> Grid:
        """Where a solve by this student calls it, and where it ends."""
        return Grid(timesteps=torch.tensor(self.timesteps), end=torch.tensor(GRIDS[self.grid]))

    @property
    def num_noises(self) -> int:
        """K: noises of an image; one, or with the sampler "lcm" one for each step."""
        return self.num_steps if self.sampler == "lcm" else 1

    def at_step(self, step: int) -> Card:
        """Return the card after so many optimizer steps."""
        return dataclasses.replace(self, step=step)

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON values; where it says nothing of ancestors and grid, these are the usual."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        if not self.ancestors:
            del values["ancestors"]
        if self.grid == "trailing":
            del values["grid"]
        return values

    def to_metadata(self, layout: str) -> exported.Metadata:
        """Return what an exported file says of itself.

        The training's configuration stays at home: it names folders of the machine.

        Args:
            layout: of the file, see `exported`.
        """
        return {
            "layout": layout,
            "objective": self.objective,
            "sampler": self.sampler,
            "num_inference_steps": str(self.num_steps),
            "timesteps": json.dumps(list(self.timesteps)),
            "guidance_scale": "1.0",
            "trained_steps": str(self.step),
            "rank": str(self.rank),
            "alpha": str(float(self.rank) if layout == "diffusers" else self.alpha),
            "base_fingerprint": self.base_fingerprint,
            "set_hash": self.set_hash,
            **({} if self.grid == "trailing" else {"grid": self.grid}),
            **({"ancestors": json.dumps(self.to_json()["ancestors"])} if self.ancestors else {}),
        }

    @staticmethod
    def from_metadata(metadata: Mapping[str, str], path: Path) -> Card:
        """Read what an exported file says of itself.

        Raises:
            DataError: it says too little to sample with it.
        """
        try:
            return Card(
                objective=metadata["objective"],
                sampler=metadata["sampler"],
                timesteps=tuple(int(t) for t in json.loads(metadata["timesteps"])),
                step=int(metadata["trained_steps"]),
                rank=int(metadata["rank"]),
                alpha=float(metadata["alpha"]),
                base_fingerprint=metadata["base_fingerprint"],
                set_hash=metadata["set_hash"],
                config={},
                ancestors=_read_ancestors(json.loads(metadata.get("ancestors", "[]"))),
                grid=metadata.get("grid", "trailing"),
            )
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}: its metadata does not say how to sample it ({reason(error)}), expected that of a file"
                " which export wrote; give the run's folder, or export it again"
            ) from None

    def require_base(self, fingerprint: str, path: Path) -> None:
        """Refuse another base than the one that was trained on.

        Args:
            fingerprint: of the base at hand.
            path: of the adapter, for messages.

        Raises:
            DataError: it is another.
        """
        if self.base_fingerprint != fingerprint:
            raise DataError(
                f"adapter {path}: trained on the base {self.base_fingerprint[:12]}, received the base"
                f" {fingerprint[:12]}; set model.checkpoint to the one that it was trained on"
            )

    def require_steps(self, steps: int | None) -> None:
        """Refuse another number of steps than the student was trained for.

        Args:
            steps: what was asked for, or None for M.

        Raises:
            UsageError: it is not M.
        """
        if steps is not None and steps != self.num_steps:
            raise UsageError(
                f"this student was trained for {self.num_steps} steps (timesteps {list(self.timesteps)}), received"
                f" {steps}; leave the number out, or train another with train.num_phases = {steps}"
            )


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], card: Card) -> None:
    """Write an adapter: a PEFT folder for each adapted network, the model card, then the card.

    Args:
        folder: made if missing.
        tensors: by the names of `Student.trainable`.
        card: written last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, of_part in split_parts(dict(tensors)).items():
        save_lora(folder / part, of_part, rank=card.rank, alpha=card.alpha)
    base = base_name(card.config.get("model", {}))
    said = render_card(card, "adapter", files=sorted(adapter_files(folder)), base=base)
    write_bytes_atomic(folder / CARD_NAME, said.encode())
    write_bytes_atomic(folder / CARD_FILE, canonical_json(card.to_json()))


def read_card(folder: Path) -> Card:
    """Read the card of an adapter's folder, or of an exported file.

    Raises:
        DataError: it is missing, or not one that this version knows.
    """
    if folder.is_file():
        return Card.from_metadata(exported.read_metadata(folder), folder)
    path = folder / CARD_FILE
    try:
        values = json.loads(path.read_bytes())
        found = values.pop("format")
        if found != FORMAT:
            raise DataError(f"{path}: format is {found}, expected {FORMAT}; is it of another version?")
        values["timesteps"] = tuple(int(t) for t in values["timesteps"])
        values["ancestors"] = _read_ancestors(values.get("ancestors", []))
        return Card(**values)
    except FileNotFoundError:
        raise DataError(f"{folder}: no {CARD_FILE}; expected a run folder or an adapter's folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise_disk_fault(error, path)
        raise DataError(f"{path}: not an adapter's card ({reason(error)})") from None


def _read_ancestors(values: Sequence[Mapping[str, Any]]) -> tuple[Ancestor, ...]:
    return tuple(map(Ancestor.from_json, values))


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder, or of an exported LoRA, by the names of `Student.trainable`.

    Raises:
        DataError: a file is missing or unreadable.
    """
    if folder.is_file():
        return exported.read_tensors(folder, exported.read_metadata(folder))
    parts = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != SAMPLES_DIR)
    return {f"{part}.{name}": tensor for part in parts for name, tensor in load_lora(folder / part)[0].items()}


def attach_adapter(student: Student, folder: Path, base_fingerprint: str) -> Card:
    """Give the base a stored adapter.

    Args:
        student: without adapters.
        folder: holds the card; or an exported LoRA.
        base_fingerprint: of the student's checkpoint.

    Raises:
        DataError: the adapter is unreadable, or was trained on another base.
    """
    card = read_card(folder)
    card.require_base(base_fingerprint, folder)
    for part, tensors in split_parts(load_tensors(folder)).items():
        if part not in student.parts:
            raise DataError(f"adapter {folder}: unknown part {part!r}, expected unet or writenet")
        attach(student.parts[part], part, tensors, rank=card.rank, alpha=card.alpha)
    return card


def adapter_files(path: Path) -> dict[str, Path]:
    """Return the files that an adapter consists of, by name, without its model card; those of an export by part.

    Args:
        path: an adapter's folder, or an exported file.

    Raises:
        DataError: an exported file is unreadable.
    """
    if not path.is_file():
        parts = [file for file in sorted(path.rglob("*")) if file.is_file()]
        names = {file.relative_to(path).as_posix(): file for file in parts}
        return {
            name: file for name, file in names.items() if name != CARD_NAME and not name.startswith(SAMPLES_DIR)
        }
    other = exported.read_metadata(path).get("writenet_file")
    return {"exported": path, **({"writenet": path.with_name(other)} if other else {})}


def find_adapter(path: Path) -> Path:
    """Find the adapter to sample with.

    Args:
        path: a run's folder (its newest complete checkpoint is taken), a checkpoint, an adapter's folder such as
            the RUN/best of `watch`, or a file that `export` wrote. Of a checkpoint that keeps an average of the
            weights, the average is taken.

    Raises:
        DataError: there is none.
    """
    if path.is_file():
        return path
    if (path / CARD_FILE).exists():
        return path.resolve() if path.is_symlink() else path  # RUN/best may be linked to another one meanwhile
    checkpoint = path if (path / LIST_FILE).exists() else newest_checkpoint(path / CHECKPOINTS_DIR)
    if checkpoint is not None:
        for kind in (EMA_DIR, LORA_DIR):
            if (checkpoint / kind / CARD_FILE).exists():
                return checkpoint / kind
    raise DataError(
        f"{path}: no adapter there; expected the folder of a run with a checkpoint, an adapter's folder, or a file"
        " that export wrote"
    )
