"""Stage one's run: inputs go in, committed shards come out.

Every task of a job joins the same set (manifest, unconditional contexts, plan: made by whichever comes first) and
makes its own share of the shards.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from common.config import Config
from common.errors import UsageError
from common.machine import resolve_device
from common.signals import StopFlag
from shards.files.locks import remove_leftovers
from shards.files.manifest import create_or_check
from shards.files.plan import Plan, extend_plan
from shards.remote.upload import Uploader
from stage1_teacher.inputs.files import open_inputs, say_which_are_equal
from stage1_teacher.recording.identity import build_identity, describe_machine, describe_run
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.recording.shard_maker import ShardMaker
from stage1_teacher.recording.share import Done, choose_share
from stage1_teacher.recording.trajectories import RolloutKeeper, check_has_rollouts
from stage1_teacher.rendering.first_inputs import require_fonts
from stage1_teacher.rendering.rendered_input import RenderSettings
from stage1_teacher.teacher.teacher import Teacher


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
) -> Done:
    """Make one task's shards of a set.

    Args:
        config: model, teacher, precompute and shards are used.
        out: the set's folder, shared by all tasks.
        annotations: AnyWord json files.
        prompts: JSONL files. Inputs are numbered through all files; ones added later extend the set.
        task_index: which task this is, 0 to num_tasks - 1; it makes every num_tasks-th shard.
        num_tasks: tasks that share the work.
        limit: use only the first this many inputs.
        trajectories: folder in which whole rollouts are kept too, see `shards.trajectories`; shards that were
            committed without are solved again for them.
        upload: URL to which this task's shards are copied, each after its commit; earlier ones first.

    Raises:
        UsageError: the configuration or the task's number is wrong, there are no rollouts to keep, or too many
            inputs have lines that no font can render.
        DataError: a file is missing or wrong, the set was made with other settings, more than `max_failures`
            inputs failed, the teacher produced NaN or Inf, or the upload failed.
        Stopped: a signal came; committed shards are kept and a further run goes on from there.
    """
    _check_task(task_index, num_tasks)
    _check_size(config)
    if trajectories is not None:
        check_has_rollouts(config.precompute)
    device = resolve_device(config.model.device)
    with StopFlag() as stop, _repeatable():
        settings = RenderSettings.from_config(config)
        inputs = open_inputs(annotations, prompts, config.inputs, settings.fonts, limit)

        @functools.cache
        def load_teacher() -> Teacher:  # a finished set needs none
            require_fonts(inputs, settings)
            return Teacher.load(config)

        manifest, uncond = create_or_check(
            out,
            build_identity(config, settings),
            describe_run(device),
            lambda: load_teacher().unconditional().to("cpu", torch.float16),
        )
        identity = manifest.identity_sha256
        remove_leftovers(out)
        ids = inputs.ids()
        say_which_are_equal(inputs, ids)
        plan = extend_plan(out, ids, config.shards.samples_per_shard)
        keeper = _open_keeper(trajectories, config, manifest.identity, plan)
        share = choose_share(
            out,
            identity,
            plan,
            ids,
            task_index=task_index,
            num_tasks=num_tasks,
            make_again=keeper.is_missing if keeper else lambda _shard: False,
        )
        uploader = Uploader(out, upload) if upload is not None else None
        machine = describe_machine(device)
        maker = ShardMaker(
            out, identity, share, config.precompute, stop, machine, rollouts=keeper, uploader=uploader
        )
        maker.send_found()
        if share.todo:
            stop.raise_if_requested(share.committed_so_far)
            recorder = Recorder(load_teacher(), uncond, config.precompute, whole_rollouts=keeper is not None)
            maker.make_all(inputs, settings, recorder)
    return share.done


def _open_keeper(
    folder: Path | None, config: Config, identity: dict[str, Any], plan: Plan
) -> RolloutKeeper | None:
    if folder is None:
        return None
    return RolloutKeeper.open(
        folder,
        identity=identity,
        plan=plan,
        settings=config.precompute,
        latent_shape=config.load_network().latent_shape(config.inputs.size),
    )


def _check_task(task_index: int, num_tasks: int) -> None:
    if not 0 <= task_index < num_tasks:
        raise UsageError(
            f"task index: received {task_index}, expected 0 to {num_tasks - 1} (of {num_tasks} tasks)"
        )


def _check_size(config: Config) -> None:
    multiple, size = config.load_network().size_multiple, config.inputs.size
    if size % multiple:
        raise UsageError(
            f"config inputs.size: received {size}, expected a multiple of {multiple} for this network"
        )


def _repeatable() -> AbstractContextManager[None]:
    """Keep cuDNN from choosing algorithms by timing, or ones that add in any order."""
    allow_tf32 = torch.backends.cudnn.allow_tf32
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=allow_tf32
    )
    return flags
