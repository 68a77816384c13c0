"""make_golden.py against a stand-in for upstream's program.

The stand-in is called as upstream's demo calls its class, has modules under the names of upstream's checkpoint,
and calls them in upstream's order; what it computes with is this project's networks. So what is tried is the
recording, the file and the comparison; whether upstream's own code agrees is what the file is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.anytext2.checkpoint import write_checkpoint
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.conditioning import ConditioningBatch
from common.anytext2.keys import PREFIXES, key_table
from common.ddim import integrate, upstream_grid
from common.errors import DataError
from common.schedule import guided
from stage1_teacher.rendering.rendered_input import RenderSettings, render_input
from stage1_teacher.teacher.keys import teacher_shapes
from stage1_teacher.teacher.sample import prompt_input
from stage1_teacher.teacher.teacher import Teacher
from tests import make_golden, parity
from tests.golden_rule import rule_tensor
from tests.small_network import TOKENIZER_FOLDER
from tests.stage1_teacher.small_teacher import load, write_teacher
from tests.upstream_config import network_config_from_upstream

TRUNK: dict[str, Any] = {
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
}
NETWORK: dict[str, Any] = {
    "unet": TRUNK | {"output_attnx_level": [1]},
    "writenet": TRUNK,
    "vae": {"z_channels": 4, "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "clip": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module into a tree under a dotted name, beside what is there."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if name not in root._modules:
        root.add_module(name, module)


class StandIn:
    """Called as upstream's `AnyText2Model`."""

    def __init__(self, teacher: Teacher, settings: RenderSettings, config: Any) -> None:
        self.teacher, self.settings, self.config = teacher, settings, config
        self.model = nn.Module()
        recognizer = teacher.recognizer

        def read(lines: torch.Tensor) -> torch.Tensor:  # upstream's recognizer always reads, too
            neck = type(recognizer).features(recognizer, lines)
            recognizer.head(neck)
            return neck

        recognizer.features = read  # type: ignore[method-assign]
        parts: dict[str, Any] = {
            "unet": teacher.denoiser.unet,
            "writenet": teacher.denoiser.writenet,
            "vae": teacher.vae,
            "clip": teacher.text_encoder.clip,
            "embedding": teacher.glyph_embedding,
            "recognizer": teacher.recognizer,
        }
        whole = {"unet": parts["unet"], "writenet": parts["writenet"]}
        for part, module in whole.items():
            put(self.model, PREFIXES[part].removesuffix("."), module)
        for coder in ("encoder", "decoder"):
            put(self.model, f"{PREFIXES['vae']}{coder}", getattr(teacher.vae.autoencoder, coder))
        put(self.model, f"{PREFIXES['clip']}embeddings", teacher.text_encoder.clip.get_submodule("embeddings"))
        for part, module in parts.items():
            for name, entry in key_table(part, module.state_dict(), teacher.network).items():
                owner, path = name.rpartition(".")[0], entry.key.rpartition(".")[0]
                put(self.model, path, module.get_submodule(owner))

    @torch.no_grad()
    def __call__(self, given: dict[str, Any], **parameters: Any) -> tuple[list[Any], int, str, str]:
        teacher = self.teacher
        rows = np.flatnonzero(given["draw_pos"][:, :, 0].any(axis=1))
        texts = given["text_prompt"].split('"')[1::2]
        bands = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
        boxes = [(8, int(band[0]), 56, int(band[-1])) for band in bands]
        read = prompt_input(self.config, given["img_prompt"], boxes, texts=texts, colors=["#dc1e1e"])
        cond = teacher.encode([render_input(read, self.settings)])[0]
        uncond = teacher.unconditional()
        rows_of = [ConditioningBatch.stack([item]) for item in (cond, cond.without(uncond))]
        controls = [teacher.denoiser.control(item) for item in rows_of]

        def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            both = [teacher.denoiser(z, t, item, control) for item, control in zip(rows_of, controls, strict=True)]
            return guided(both[0], both[1], parameters["cfg_scale"])

        noise = torch.randn(
            (1, *cond.masked_latents.shape), generator=torch.Generator().manual_seed(given["seed"])
        )
        teacher.decode(integrate(predict, noise, upstream_grid(parameters["ddim_steps"])))
        return [], 0, "", ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("golden") / "real.safetensors"
    shapes = teacher_shapes(network_config_from_upstream(NETWORK))
    write_checkpoint(path, {key: rule_tensor(key, shape) for key, shape in shapes.items()})
    return path


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Path:
    config = load(write_teacher(checkpoint.parent))
    network = network_config_from_upstream(NETWORK)
    teacher = Teacher.from_checkpoint(
        network, CheckpointFile(checkpoint), TOKENIZER_FOLDER, negative_prompt="lowres"
    )
    settings = make_golden.main(["--size", "64", "--out", str(checkpoint.with_name("made.safetensors"))])
    make_golden.make(StandIn(teacher, RenderSettings.from_config(config), config), settings, NETWORK)
    return checkpoint.parent / "made.safetensors"


def test_what_it_writes_is_reproduced_with_the_same_weights(
    made: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity.main([str(made), "--checkpoint", str(checkpoint), "--tolerance", "1e-4"]) == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {"vae.masked_mean", "ocr.neck", "emb.lines", "cond.img.0", "cond.text", "uncond.img"} <= names
    assert {"writenet.00", "eps.cond", "eps.uncond", "ddim5.x_inter", "ddim5.decoded", "ddim5.timesteps"} <= names


def test_other_weights_are_told(made: Path, checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint)
    tensors["model.diffusion_model.out.2.bias"] = tensors["model.diffusion_model.out.2.bias"] + 0.1
    write_checkpoint(tmp_path / "other.safetensors", tensors)
    errors = dict(parity.compare(made, tmp_path / "other.safetensors"))
    assert errors["eps.cond"] > 1e-2 and errors["cond.text"] < 1e-4


def test_a_file_of_real_weights_needs_them(made: Path, checkpoint: Path) -> None:
    with pytest.raises(DataError, match="give --checkpoint FILE"):
        parity.read_golden(made)
    with pytest.raises(DataError, match="leave --checkpoint out"):
        parity.read_golden(parity.Path(__file__).parent / "golden" / "tiny.safetensors", checkpoint)
