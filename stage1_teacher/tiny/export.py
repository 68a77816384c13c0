r"""Write a trained teacher as an ordinary checkpoint: models/tiny/*.safetensors, float16, AnyText2's key names.

python -m stage1_teacher.tiny.export --vae runs/tiny/vae --denoiser runs/tiny/denoiser \
        --position runs/tiny/position.pt --out models/tiny
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.anytext2.checkpoint import export_state, schedule_buffers, write_checkpoint
from common.anytext2.config import NetworkConfig
from common.anytext2.vae import VAE
from common.scripts import make_parser, run_script
from stage1_teacher.teacher.recognizer import Recognizer, load_recognizer
from stage1_teacher.teacher.text_encoder import load_tokenizer
from stage1_teacher.tiny.ground import KINDS, PALETTE, Ground
from stage1_teacher.tiny.networks import MODEL_FOLDER, Denoiser, build_denoiser, network_config
from stage1_teacher.tiny.train_denoiser import load_start
from stage1_teacher.tiny.train_vae import load_trained

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedTeacher:
    """All parts of a teacher, as modules."""

    config: NetworkConfig
    denoiser: Denoiser
    vae: VAE
    recognizer: Recognizer


def load_runs(vae: Path, denoiser_run: Path, start: Path, *, averaged: bool = True) -> TrainedTeacher:
    """Put together what the training scripts wrote.

    Args:
        vae: folder of `train_vae`, or of a teacher that has it already.
        denoiser_run: folder of `train_denoiser`.
        start: what the denoiser's run started from: a file of `train_position`, or a whole teacher's folder.
        averaged: the EMA of the denoiser's weights, or the last ones.
    """
    config = network_config()
    recognizer = load_recognizer(config, MODEL_FOLDER / "recognizer.safetensors")
    trained_vae = VAE(config)
    trained_vae.autoencoder.load_state_dict(load_trained(vae).state_dict())
    denoiser = build_denoiser(config, seed=0)
    load_start(denoiser, start, config)
    denoiser.embedding.font_predictor.load_state_dict(recognizer.state_dict())
    saved: dict[str, Any] = torch.load(denoiser_run / "checkpoint.pt", weights_only=True, map_location="cpu")
    values: dict[str, Tensor] = saved["ema" if averaged else "weights"]
    for name, parameter in denoiser.named_parameters().items():
        parameter.data.copy_(values[name])
    log.info("denoiser of step %d", saved["step"])
    return TrainedTeacher(config=config, denoiser=denoiser, vae=trained_vae, recognizer=recognizer)


@torch.no_grad()
def clear_unused_words(clip: Any, config: NetworkConfig) -> int:
    """Zero the embeddings of tokens that no caption of the data set has; returns how many are kept.

    They still hold their random start, which would only be noise to a reader of captions, and to git.
    """
    tokenizer = load_tokenizer(MODEL_FOLDER / "clip", config)
    grounds = [
        Ground(kind=kind, colors=(first, second), vertical=vertical)
        for kind in KINDS
        for first in PALETTE
        for second in PALETTE
        for vertical in (False, True)
    ]
    from stage1_teacher.inputs.captions import TEXT_PHRASES

    captions = [f"{ground.caption}. " for ground in grounds] + [f"{phrase}* , * . " for phrase in TEXT_PHRASES]
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for caption in captions:
        used.update(tokenizer(caption, add_special_tokens=False)["input_ids"])
    table: Tensor = clip.get_input_embeddings().weight
    unused = torch.ones(len(table), dtype=torch.bool)
    unused[sorted(used)] = False
    table[unused] = 0
    return len(used)


def write(teacher: TrainedTeacher, out: Path) -> None:
    """Write the parts to a folder; the recognizer is there already."""
    config, denoiser = teacher.config, teacher.denoiser
    log.info("%d words kept", clear_unused_words(denoiser.clip, config))

    def half(module: nn.Module, part: str) -> dict[str, Tensor]:
        state = export_state(module, part, config)
        return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}

    out.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        out / "denoiser.safetensors",
        {**half(denoiser.unet, "unet"), **half(denoiser.writenet, "writenet"), **schedule_buffers()},
    )
    write_checkpoint(
        out / "text.safetensors", {**half(denoiser.clip, "clip"), **half(denoiser.embedding, "embedding")}
    )
    write_checkpoint(out / "vae.safetensors", half(teacher.vae, "vae"))
    if not (out / "recognizer.safetensors").exists():
        write_checkpoint(out / "recognizer.safetensors", half(teacher.recognizer, "recognizer"))


def main() -> None:
    """Parse the command line."""
    parser = make_parser(__doc__)
    for name in ("vae", "denoiser", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument(
        "--position", type=Path, required=True, help="file of train_position, or what --start-from named"
    )
    parser.add_argument("--last", action="store_true", help="the last weights instead of their average")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    teacher = load_runs(options.vae, options.denoiser, options.position, averaged=not options.last)
    write(teacher, options.out)


if __name__ == "__main__":
    run_script(main)
