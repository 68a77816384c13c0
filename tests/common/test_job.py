from __future__ import annotations

from collections.abc import Mapping

import pytest

from common.errors import UsageError
from common.job import first_host, meet_by_slurm, number_tasks

BATCH_SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def array(number: int, *, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    """What Slurm sets in an element of an array."""
    values = {"ID": number, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def step(rank: int, tasks: int, **more: str) -> dict[str, str]:
    """What Slurm sets in a process of `srun -n TASKS`."""
    return BATCH_SHELL | {
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_ID": "0",
        **more,
    }


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
        (array(5, first=5, last=5, count=1), (None, 8), (5, 8)),  # --array=5 of 8, submitted again
        (array(7, first=3, last=7, count=2), (None, 8), (7, 8)),  # --array=3,7
        (array(6, first=4, last=7, count=4), (None, 8), (6, 8)),
        (array(6, first=4, last=7, count=4), (None, None), (2, 4)),
        (array(16, first=1, last=16, count=16), (None, 16), (0, 16)),  # --array=1-16: each has a start of its own
        (array(5, first=1, last=9, count=3, step=4), (None, None), (1, 3)),
        (BATCH_SHELL, (None, None), (0, 1)),
        (step(1, 2), (None, None), (1, 2)),
        (step(1, 2), (None, 2), (1, 2)),
        (step(1, 2) | array(3, first=3, last=3, count=1), (None, 4), (7, 8)),
        (step(1, 2) | array(1, first=0, last=3, count=4), (None, None), (3, 8)),
        (step(1, 2) | {"RANK": "5", "WORLD_SIZE": "8"}, (None, None), (5, 8)),  # torchrun inside srun
        ({"JOB_COMPLETION_INDEX": "2", "RANK": "1", "WORLD_SIZE": "2"}, (None, 3), (5, 6)),
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


@pytest.mark.parametrize(
    "elements",
    [
        {"first": 3, "last": 7, "count": 2},
        {"first": 0, "last": 7, "count": 7},
        {"first": 0, "last": 5, "count": 2},
    ],
)
def test_a_part_of_an_array_must_say_of_how_many(elements: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"SLURM_ARRAY_TASK_COUNT: received \d elements .* give --num-tasks N"):
        number_tasks(array(elements["last"], **elements), None, None)


def test_what_no_job_system_sets_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="JOB_COMPLETION_INDEX: received 'x', expected an integer"):
        number_tasks({"JOB_COMPLETION_INDEX": "x"}, None, 4)


def test_the_processes_of_a_step_know_where_they_meet() -> None:
    nodes = {"SLURM_STEP_NODELIST": "gpu[007-009],login", "SLURM_STEP_NUM_NODES": "4"}
    environs = [
        step(rank, 6, **nodes, SLURM_STEP_TASKS_PER_NODE="2(x2),1(x2)", SLURM_NODEID=node, SLURM_LOCALID=local)
        for rank, (node, local) in enumerate(
            (("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("2", "0"), ("3", "0"))
        )
    ]
    for environ in environs:
        meet_by_slurm(environ)
    assert {(e["MASTER_ADDR"], e["WORLD_SIZE"]) for e in environs} == {("gpu007", "6")}
    assert len({e["MASTER_PORT"] for e in environs}) == 1 and 20000 <= int(environs[0]["MASTER_PORT"]) < 32000
    assert [e["RANK"] for e in environs] == ["0", "1", "2", "3", "4", "5"]
    assert [e["LOCAL_RANK"] for e in environs] == ["0", "1", "0", "1", "0", "0"]
    assert [e["LOCAL_WORLD_SIZE"] for e in environs] == ["2", "2", "2", "2", "1", "1"]
    other = step(0, 6, **nodes, SLURM_STEP_ID="1")
    other["SLURM_STEP_ID"] = "1"
    meet_by_slurm(other)
    assert other["MASTER_PORT"] != environs[0]["MASTER_PORT"]


def test_on_one_node_they_meet_on_it_and_what_is_set_already_stays() -> None:
    environ = step(1, 2, SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1")
    meet_by_slurm(environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1"
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    environ = step(1, 2, SLURM_STEP_NODELIST="a,b", **given)
    meet_by_slurm(environ)
    assert {name: environ[name] for name in given} == given


@pytest.mark.parametrize("environ", [{}, BATCH_SHELL, step(0, 1), step(1, 2) | {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_and_those_of_a_launcher_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    meet_by_slurm(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[01-04,07],m2", "n01"),
        ("gpu[7,9]", "gpu7"),
        ("rack[0-1]node[3-8].example.org", "rack0node3.example.org"),
        ("a-b.c,d", "a-b.c"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
