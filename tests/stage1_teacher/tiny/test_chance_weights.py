"""The second teacher's weights (models/chance): what they know that those of models/tiny do not."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from common.config import PROJECT_ROOT
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.measuring.held_out import HeldOut
from stage1_teacher.measuring.teacher_sampler import teacher_samplers
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher
from stage1_teacher.tiny.data import write_dataset
from stage1_teacher.tiny.ground import CHANCE
from tests.stage1_teacher.small_teacher import load

COUNT, STEPS = 12, 4
MEGABYTES = 60
"""That models/ may take: they are cloned with the code."""


def draw(checkpoint: str, annotations: Path, edit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw held-out layouts; returns images and true images (B, 3, H, W) in 0 to 255, and what no box covers."""
    sets = (f"model.checkpoint={PROJECT_ROOT / 'models' / checkpoint}", f"inputs.edit_fraction={edit}")
    config = load(PROJECT_ROOT / "configs" / "tiny.toml", *sets)
    settings = RenderSettings.from_config(config)
    held_out = HeldOut(open_inputs([annotations], [], config.inputs, settings.fonts), settings, COUNT)
    teacher, ids = Teacher.load(config), [layout.layout_id for layout in held_out.layouts]
    teachers = teacher_samplers(
        config, held_out, lambda: (teacher, teacher.unconditional()), [f"trailing:{STEPS}"], []
    )
    noise = torch.randn(COUNT, 1, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    images = teacher.decode(teachers[0].latents(teachers[0].prepare(ids), noise)) * 127.5 + 127.5
    true = torch.stack([torch.as_tensor(held_out.true_image(one)).permute(2, 0, 1).float() for one in ids])
    outside = torch.stack([held_out.render(one).positions.amax(0, keepdim=True) == 0 for one in ids])
    return images, true, outside.expand_as(images)


def test_edit_mode_keeps_what_lies_outside_the_boxes(tmp_path: Path) -> None:
    annotations = write_dataset(tmp_path, count=COUNT, seed=5, world=CHANCE)

    def difference(checkpoint: str, edit: int) -> float:
        images, true, outside = draw(checkpoint, annotations, edit)
        return float((images - true)[outside].abs().mean())

    edited, generated, before = (difference(*way) for way in (("chance", 1), ("chance", 0), ("tiny", 1)))
    assert edited < 0.6 * generated and edited < 0.75 * before


def test_all_models_are_small_enough_to_be_cloned() -> None:
    files = [path for path in (PROJECT_ROOT / "models").rglob("*") if path.is_file() and not path.is_symlink()]
    sizes = [path.stat().st_size / 1e6 for path in files if "anytext2" not in path.parts]
    assert max(sizes) <= 25 and sum(sizes) <= MEGABYTES
