"""What needs the teacher: a set's unconditional contexts, and its records. Imported only where there is work."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.compiling import prepare_networks
from common.config import Config
from common.job import local_rank
from common.machine import resolve_device
from common.signals import StopFlag
from shards.files.manifest import Manifest, create_or_check, read_uncond
from shards.remote.upload import Uploader
from stage1_teacher.inputs.files import Inputs
from stage1_teacher.recording.identity import describe_machine, describe_run
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.recording.shard_maker import ShardMaker
from stage1_teacher.recording.share import Share, Todo
from stage1_teacher.recording.stops import Stops
from stage1_teacher.recording.trajectories import RolloutKeeper
from stage1_teacher.rendering.first_inputs import require_fonts
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.student_states import StudentStates
from stage1_teacher.teacher.teacher import Teacher


@dataclass(kw_only=True)
class Maker:
    """A teacher, loaded when it is first needed, and what it is to work on."""

    config: Config
    settings: RenderSettings
    inputs: Inputs
    folder: Path
    student: StudentStates | None = None
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        if torch.cuda.is_available():  # processes of one machine share its GPUs
            torch.cuda.set_device(local_rank(os.environ) % torch.cuda.device_count())
        self.device = resolve_device(self.config.model.device)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """Of the configuration, made as fast as its [model] asks for.

        Raises:
            UsageError: too many of the first inputs have lines that no font can render.
            MachineError: this machine cannot compile.
        """
        require_fonts(self.inputs, self.settings)
        teacher = Teacher.load(self.config)
        prepare_networks(self.config.model, teacher.denoiser.unet, teacher.denoiser.writenet)
        if self.config.model.compile:  # not without: it rounds otherwise, and sets begun before go on to the bit
            teacher.recognizer.fold_norms()
            teacher.glyph_embedding.font_predictor.fold_norms()
        return teacher

    def make_manifest(self, identity: Mapping[str, Any]) -> Manifest:
        """Create the set's unconditional contexts and manifest, or join them."""
        with repeatable():
            manifest, _uncond = create_or_check(
                self.folder,
                identity,
                describe_run(self.device, self.config.model),
                lambda: self.teacher.unconditional().to("cpu", torch.float16),
            )
        return manifest

    def make(
        self,
        manifest: Manifest,
        share: Share,
        stops: Stops,
        work: Callable[[Callable[[], None]], Iterator[Todo]],
        *,
        keeper: RolloutKeeper | None,
        uploader: Uploader | None,
    ) -> None:
        """Make shards until none is left.

        Args:
            manifest: the set's.
            share: what this task works on; its counts are kept up to date.
            stops: of this task, from run to run.
            work: given what to call to be stopped, yields the shards to make.
            keeper: keeps whole rollouts.
            uploader: sends every shard away after its commit.

        Raises:
            AppError: as `ShardMaker.make_all`.
        """
        uncond, teacher = read_uncond(self.folder, manifest), self.teacher
        with StopFlag() as stop, repeatable():  # until here there is nothing to keep: a signal ends it at once
            maker = ShardMaker(
                self.folder,
                manifest.identity_sha256,
                share,
                self.config.precompute,
                stop,
                describe_machine(self.device, self.config.model),
                stops,
                rollouts=keeper,
                uploader=uploader,
            )
            recorder = Recorder(
                teacher,
                uncond,
                self.config.precompute,
                student=self.student,
                whole_rollouts=keeper is not None,
                compiled=self.config.model.compile,
            )
            maker.make_all(work(maker.check_stop), self.inputs, self.settings, recorder)


def repeatable() -> AbstractContextManager[None]:
    """Keep cuDNN from choosing algorithms by timing, or ones that add in any order."""
    allow_tf32 = torch.backends.cudnn.allow_tf32
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=allow_tf32
    )
    return flags
