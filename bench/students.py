"""What scripts that compare students share: they train and measure them one after another, and pool their scores.

Every student is a folder with a log beside it, and all are measured in one evaluation, on the same layouts and
noise. Scores of several seeds are pooled, so that intervals are over layouts, and differences are paired.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import PROJECT_ROOT
from common.errors import DataError, MachineError, UsageError
from common.layouts import palette_of
from common.scripts import make_parser
from stage1_teacher.tiny.data import write_dataset
from stage1_teacher.tiny.ground import WORLDS
from stage2_student.evaluation.image_features import FEATURES_FILE, load_features
from stage2_student.evaluation.kernel_distance import resampled_distance
from stage2_student.evaluation.metrics import Estimate, Floats, Grouped, percentile_interval, resample
from stage2_student.evaluation.results import RESULTS_FILE, load_layouts, load_results
from stage2_student.evaluation.run_quality import TRUE_IMAGES
from stage2_student.evaluation.runs import run_folder
from stage2_student.evaluation.summary import measures
from stage2_student.training.runlog import read_log

ERRORS = {2: UsageError, 74: MachineError}
"""Of a command's exit codes; any other is data's."""
IMAGE_SIZE = 96
"""Of the embedded teacher's images."""


def comparing_parser(text: str | None, *, shards: bool = True) -> argparse.ArgumentParser:
    """Return a parser of what every comparison asks for.

    Args:
        text: the script's own.
        shards: whether students are trained on a set that is there.
    """
    parser = make_parser(text)
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "configs" / "tiny.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every command")
    parser.set_defaults(shards=None)
    if shards:
        parser.add_argument("--shards", type=Path, required=True, help="that the students are trained on")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for students, their logs and the evaluation"
    )
    parser.add_argument("--annotations", type=Path, help="of the held-out layouts; otherwise they are drawn")
    parser.add_argument("--world", choices=WORLDS, default="told", help="that held-out layouts are drawn from")
    parser.add_argument("--layouts", type=int, default=96, help="held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where students are trained and measured, and on what."""

    config: Path
    sets: tuple[str, ...]
    """`--set`s of every command, KEY=VALUE."""
    shards: Path | None
    """Of most students, if they share a set."""
    out: Path
    annotations: Path
    """Of the held-out layouts."""
    layouts: int
    """How many of them are measured."""

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Bench:
        """Take what `comparing_parser` parsed; draws the held-out layouts if they are not given."""
        out = options.out.absolute()
        annotations = options.annotations
        if annotations is None:
            world = WORLDS[options.world]
            folder = out / f"held_out-{options.world}-{options.layouts}"
            annotations = folder / "data.json"
            if not annotations.exists():  # it is written last
                write_dataset(folder, count=options.layouts, seed=1, size=IMAGE_SIZE, world=world)
        return cls(
            config=options.config.absolute(),
            sets=tuple(options.set),
            shards=options.shards and options.shards.absolute(),
            out=out,
            annotations=annotations.absolute(),
            layouts=options.layouts,
        )

    @property
    def evaluation(self) -> Path:
        """Folder of the evaluation that all students share."""
        return self.out / f"evaluation-{self.layouts}"

    def run_of(self, name: str) -> Path:
        """Return a student's folder."""
        return self.out / "runs" / name

    def precompute(self, name: str, annotations: Path, *more: object) -> Path:
        """Make a set of shards, or what is missing of it; returns its folder.

        Args:
            name: of its folder.
            annotations: of its inputs.
            more: further words of the command.
        """
        folder = self.out / "shards" / name
        self._call(name, "precompute", "--annotations", annotations.absolute(), "--out", folder, *more)
        return folder

    def train(
        self,
        name: str,
        settings: Mapping[str, object],
        ancestor: str | None = None,
        shards: Path | None = None,
    ) -> None:
        """Train a student, or go on with it; one that is done is left as it is.

        Args:
            name: of its folder.
            settings: by key, those of [train] without its name.
            ancestor: name of the student that it is started from, if any.
            shards: that it is trained on, if not the usual ones.
        """
        place = ["--shards", shards or self.shards, "--out", self.run_of(name), "--resume", "auto"]
        place += [] if ancestor is None else ["--from", self.run_of(ancestor)]
        sets = [word for key, value in settings.items() for word in ("--set", setting(key, value))]
        self._call(name, "train", *place, *sets)

    def evaluate(self, names: Iterable[str] | Mapping[str, Path], *more: str) -> None:
        """Measure students on the held-out layouts; those that were measured before are left as they are.

        Args:
            names: of their folders; the evaluation calls them so too. Or of adapters, with their places.
            more: further words of the command.
        """
        places = names if isinstance(names, Mapping) else {name: self.run_of(name) for name in names}
        students = [word for name, place in places.items() for word in ("--adapter", f"{name}={place}")]
        inputs = ["--annotations", self.annotations, "--set", f"evaluate.num_samples={self.layouts}"]
        self._call("evaluation", "evaluate", *inputs, *students, *more, "--out", self.evaluation)

    def minutes(self, name: str) -> float:
        """Return how long a student's training steps took, as its log has it."""
        lines, before, seconds = read_log(self.run_of(name)), 0, 0.0
        for line in lines:
            if "step_seconds" in line:
                seconds += (line["step"] - before) * line["step_seconds"]
                before = line["step"]
        return seconds / 60

    def _call(self, name: str, command: str, *words: object) -> None:
        """Run a command of the pipeline, what it says going to a log.

        Raises:
            AppError: it failed.
        """
        log = self.out / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        sets = [word for value in self.sets for word in ("--set", value)]
        line = [sys.executable, "pipeline.py", command, "--config", str(self.config), *sets, *map(str, words)]
        print(f"{command} {name}: {log}", flush=True)
        with log.open("ab") as file:
            file.write(f"$ {' '.join(line)}\n".encode())
            file.flush()
            done = subprocess.run(line, cwd=PROJECT_ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            last = log.read_text(errors="replace").splitlines()[-1]
            error = ERRORS.get(done.returncode, DataError)
            raise error(f"{command} of {name} ended with {done.returncode}: {last}; all of it is in {log}")


def setting(key: str, value: object) -> str:
    """Write a setting as `--set` takes it; a key without a section's name is one of [train]."""
    return f"{key if '.' in key else f'train.{key}'}={value}"


# Scores, with the seeds of one kind of student pooled.


def label_of(name: str, steps: int) -> str:
    """Return what an evaluation calls a student."""
    return f"{name}, {steps} step{'s' if steps > 1 else ''}"


def load_scores(evaluation: Path, label: str) -> dict[str, Grouped]:
    """Return the scores of a run, by the names that evaluations have for them.

    Args:
        evaluation: its folder.
        label: of a complete run.
    """
    layouts, _ = load_layouts(evaluation)
    return measures(load_results(run_folder(evaluation, label) / RESULTS_FILE), palette_of(layouts))


def pool(groups: Sequence[Grouped]) -> Grouped:
    """Return the scores of several runs on the same layouts as those of one."""
    if any(group.layout_ids != groups[0].layout_ids for group in groups):
        raise DataError("received runs on different layouts, expected the same; evaluate all in one folder")
    return Grouped(
        layout_ids=groups[0].layout_ids,
        sums=np.sum([group.sums for group in groups], axis=0),
        counts=np.sum([group.counts for group in groups], axis=0),
        root=groups[0].root,
    )


def ratio(a: Grouped, b: Grouped, seed: int = 0) -> Estimate:
    """Return mean(a) / mean(b), both resampled by the same layouts.

    Args:
        a: scores of the same layouts as b's.
        b: above 0.
        seed: keys the resampling.
    """
    once = np.ones((1, len(a.layout_ids)))
    weights = np.concatenate([once, resample(once.shape[1], seed)])  # (1 + R, layouts)
    found = a.means(weights) / b.means(weights)
    return _estimate(float(found[0]), found[1:], int(a.counts.sum()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kid:
    """KID to the true images, the mean over some runs, and its resamples: paired with those of others."""

    value: float
    resampled: Floats
    """(R,)."""
    count: int
    """Layouts."""

    @property
    def estimate(self) -> Estimate:
        """The value with its interval."""
        return _estimate(self.value, self.resampled, self.count)

    def less(self, other: Kid) -> Estimate:
        """Return the paired difference."""
        return _estimate(self.value - other.value, self.resampled - other.resampled, self.count)


def load_kid(evaluation: Path, labels: Sequence[str], seed: int = 0) -> Kid | None:
    """Return the KID of some runs; None if they, or the true images, were not looked at.

    Args:
        evaluation: its folder.
        labels: of complete runs.
        seed: keys the resampling.
    """
    layouts, settings = load_layouts(evaluation)
    samples = range(settings["samples_per_layout"])
    expected = [(layout.layout_id, sample) for layout in layouts for sample in samples]
    truth, *runs = [
        load_features(run_folder(evaluation, label) / FEATURES_FILE, expected) for label in (TRUE_IMAGES, *labels)
    ]
    if truth is None or any(run is None or run[0] != truth[0] for run in runs):
        return None
    found = [resampled_distance(truth[1], run[1], seed) for run in runs if run is not None]
    return Kid(
        value=float(np.mean([value for value, _ in found])),
        resampled=np.mean([resampled for _, resampled in found], axis=0),
        count=len(layouts),
    )


def _estimate(value: float, resampled: Floats, count: int) -> Estimate:
    low, high = percentile_interval(resampled)
    return Estimate(value=value, low=low, high=high, count=count)
