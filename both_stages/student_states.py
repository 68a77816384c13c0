"""A student's own states as stage one records them: `precompute --states-from ADAPTER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.fingerprint import fingerprint
from common.config import Config
from common.ddim import CLEAN
from common.errors import DataError, UsageError
from common.files import sha256_file
from stage1_teacher.teacher.student_states import StudentStates, Walk
from stage2_student.student.adapter import adapter_files, find_adapter, read_card
from stage2_student.student.sample import LoadedStudent


def states_from(config: Config, adapter: Path) -> tuple[Config, StudentStates]:
    """Find a student whose states are to be recorded.

    Args:
        config: its [model] section is the base's.
        adapter: a run's folder, a checkpoint, an adapter's folder, or a file that `export` wrote.

    Returns:
        The configuration with precompute.source "student", and the student, which is loaded when it is needed.

    Raises:
        UsageError: the student adds noise on its way or is called on AnyText2's grid, or the configuration asks
            for noised data.
        DataError: no adapter there, or it belongs to another base.
    """
    if config.precompute.source == "noised":
        raise UsageError(
            'precompute.source: received "noised" with --states-from, expected it to be left out: a student starts'
            " from noise"
        )
    folder = find_adapter(adapter)
    card = read_card(folder)
    card.require_base(fingerprint(config.find_checkpoint(), "base"), folder)
    if card.sampler != "ddim" or card.grid != "trailing":
        raise UsageError(
            f'--states-from {adapter}: received a student of sampler "{card.sampler}" and grid "{card.grid}",'
            ' expected "ddim" and "trailing": the teacher solves from each of its states to where its step ends'
        )

    def hash_files() -> dict[str, str]:
        return {name: sha256_file(file) for name, file in sorted(adapter_files(folder).items())}

    def load() -> Walk:
        student = LoadedStudent.load(config, folder)
        if hash_files() != files:
            raise DataError(
                f"--states-from {adapter}: the adapter is another than when this command started; start it again,"
                " with an adapter that stays"
            )

        def walk(conditionings: Sequence[Conditioning], noise: Tensor) -> Tensor:
            states = [noise.to(student.device)]

            def keep(timestep: int, state: Tensor) -> None:
                if timestep != CLEAN:
                    states.append(state)

            student.latents(ConditioningBatch.stack(conditionings), noise[:, None], keep)
            return torch.stack(states, dim=1)  # (B, M, C, h, w)

        return walk

    files = hash_files()
    description = {"adapter": files, "step": card.step}
    config = config.replace(precompute=config.precompute.replace(source="student"))
    return config, StudentStates(timesteps=card.timesteps, description=description, load=load)
