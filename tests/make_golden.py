"""Record what upstream's own AnyText2 does with real weights, for `python -m tests.parity`.

Run it in the environment and folder of an AnyText2 checkout (github.com/tyxsspa/AnyText2) that has its checkpoint:

    cd AnyText2
    python ANYTEXT2_DISTILL/tests/make_golden.py --checkpoint models/anytext_v2.0.ckpt --out golden.safetensors

and then, in this project's:

    python -m tests.parity golden.safetensors --checkpoint models/anytext2/anytext_v2.0.ckpt

It needs nothing of this project and copies nothing of upstream's: it calls the class that upstream's demo calls,
with the demo's arguments, and watches modules by the names that the checkpoint's keys give them. One image is
sampled, in float32. The file is of the layout that golden/README.md describes: tens of MB, without weights.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

UNET, WRITENET, VAE = "model.diffusion_model", "control_model", "first_stage_model"
CLIP, OCR, LINES = "cond_stage_model.transformer.text_model", "text_predictor", "embedding_manager"
CONTEXT = r"input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k"
"""The first of these sees the context that the whole network is given."""
SCALE_FACTOR = 0.18215
PLACEHOLDER = 265
CHUNK = 77

TRUNK = {
    "in_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": 1,
    "context_dim": 768, "legacy": False,
}  # fmt: skip
RELEASED: dict[str, Any] = {
    "unet": TRUNK | {"out_channels": 4, "mid_attnx": True, "output_attnx": True, "output_attnx_level": [2, 1]},
    "writenet": TRUNK | {"fast_control": True},
    "vae": {"z_channels": 4, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "clip": {},
    "scale_factor": SCALE_FACTOR,
    "placeholder_token_id": PLACEHOLDER,
}
"""Sizes of the released network, as upstream's YAML spells them."""


class Watch:
    """Keeps what modules were given and returned, in order, by the module's dotted name."""

    def __init__(self, model: nn.Module, places: list[str]) -> None:
        self.inputs: dict[str, list[list[Tensor]]] = defaultdict(list)
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        for place in places:
            self._hook(place, model.get_submodule(place))

    def _hook(self, place: str, module: nn.Module) -> None:
        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            self.inputs[place].append([kept(value) for value in given if isinstance(value, Tensor)])
            if isinstance(output, Tensor):
                self.outputs[place].append(kept(output))

        module.register_forward_hook(keep, with_kwargs=True)

    def given(self, place: str) -> list[Tensor]:
        """Return the first tensor of each call."""
        return [tensors[0] for tensors in self.inputs[place]]


def kept(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value.to(torch.int64)


def find_network(wrapper: Any) -> nn.Module:
    """Return upstream's network: the module whose parts have the checkpoint's names."""
    candidates = [getattr(wrapper, "model", None)]
    candidates += list(wrapper.modules()) if isinstance(wrapper, nn.Module) else []
    for module in candidates:
        if isinstance(module, nn.Module) and all(
            hasattr(module, part.split(".")[0]) for part in (UNET, WRITENET, VAE, CLIP, OCR, LINES)
        ):
            return module
    sys.exit(f"{type(wrapper).__name__} holds no module with {WRITENET}, {LINES} ...: is it AnyText2's?")


def watch(model: nn.Module) -> tuple[Watch, dict[str, str]]:
    """Watch the network; returns the watch, and the places whose names depend on the network's size."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    context = {
        part: next(name for name in names if re.fullmatch(f"{part}.{CONTEXT}", name)) for part in (UNET, WRITENET)
    }
    zero = [name for name in names if re.fullmatch(rf"{WRITENET}\.zero_convs\.\d+\.0", name)]
    places = [UNET, f"{UNET}.input_blocks.0.0", f"{UNET}.out.2", *context.values()]
    places += [*zero, f"{WRITENET}.middle_block_out.0"]
    places += [f"{WRITENET}.{name}" for name in ("glyph_block.0", "position_block.0", "fuse_block_za")]
    places += [f"{VAE}.{name}" for name in ("encoder", "quant_conv", "post_quant_conv", "decoder")]
    places += [f"{CLIP}.{name}" for name in ("embeddings", "embeddings.token_embedding", "final_layer_norm")]
    places += [f"{OCR}.backbone.conv1._conv", f"{OCR}.head.fc", f"{LINES}.font_predictor.backbone.conv1._conv"]
    places += [f"{LINES}.position_encoder.conv1", f"{LINES}.color_proj.0"]
    return Watch(model, places), context | {"zero": " ".join(zero)}


def branches(calls: list[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split the UNet's calls into those of the caption and those without it.

    Upstream calls once for each, the caption first; a version that calls once for both has the caption second.
    """
    if calls[0].shape[0] == 2 * count:
        return [call[count:] for call in calls], [call[:count] for call in calls]
    return calls[0::2], calls[1::2]


def unet_tensors(seen: Watch, places: dict[str, str], steps: int, decoded: Tensor) -> dict[str, Tensor]:
    """Return states, contexts and predictions of the solve."""
    states = seen.given(f"{UNET}.input_blocks.0.0")
    single, _ = branches(states, 1)
    contexts, uncond_contexts = branches(seen.given(places[UNET]), 1)
    eps, eps_uncond = branches(seen.outputs[f"{UNET}.out.2"], 1)
    times = [next(t for t in tensors if not t.is_floating_point()).flatten()[:1] for tensors in seen.inputs[UNET]]
    times = times if states[0].shape[0] == 2 else times[0::2]
    if not len(single) == len(times) == steps:
        sys.exit(f"watched {len(states)} calls of the UNet, expected 2 a step of {steps}; is the CFG scale 1?")
    final = seen.given(f"{VAE}.post_quant_conv")[-1] * SCALE_FACTOR
    name = f"ddim{steps}"
    return {
        "in.noise": single[0],
        "in.t": times[0],
        "cond.img": contexts[0],
        "uncond.img": uncond_contexts[0],
        "eps.cond": eps[0],
        "eps.uncond": eps_uncond[0],
        f"{name}.timesteps": torch.cat(times).flip(0),
        f"{name}.x_inter": torch.stack([*single, final]),
        f"{name}.samples": final,
        f"{name}.decoded": decoded,
    }


def writenet_tensors(seen: Watch, places: dict[str, str]) -> dict[str, Tensor]:
    """Return WriteNet's hints, contexts and, of the caption's branch, residuals."""
    texts, uncond_texts = branches(seen.given(places[WRITENET]), 1)
    fused = branches(seen.given(f"{WRITENET}.fuse_block_za"), 1)[0][0]
    masked = fused[:, -4:]  # glyphs, positions, masked latents side by side
    tensors = {
        "in.glyphs": branches(seen.given(f"{WRITENET}.glyph_block.0"), 1)[0][0][:, None],
        "in.positions": branches(seen.given(f"{WRITENET}.position_block.0"), 1)[0][0][:, None],
        "in.masked_latents": masked,
        "cond.text": texts[0],
        "uncond.text": uncond_texts[0],
    }
    residuals = [*places["zero"].split(), f"{WRITENET}.middle_block_out.0"]
    for index, place in enumerate(residuals):
        tensors[f"writenet.{index:02d}"] = branches(seen.outputs[place], 1)[0][0]
    return tensors


def text_tensors(seen: Watch, made: dict[str, Tensor], model: nn.Module, lines: int) -> dict[str, Tensor]:
    """Return the tokens of each context, and the embeddings that took the placeholders' place."""
    ids = torch.cat(seen.given(f"{CLIP}.embeddings.token_embedding")).reshape(-1, CHUNK)
    encoded = torch.cat(seen.outputs[f"{CLIP}.final_layer_norm"]).reshape(len(ids), CHUNK, -1)
    embedded = torch.cat(seen.outputs[f"{CLIP}.embeddings"]).reshape(len(ids), CHUNK, -1)

    def rows(context: Tensor) -> list[int]:
        """Find the encodings that a context is made of."""
        found = []
        for chunk in context[0].split(CHUNK):
            distance = (encoded - chunk).flatten(1).abs().amax(dim=1)
            found.append(int(distance.argmin()))
        return found

    def tokens(context: Tensor) -> Tensor:
        chunks = [ids[row] for row in rows(context)]
        return torch.cat([chunks[0][:1], *(chunk[1:-1] for chunk in chunks), chunks[-1][-1:]])[None]

    (text,) = rows(made["cond.text"])
    (empty,) = rows(made["uncond.text"])
    places = (ids[text] == PLACEHOLDER).nonzero()[:lines, 0]
    positions = kept(model.get_submodule(f"{CLIP}.embeddings.position_embedding").weight)
    return {
        "in.image_token_ids": tokens(made["cond.img"]),
        "in.text_token_ids": ids[text][None],
        "in.negative_token_ids": tokens(made["uncond.img"]),
        "in.empty_token_ids": ids[empty][None],
        "cond.img.0": made["cond.img"],
        "emb.lines": embedded[text, places] - positions[places],
    }


def line_tensors(seen: Watch, lines: int) -> dict[str, Tensor]:
    """Return what the recognizer and the line embedding were given, and what the recognizer made of it."""

    def first(calls: list[Tensor]) -> Tensor:
        return torch.cat(calls)[:lines]

    return {
        "in.ocr_lines": first(seen.given(f"{OCR}.backbone.conv1._conv")),
        "in.font_lines": first(seen.given(f"{LINES}.font_predictor.backbone.conv1._conv")),
        "in.line_masks": first(seen.given(f"{LINES}.position_encoder.conv1")),
        "in.line_colors": first(seen.given(f"{LINES}.color_proj.0")),
        "ocr.neck": first(seen.given(f"{OCR}.head.fc")),
        "ocr.logits": first(seen.outputs[f"{OCR}.head.fc"]),
    }


def collect(seen: Watch, places: dict[str, str], model: nn.Module, steps: int, lines: int) -> dict[str, Tensor]:
    """Return the golden file's tensors."""
    decoded = seen.outputs[f"{VAE}.decoder"][-1]
    mean, logvar = seen.outputs[f"{VAE}.quant_conv"][0].chunk(2, dim=1)
    made = unet_tensors(seen, places, steps, decoded) | writenet_tensors(seen, places)
    made |= {"in.masked_image": seen.given(f"{VAE}.encoder")[0]}
    made |= {"vae.masked_mean": mean, "vae.masked_logvar": logvar.clamp(-30, 20)}
    made |= text_tensors(seen, made, model, lines) | line_tensors(seen, lines)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def ask(wrapper: Any, settings: argparse.Namespace, texts: list[str]) -> None:
    """Sample one image as upstream's demo does."""
    size = settings.size
    where = np.zeros((size, size, 3), np.uint8)  # white places on black
    for number in range(len(texts)):
        top = size * (2 * number + 1) // (2 * len(texts) + 1)
        where[top : top + size // 6, size // 8 : size * 7 // 8] = 255
    quoted = ", ".join(f'"{text}"' for text in texts)
    given = {
        "img_prompt": settings.caption,
        "text_prompt": f"that reads {quoted}",
        "seed": settings.seed,
        "draw_pos": where,
        "ori_image": None,
    }
    parameters = {
        "mode": "gen", "sort_priority": "↕", "show_debug": False, "revise_pos": False, "image_count": 1,
        "ddim_steps": settings.steps, "image_width": size, "image_height": size, "strength": 1.0,
        "attnx_scale": 1.0, "font_hollow": True, "cfg_scale": settings.guidance_scale, "eta": 0.0,
        "a_prompt": "best quality",
        "n_prompt": "lowres, watermark", "base_model_path": "", "lora_path_ratio": "",
        "glyline_font_path": ["None"] * 5, "font_hint_image": [None] * 5, "font_hint_mask": [None] * 5,
        "text_colors": " ".join(["220,30,30"] + ["500,500,500"] * 4),
    }  # fmt: skip
    _, code, warning, *_ = wrapper(given, **parameters)
    if code < 0:
        sys.exit(f"AnyText2 refused the request: {warning}")


def make(wrapper: Any, settings: argparse.Namespace, network: dict[str, Any] = RELEASED) -> None:
    """Sample with upstream's class under watch, and write the file.

    Args:
        wrapper: upstream's `AnyText2Model`, or what is called as it is.
        settings: see `main`.
        network: sizes, as upstream's YAML spells them.
    """
    model = find_network(wrapper)
    seen, places = watch(model)
    with torch.no_grad():
        ask(wrapper, settings, settings.text)
    tensors = collect(seen, places, model, settings.steps, len(settings.text))
    meta = {
        "weights": "checkpoint",
        "network": network,
        "texts": [settings.text],
        "captions": [settings.caption],
        "n_lines": [len(settings.text)],
        "guidance_scale": str(settings.guidance_scale),
    }
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # some are views of one memory
    save_file(own, str(settings.out), metadata={"meta": json.dumps(meta)})
    print(f"{settings.out}: {len(tensors)} tensors of {settings.steps} steps")  # noqa: T201


def main(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make_golden.py", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("models/anytext_v2.0.ckpt"))
    parser.add_argument("--font", default="font/Arial_Unicode.ttf")
    parser.add_argument("--out", type=Path, default=Path("golden.safetensors"))
    parser.add_argument("--caption", default="a photo of a storefront with a sign")
    parser.add_argument("--text", action="append", help="A line to show; again for more. Default: two lines.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args(arguments)
    settings.text = settings.text or ["HELLO", "Cafe 24"]
    return settings


if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))
    from ms_wrapper import AnyText2Model  # of the checkout

    chosen = main()
    upstream = AnyText2Model(
        model_dir="./models",
        use_fp16=False,
        use_translator=False,
        font_path=chosen.font,
        model_path=str(chosen.checkpoint),
    )
    make(upstream.cuda(0) if torch.cuda.is_available() else upstream, chosen)
