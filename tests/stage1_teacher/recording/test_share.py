from __future__ import annotations

from collections.abc import Mapping

import pytest

from common.errors import UsageError
from stage1_teacher.recording.share import number_tasks


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (2, 5), (2, 5)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (None, None), (3, 8)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (None, None),
            (3, 4),
        ),
        ({"JOB_COMPLETION_INDEX": "3"}, (None, 8), (3, 8)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, (None, None), (1, 4)),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"},
            (None, None),
            (9, 12),
        ),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8"}, (0, 2), (0, 2)),
    ],
)
def test_tasks_are_numbered_by_flags_or_the_job_system(
    environ: Mapping[str, str], flags: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    assert number_tasks(environ, *flags) == expected


@pytest.mark.parametrize(
    ("environ", "flags"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, (None, None)),
        ({}, (1, None)),
        ({}, (None, 4)),
        ({"RANK": "1"}, (None, None)),
    ],
)
def test_a_task_that_does_not_know_its_number_or_their_count_does_nothing(
    environ: Mapping[str, str], flags: tuple[int | None, int | None]
) -> None:
    with pytest.raises(UsageError, match=r"Give --(num-tasks|task-index)"):
        number_tasks(environ, *flags)
