"""An evaluation of a recorded set: conditioning, noise and the teacher's own solves are its records'.

No encoder is run, and nothing is solved to be measured against.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from both_stages.evaluation_parts import Prepared, Question, make_plan, students
from common.anytext2.conditioning import Conditioning, Uncond
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.pictures import Picture
from stage1_teacher.measuring.teacher_sampler import default_grids, teacher_samplers
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.evaluation.held_out_set import HeldOutSet
from stage2_student.evaluation.runs import Job
from stage2_student.evaluation.samplers import Sampler, sampler_run
from stage2_student.evaluation.solves import EndpointMeasure
from stage2_student.student.sample import decode, load_decoder
from stage2_student.student.shard_facts import require_base


def prepare_set(config: Config, question: Question) -> Prepared:
    """Prepare teacher and students on the records of a set, each from its recorded noise.

    Args:
        config: model and evaluate are used; how the teacher solves is the set's.
        question: who samples, and which set, with its trajectories if errors along the way are wanted.

    Raises:
        UsageError: an option, or a setting, is wrong.
        DataError: the set, its trajectories, an adapter or a checkpoint is, or they do not belong together.
    """
    location = question.held_out
    assert location is not None
    found = HeldOutSet(location, config.evaluate.num_samples, question.trajectories)
    require_base(found.facts, fingerprint(config.find_checkpoint(), "base"), location)
    found.require_samples(config.evaluate.samples_per_layout)
    solver = {key: found.solver[key] for key in ("solver_steps", "record_every", "guidance_scale")}
    config = config.replace(precompute=config.precompute.replace(**solver))
    load_vae = functools.cache(lambda: load_decoder(config))

    @functools.cache
    def load() -> tuple[Teacher, Uncond]:
        return Teacher.load(config), found.uncond

    def decode_latents(latents: Tensor) -> Sequence[Picture]:
        return decode(load_vae(), latents)

    def noise(jobs: Sequence[Job], count: int) -> Tensor:
        return found.noises(jobs, count, config.evaluate.seed)

    grids = () if question.no_teacher else question.grids or default_grids(config)
    samplers: list[Sampler] = [*teacher_samplers(config, _Recorded(found), load, grids, ())]
    samplers += students(config, question, found.conditioning)
    measure = EndpointMeasure(found, decode_latents, along_the_way=found.has_states)
    runs = [
        sampler_run(one, seed=config.evaluate.seed, noise_of=noise, decode=decode_latents, measure=measure)
        for one in samplers
    ]
    settings = {
        "held_out": {"set_hash": found.shards.set_hash, "trajectories": found.has_states},
        "seed": config.evaluate.seed,
    }
    plan = make_plan(config, found.layouts, samples_per_layout=config.evaluate.samples_per_layout)
    return Prepared(plan=plan, settings=settings, runs=runs)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The inputs of a set, for a teacher that samples."""

    found: HeldOutSet

    def encode(self, teacher: Teacher, input_ids: Sequence[str], without: str = "") -> list[Conditioning]:
        """Return what is recorded; nothing can be left out of that."""
        assert not without, without
        return self.found.conditioning(input_ids)
