from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cluster import slurm
from cluster.job import Job, Tasks
from cluster.submission import make_chain, plan_slurm
from common.cluster_settings import ClusterConfig
from common.config import PROJECT_ROOT

PLACE = "/data/a set"


def job(command: str = "precompute", *options: str) -> Job:
    return Job(command=command, options=options, folder=Path(PLACE), jobs=Path(PLACE) / "jobs")


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def script(settings: ClusterConfig, tasks: Tasks | None = None, array: range = range(4)) -> str:
    return slurm.render_precompute(settings, job("precompute", "--out", PLACE), tasks or Tasks(num_tasks=4), array)


def check_syntax(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_section_decides_what_a_job_asks_for() -> None:
    settings = ClusterConfig(
        partition="gpu", account="lab", qos="long", cpus=8, threads=2, memory="48G", gpu_type="h100", time="1-06",
        batch_seconds=30.5, options=("--constraint=ib",), modules=("cuda/12.4", "python"), setup=("export A=b",),
        python="/opt/python",
    )  # fmt: skip
    text = script(settings, Tasks(num_tasks=4, throttle=2))
    check_syntax(text)
    assert text.startswith("#!/bin/bash -l\n")  # which knows `module`
    assert directives(text) == [
        "--job-name=precompute-a-set", "--partition=gpu", "--account=lab", "--qos=long", "--array=0-3%2",
        f'--output="{PLACE}/jobs/precompute-%A_%a.log"', "--ntasks-per-node=1", "--cpus-per-task=8", "--mem=48G",
        "--gres=gpu:h100:1", "--time=1-06", "--open-mode=append", "--requeue", "--signal=TERM@91",
        "--constraint=ib",
    ]  # fmt: skip
    assert "export OMP_NUM_THREADS=2 MKL_NUM_THREADS=2 OPENBLAS_NUM_THREADS=2\n" in text
    assert "module load cuda/12.4 || exit 74\nmodule load python || exit 74\nexport A=b\n" in text
    assert f"cd {PROJECT_ROOT} || exit 74\n" in text
    assert "\n  /opt/python pipeline.py precompute\n  --out '/data/a set'\n  --num-tasks 4\n" in text


def test_without_gpus_partition_and_modules_nothing_is_said_of_them() -> None:
    text = script(ClusterConfig(gpus=0))
    assert text.startswith("#!/bin/bash\n")
    assert not [
        line for line in directives(text) if line.startswith(("--gres", "--partition", "--account", "--qos"))
    ]
    assert "module" not in text


def test_an_array_larger_than_slurm_takes_is_cut_and_its_tasks_stay_numbered_through() -> None:
    parts = plan_slurm(ClusterConfig(), make_chain([], [], out=Path(PLACE), jobs=Path("/j"), run=None,
                       run_jobs=Path("/j")), Tasks(num_tasks=2500, throttle=8), 1001)  # fmt: skip
    arrays = [part for part in parts if part.job.command == "precompute"]
    assert [part.file.name for part in arrays] == [f"precompute-{number}.sbatch" for number in range(3)]
    assert [directives(part.text)[1] for part in arrays] == [
        "--array=0-1000%8",
        "--array=0-1000%8",
        "--array=0-497%8",
    ]
    assert '--task-index "$SLURM_ARRAY_TASK_ID"' in arrays[0].text
    assert '--task-index "$((SLURM_ARRAY_TASK_ID + 2002))"' in arrays[2].text
    assert all("--num-tasks 2500" in part.text for part in arrays)
    assert [part.waits for part in parts] == ["", "", "", "afterany"]


def test_the_chain_finalizes_whatever_becomes_of_the_array_and_trains_on_a_complete_set() -> None:
    settings = ClusterConfig(partition="gpu", cpu_partition="cpu", train_nodes=2, train_processes=4, cpus=3)
    chain = make_chain(
        ["--config", "/c.toml", "--out", PLACE], ["--config", "/c.toml"],
        out=Path(PLACE), jobs=Path(PLACE) / "jobs", run=Path("/runs/one"), run_jobs=Path("/runs/one/jobs"),
    )  # fmt: skip
    _array, finalize, train = plan_slurm(settings, chain, Tasks(num_tasks=2), 1001)
    assert (finalize.waits, train.waits) == ("afterany", "afterok")
    assert train.file == Path("/runs/one/jobs/train.sbatch")
    assert {"--partition=cpu", "--cpus-per-task=3"} < set(directives(finalize.text))
    assert not [line for line in directives(finalize.text) if line.startswith(("--gres", "--requeue", "--signal"))]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4", "--mem=128G"} < set(directives(train.text))
    assert "srun --ntasks=8 --cpus-per-task=3 --wait=300" in train.text
    assert "  --config /c.toml\n  --shards '/data/a set'\n  --out /runs/one\n  --resume auto\n" in train.text
    for part in (finalize, train):
        check_syntax(part.text)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"container": "/i.sif", "container_mounts": ["/data"]},
            [f"apptainer exec --nv --bind {PROJECT_ROOT} --bind '/data/a set' --bind /data ", "/i.sif python "],
        ),
        (
            {"container": "reg#i:1", "container_runtime": "pyxis", "container_mounts": ["/a:/b"]},
            ["--container-image='reg#i:1'", f"{PROJECT_ROOT}:{PROJECT_ROOT},/data/a set:/data/a set,/a:/b"],
        ),
    ],
)  # fmt: skip
def test_a_command_runs_in_the_container_that_is_asked_for(settings: dict[str, object], said: list[str]) -> None:
    text = script(ClusterConfig.model_validate(settings))
    check_syntax(text)
    for part in said:
        assert part in text


# What the script does, with programs in Slurm's place that note what they are called with. What Slurm makes of
# that is shown on a real one, in tests/slurm.


def run(
    tmp_path: Path, code: int, *, state: str = "RUNNING", **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run a script whose step ends with a code; the array is 7, the element 2."""
    programs = {
        "srun": f"exit {code}",
        "squeue": f"echo {state}",
        "scontrol": f'echo "$@" >> {tmp_path}/calls; exit 1',  # or the script would wait for Slurm to end it
    }
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    folder = tmp_path / "set"
    (folder / "jobs").mkdir(parents=True, exist_ok=True)
    work = Job(command="precompute", options=(), folder=folder, jobs=folder / "jobs")
    text = slurm.render_precompute(ClusterConfig.model_validate(settings), work, Tasks(num_tasks=4), range(4))
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "2",
    }
    return subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True, check=False)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2, 3, 74, 137])
def test_only_a_stop_by_a_signal_is_requeued(tmp_path: Path, code: int) -> None:
    assert run(tmp_path, code).returncode == code
    assert calls(tmp_path) == []
    assert list((tmp_path / "set" / "jobs").iterdir()) == []


def test_an_element_requeues_itself_and_no_other(tmp_path: Path) -> None:
    assert run(tmp_path, 75).returncode == 75
    assert calls(tmp_path) == ["requeue 7_2"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_is_ending_is_not_brought_back(tmp_path: Path, state: str) -> None:
    assert run(tmp_path, 75, state=state).returncode == 75
    assert calls(tmp_path) == []


def test_three_slices_without_a_commit_are_the_end(tmp_path: Path) -> None:
    assert [run(tmp_path, 75).returncode for _ in range(2)] == [75, 75]
    (tmp_path / "set" / "shard-000000.json").touch()
    assert [run(tmp_path, 75).returncode for _ in range(3)] == [75, 75, 75]  # a commit, then two without
    done = run(tmp_path, 75)
    assert done.returncode == 74
    assert "3 slices without a new commit; raise cluster.time" in done.stderr
    assert len(calls(tmp_path)) == 5


def test_however_much_is_committed_an_element_ends_after_its_number_of_slices(tmp_path: Path) -> None:
    ends = []
    for number in range(4):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"shard-{number:06d}.json").touch()
        ends.append(run(tmp_path, 75, max_requeues=4).returncode)
    assert ends == [75, 75, 75, 74]
