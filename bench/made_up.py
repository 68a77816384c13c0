"""Write a checkpoint of a configuration's network with made-up weights: they do not change how long a step takes.

    python bench/made_up.py --config configs/sd15.toml --out build/made_up.safetensors

For the full-size network float16 weights take 3 GB. What comes out of it is noise, of a size that stays finite.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rule_weights import make_weights
from common.anytext2.checkpoint import write_checkpoint
from common.config import PROJECT_ROOT, load_config
from common.scripts import make_parser, run_script
from stage1_teacher.teacher.keys import teacher_shapes


def main() -> None:
    """Parse the command line and write the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, default=PROJECT_ROOT / "configs" / "sd15.toml")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file")
    arguments = parser.parse_args()
    network = load_config(arguments.config).load_network()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(arguments.out, make_weights(teacher_shapes(network)))
    print(arguments.out)


if __name__ == "__main__":
    run_script(main)
