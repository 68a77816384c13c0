from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import PROJECT_ROOT, load_config
from stage1_teacher.inputs.annotations import Annotations
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.tiny.data import write_dataset
from stage1_teacher.tiny.ground import CHANCE, TOLD
from stage1_teacher.tiny.scene import FONT_FOLDER, FONTS, draw_scene_plan, render_scene

CONFIGURED = RenderSettings.from_config(load_config(PROJECT_ROOT / "configs" / "tiny.toml")).fonts


def test_a_written_data_set_reads_as_annotations_with_colours_and_fonts(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, count=5, seed=1)
    contents = Annotations(path, fonts=CONFIGURED)
    assert {Path(name).stem: FONT_FOLDER / name for name in FONTS} == CONFIGURED
    assert len(contents) == 5
    for index in range(5):
        scene = draw_scene_plan("data", 1, index)
        content = contents[index]
        assert content.caption == scene.caption
        assert [line.text for line in content.lines] == [line.text for line in scene.lines]
        assert [line.color for line in content.lines] == [line.color for line in scene.lines]
        assert [line.font for line in content.lines] == [FONT_FOLDER / line.font for line in scene.lines]
        assert content.image is not None
        assert np.array_equal(np.asarray(Image.open(content.image)), render_scene(scene))


def test_an_image_does_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    few, more = (write_dataset(tmp_path / str(count), count=count, seed=2) for count in (2, 4))
    entries = [json.loads(path.read_text())["data_list"] for path in (few, more)]
    assert entries[0] == entries[1][:2]
    name = entries[0][1]["img_name"]
    assert (few.parent / "imgs" / name).read_bytes() == (more.parent / "imgs" / name).read_bytes()


def test_the_world_of_chance_has_other_images(tmp_path: Path) -> None:
    told, chance = (
        write_dataset(tmp_path / str(i), count=6, seed=1, world=w) for i, w in enumerate((TOLD, CHANCE))
    )
    captions = [[entry["caption"] for entry in json.loads(p.read_text())["data_list"]] for p in (told, chance)]
    assert not any("spots" in caption for caption in captions[0]) and any("spots" in c for c in captions[1])
    for index in range(6):
        scene = draw_scene_plan("data", 1, index, world=CHANCE)
        assert scene.caption == captions[1][index]
        fonts = [FONT_FOLDER / line.font if line.told else None for line in scene.lines]
        assert [line.font for line in Annotations(chance, fonts=CONFIGURED)[index].lines] == fonts


def test_the_command_writes_a_data_set(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stage1_teacher.tiny.data", "--count", "2", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--seed", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(Annotations(tmp_path / "data.json")) == 2
