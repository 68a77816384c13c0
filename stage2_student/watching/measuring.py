"""Measuring a checkpoint on held-out records: its images beside the teacher's own solves of the same noise.

Conditioning, noise and solves are the records': no encoder is run, and no teacher. RUN/watch is laid out as the
folder of an evaluation, with a run for each checkpoint and one for the teacher's solves.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from common.anytext2.conditioning import ConditioningBatch
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.differences import require_same
from common.layouts import Layout, hash_layouts
from common.pictures import Picture
from common.signals import StopFlag
from stage2_student.evaluation.crops import cut_line
from stage2_student.evaluation.held_out_set import HeldOutSet
from stage2_student.evaluation.judges import load_judge
from stage2_student.evaluation.metrics import Estimate, Grouped, estimate
from stage2_student.evaluation.reading import color_difference, scale_polygon, text_color
from stage2_student.evaluation.results import (
    LAYOUTS_FILE,
    RUN_FILE,
    ImageResult,
    load_layouts,
    read_description,
    save_layouts,
)
from stage2_student.evaluation.runs import Job, Plan, Run, Sampled, evaluate_run, run_folder
from stage2_student.evaluation.samplers import StudentSampler, sampler_run
from stage2_student.evaluation.solves import EndpointMeasure
from stage2_student.evaluation.summary import summarise_run
from stage2_student.evaluation.table import RunRow
from stage2_student.student.adapter import read_card
from stage2_student.student.sample import decode, load_decoder
from stage2_student.student.shard_facts import require_base
from stage2_student.watching.checkpoints import Candidate
from stage2_student.watching.log import Measured

logger = logging.getLogger(__name__)

TEACHER = "teacher's own solve"
"""Label of the run that the records hold already."""


class Measuring:
    """Measures one checkpoint after another; set, VAE and judge are opened once."""

    def __init__(self, config: Config, held_out: str, records: int, folder: Path) -> None:
        """Open all that is needed besides a checkpoint.

        Args:
            config: model and evaluate are used.
            held_out: the held-out set's folder or URL.
            records: how many of it, the first ones.
            folder: where watchers of the run keep their files.

        Raises:
            UsageError: there is no judge.
            DataError: the set, or the checkpoint with the VAE, is wrong; or the folder is of another question.
        """
        self._config, self._folder, self._warned = config, folder, False
        self._set = HeldOutSet(held_out, records)
        require_base(self._set.facts, fingerprint(config.find_checkpoint(), "base"), held_out)
        self._judge = load_judge(config.evaluate.judge)
        self._vae = load_decoder(config)
        self._measure = EndpointMeasure(self._set, self._decode)
        self.layouts = self._take_layouts(held_out)
        self._plan = Plan(
            layouts=self.layouts,
            batch_size=config.evaluate.batch_size,
            keep_images=config.evaluate.keep_images,
        )

    def _take_layouts(self, held_out: str) -> list[Layout]:
        """Return what each record asks for; of which colour, the teacher's solve said when watching began."""
        settings = {
            "samples_per_layout": 1,
            "judge": self._judge.identity,
            "held_out": {"set_hash": self._set.shards.set_hash, "records": hash_layouts(self._set.layouts)},
            "seed": self._config.evaluate.seed,
            "dtype": self._config.model.dtype,
        }
        if (self._folder / LAYOUTS_FILE).exists():
            layouts, before = load_layouts(self._folder)
            what = f"{self._folder}: what was measured before was measured otherwise"
            remedy = f"watch with those settings, or move {self._folder.name}/ away to measure all anew"
            require_same(
                {**settings, "count": len(self._set.layouts)}, {**before, "count": len(layouts)}, what, remedy
            )
            return layouts
        jobs = [(layout, 0) for layout in self._set.layouts]
        layouts = [
            _with_colors(layout, self._solved([job])[0])
            for job, layout in zip(jobs, self._set.layouts, strict=True)
        ]
        save_layouts(self._folder, layouts, settings)
        return layouts

    def teacher(self, stop: StopFlag) -> RunRow:
        """Read the images of the teacher's own solves, or return what was read of them before.

        Raises:
            Stopped: a signal came; finished batches are on disk.
        """
        steps = int(self._set.solver.get("solver_steps", 0))
        run = Run(
            label=TEACHER, kind="teacher", steps=steps, sample=lambda jobs: Sampled(images=self._solved(jobs))
        )
        return self._evaluate(run, stop)[0]

    def measure(self, candidate: Candidate, stop: StopFlag) -> Measured:
        """Sample and measure a checkpoint's adapter; what is there of it already is not sampled again.

        Raises:
            DataError: the adapter is of another base, or unreadable.
            Stopped: a signal came; finished batches are on disk.
        """
        self._warn_of_training_set(candidate)
        name = f"step {candidate.step} ({candidate.identity[:8]})"
        sampler = StudentSampler(self._config, candidate.adapter, name, self._condition)
        run = sampler_run(
            sampler,
            seed=self._config.evaluate.seed,
            noise_of=self._noise,
            decode=self._decode,
            measure=self._measure,
        )
        row, results = self._evaluate(run, stop)
        assert row.endpoint_error is not None  # there are records, and each is measured
        return Measured(
            step=candidate.step,
            adapter=candidate.identity,
            folder=row.folder,
            solver_steps=row.steps,
            endpoint_error=row.endpoint_error,
            endpoint_error_inside=row.endpoint_error_inside,
            endpoint_error_outside=row.endpoint_error_outside,
            psnr=row.psnr,
            sen_acc=row.sen_acc,
            ned=row.ned,
            color=_color(results),
            seconds_per_image=row.seconds_per_image,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _warn_of_training_set(self, candidate: Candidate) -> None:
        if not self._warned and read_card(candidate.adapter).set_hash == self._set.shards.set_hash:
            self._warned = True
            logger.warning("these records are what the student is trained on: the figures say nothing of others")

    def _evaluate(self, run: Run, stop: StopFlag) -> tuple[RunRow, list[ImageResult]]:
        results = evaluate_run(run, self._plan, self._judge, self._folder, stop)
        place = run_folder(self._folder, run.label)
        return summarise_run(place, read_description(place / RUN_FILE), results, (), 0), results

    def _condition(self, input_ids: Sequence[str]) -> ConditioningBatch:
        return ConditioningBatch.stack(self._set.conditioning(input_ids))

    def _noise(self, jobs: Sequence[Job], count: int) -> Tensor:
        return self._set.noises(jobs, count, self._config.evaluate.seed)

    def _decode(self, latents: Tensor) -> Sequence[Picture]:
        return decode(self._vae, latents)

    def _solved(self, jobs: Sequence[Job]) -> Sequence[Picture]:
        return self._decode(torch.stack([solve.latents for solve in self._set.of(jobs)]).float())


def _with_colors(layout: Layout, picture: Picture) -> Layout:
    """Ask for the colours that a picture shows, where its text stands out."""
    lines = [
        dataclasses.replace(line, color=text_color(cut_line(picture, scale_polygon(line, layout, picture))[0]))
        for line in layout.lines
    ]
    return dataclasses.replace(layout, lines=tuple(lines))


def _color(results: Sequence[ImageResult]) -> Estimate | None:
    """Average the colour differences of the lines whose text stands out in both images."""
    differences = [
        (result.layout_id, color_difference(line.color, line.found_color))
        for result in results
        for line in result.lines
        if line.color is not None and line.found_color is not None
    ]
    return estimate(Grouped.of([name for name, _ in differences], [value for _, value in differences]), 0)
