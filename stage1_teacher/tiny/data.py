"""Write a small data set in AnyWord's format: data.json and PNG images of text on coloured grounds.

    python -m stage1_teacher.tiny.data --count 64 --out demo/data --seed 0

In the world "told", captions and annotations tell all that there is to see; in "chance" they leave much open, e.g.
where spots lie. Image `index` of a seed and a world is the same whatever the count. Lines name their fonts as
configs/tiny.toml does: a configuration of one's own needs its table [inputs.fonts].
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from common.files import write_bytes_atomic
from common.pictures import write_png
from common.progress import Progress
from common.scripts import make_parser, run_script
from stage1_teacher.tiny.ground import TOLD, WORLDS, World
from stage1_teacher.tiny.scene import Scene, draw_scene_plan, render_scene

log = logging.getLogger(__name__)

IMAGE_FOLDER = "imgs"


def write_dataset(out: Path, *, count: int, seed: int, size: int = 96, world: World = TOLD) -> Path:
    """Draw scenes and write them.

    Args:
        out: folder, made if it is not there; images go to its subfolder `imgs`.
        count: number of images.
        seed: keys every choice.
        size: side of the images, pixels.
        world: what they are drawn from.

    Returns:
        The annotation file, `out`/data.json.
    """
    (out / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    entries = []
    with Progress(count, "drawing", "images") as progress:
        for index in range(count):
            scene = draw_scene_plan("data", seed, index, size=size, world=world)
            entries.append(write_scene(out, scene, f"{seed}_{index:06d}.png"))
            progress.update(1)
    path = out / "data.json"
    text = json.dumps({"data_root": IMAGE_FOLDER, "data_list": entries}, indent=1)
    write_bytes_atomic(path, text.encode() + b"\n")
    return path


def write_scene(out: Path, scene: Scene, img_name: str) -> dict[str, object]:
    """Write a scene's image and return its annotation."""
    write_png(out / IMAGE_FOLDER / img_name, render_scene(scene))
    return scene.annotation(img_name)


def main() -> None:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, required=True, help="number of images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of the images, pixels")
    parser.add_argument("--world", choices=sorted(WORLDS), default="told", help="what they are drawn from")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = write_dataset(
        options.out, count=options.count, seed=options.seed, size=options.size, world=WORLDS[options.world]
    )
    log.info("wrote %s", path)


if __name__ == "__main__":
    run_script(main)
