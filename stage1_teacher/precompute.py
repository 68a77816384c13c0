"""Stage one's run: inputs go in, committed shards come out.

Every task of a job joins the same set: index of the inputs, manifest, unconditional contexts and plan are made by
whichever comes first, while the others wait. A task makes its own share of the shards and then what is missing.
What there is to do is found out without torch, which takes seconds and hundreds of megabytes to import; but with
--states-from, where the student's card is read first.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import Config
from common.errors import UsageError
from common.files import canonical_json, write_bytes_atomic
from common.signals import StopFlag
from shards.files.how_made import write_how_made
from shards.files.locks import remove_leftovers
from shards.files.manifest import Manifest, check_if_there
from shards.files.names import MANIFEST, PLANNED_DIR
from shards.files.plan import Plan, read_outline, read_plan
from shards.files.plan_extension import PlanExtension
from shards.files.tasks import Task
from shards.remote.upload import Uploader
from stage1_teacher.inputs.files import Inputs, open_inputs, require_files, say_which_are_equal
from stage1_teacher.inputs.index import InputIndex
from stage1_teacher.inputs.table import first_of_equals
from stage1_teacher.recording.identity import build_identity
from stage1_teacher.recording.share import Done, Share, Todo
from stage1_teacher.recording.stops import Stops
from stage1_teacher.rendering.settings import RenderSettings

if TYPE_CHECKING:
    from stage1_teacher.recording.making import Maker
    from stage1_teacher.recording.trajectories import RolloutKeeper
    from stage1_teacher.teacher.student_states import StudentStates


def precompute(
    config: Config,
    out: Path,
    *,
    annotations: Sequence[Path] = (),
    prompts: Sequence[Path] = (),
    task_index: int = 0,
    num_tasks: int = 1,
    limit: int | None = None,
    trajectories: Path | None = None,
    upload: str | None = None,
    student: StudentStates | None = None,
) -> Done:
    """Make one task's shards of a set, and what else of it is missing and in nobody's work.

    Args:
        config: model, teacher, precompute and shards are used.
        out: the set's folder, shared by all tasks.
        annotations: AnyWord json files.
        prompts: JSONL files. Inputs are numbered through all files; ones added later extend the set.
        task_index: which task this is, 0 to num_tasks - 1; it begins with every num_tasks-th shard.
        num_tasks: tasks that share the work.
        limit: use only the first this many inputs.
        trajectories: folder in which whole rollouts are kept too, see `shards.trajectories`; shards that were
            committed without are solved again for them.
        upload: URL to which this task's shards are copied, each after its commit; earlier ones first.
        student: whose own states are recorded, each with the teacher's solve from it; exactly with
            precompute.source "student".

    Raises:
        UsageError: the configuration or the task's number is wrong, there are no rollouts to keep, or too many
            inputs have lines that no font can render.
        DataError: a file is missing or wrong, the set was made with other settings, more than `max_failures`
            inputs failed, the teacher produced NaN or Inf, or the upload failed.
        MachineError: the disk failed, or this task was stopped on the same shard before, with nothing committed.
        Stopped: a signal came; committed shards are kept and a further run goes on from there.
    """
    _check_task(task_index, num_tasks)
    _check_size(config)
    _check_source(config, student)
    if trajectories is not None:
        _check_has_rollouts(config)
    settings = RenderSettings.from_config(config)
    require_files(*annotations, *prompts)
    identity = build_identity(config, settings, student)
    with Task(out, task_index, num_tasks) as task:
        remove_leftovers(out, task.watch)
        write_how_made(out, num_tasks)
        check_if_there(out, identity)
        inputs = open_inputs(
            annotations, prompts, config.inputs, settings.fonts, limit, index=InputIndex(out, task)
        )
        maker = functools.cache(lambda: _load_maker(config, settings, inputs, out, student))
        manifest, plan = _join(out, identity, inputs, config, task, maker)
        keeper = _open_keeper(trajectories, config, manifest.identity, plan)
        share = Share(
            out,
            manifest.identity_sha256,
            plan,
            inputs,
            task,
            make_again=keeper.is_missing if keeper else lambda _shard: False,
        )
        uploader = None if upload is None else _send_found(out, upload, share)
        first, work = _begin(share)
        if first is not None:
            stops = Stops(out, task_index)
            maker().make(manifest, share, stops, work, keeper=keeper, uploader=uploader)
        remove_leftovers(out, task.watch)
    return share.done


def _load_maker(
    config: Config, settings: RenderSettings, inputs: Inputs, folder: Path, student: StudentStates | None
) -> Maker:
    from stage1_teacher.recording.making import Maker

    return Maker(config=config, settings=settings, inputs=inputs, folder=folder, student=student)


def _join(
    folder: Path,
    identity: dict[str, Any],
    inputs: Inputs,
    config: Config,
    task: Task,
    maker: Callable[[], Maker],
) -> tuple[Manifest, Plan]:
    """Join the set, or let it begin: one task makes manifest and plan, and the others wait for it."""
    planned = _Planned(folder, inputs)
    with task.claimed("plan", lambda: (folder / MANIFEST).exists() and planned.is_noted()) as is_mine:
        if is_mine:
            digests = inputs.digests()
            say_which_are_equal(inputs, digests)
            size, done = config.shards.samples_per_shard, False
            while not done:
                with PlanExtension(folder, digests, size, first_of_equals) as extension:
                    if not (folder / MANIFEST).exists():
                        maker().make_manifest(identity)
                    done = extension.publish()
            planned.note()
    manifest = check_if_there(folder, identity)
    assert manifest is not None
    return manifest, read_plan(folder)


class _Planned:
    """A note that the plan has all inputs of a run, so that other tasks need not compare millions of ids."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        key = canonical_json([inputs.names, len(inputs)])
        self._folder = folder
        self._path = folder / PLANNED_DIR / f"{hashlib.sha256(key).hexdigest()[:24]}.json"

    def is_noted(self) -> bool:
        """Tell whether this run's inputs are in the plan that is there now, or in what it was before it grew."""
        try:
            noted = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return False
        return list(read_outline(self._folder).hashes[: len(noted)]) == noted

    def note(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(self._path, canonical_json(list(read_outline(self._folder).hashes)))


def _begin(share: Share) -> tuple[Todo | None, Callable[[Callable[[], None]], Iterator[Todo]]]:
    """Find the first shard to make; returns it, and what yields all of them given what to call to be stopped."""
    stop: list[Callable[[], None]] = []

    def check_stop() -> None:
        for check in stop:
            check()

    todo = share.take(check_stop)
    first = next(todo, None)

    def work(check: Callable[[], None]) -> Iterator[Todo]:
        stop.append(check)
        return chain([] if first is None else [first], todo)

    return first, work


def _send_found(folder: Path, url: str, share: Share) -> Uploader:
    from stage1_teacher.recording.sending import send

    uploader = Uploader(folder, url)
    with StopFlag() as stop:
        send(uploader, share.found, share, folder, lambda: stop.raise_if_requested(share.committed_so_far))
    return uploader


def _open_keeper(
    folder: Path | None, config: Config, identity: dict[str, Any], plan: Plan
) -> RolloutKeeper | None:
    if folder is None:
        return None
    from stage1_teacher.recording.trajectories import RolloutKeeper

    return RolloutKeeper.open(
        folder,
        identity=identity,
        plan=plan,
        settings=config.precompute,
        latent_shape=config.load_network().latent_shape(config.inputs.size),
    )


def _check_has_rollouts(config: Config) -> None:
    from stage1_teacher.recording.trajectories import check_has_rollouts

    check_has_rollouts(config.precompute)


def _check_task(task_index: int, num_tasks: int) -> None:
    if not 0 <= task_index < num_tasks:
        raise UsageError(
            f"task index: received {task_index}, expected 0 to {num_tasks - 1} (of {num_tasks} tasks)"
        )


def _check_source(config: Config, student: StudentStates | None) -> None:
    if (config.precompute.source == "student") != (student is not None):
        raise UsageError(
            f'precompute.source: received "{config.precompute.source}"'
            f" {'without' if student is None else 'with'} --states-from, expected the two together; give"
            " --states-from ADAPTER alone, which sets it"
        )
    if student is None:
        return
    from stage1_teacher.teacher.student_states import phase_grids

    phase_grids(student.timesteps, config.precompute.solver_steps, config.precompute.record_every)
    if config.precompute.store_predictions:
        raise UsageError(
            "precompute.store_predictions: received true with --states-from, expected false; the objectives that"
            " read predictions train on the teacher's own states"
        )


def _check_size(config: Config) -> None:
    multiple, size = config.load_network().size_multiple, config.inputs.size
    if size % multiple:
        raise UsageError(
            f"config inputs.size: received {size}, expected a multiple of {multiple} for this network"
        )
