"""The table between our parameter names and the keys of AnyText2's checkpoints, for every part.

The rules rewrite one of our names into the one upstream key that holds it. A part's table is the rules applied to
all names of that part's module, so it exists for networks of any size, and its inverse is the way back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.anytext2.config import NetworkConfig, UNetConfig

PREFIXES = {
    "unet": "model.diffusion_model.",
    "writenet": "control_model.",
    "vae": "first_stage_model.",
    "clip": "cond_stage_model.transformer.text_model.",
    "embedding": "embedding_manager.",
    "recognizer": "text_predictor.",
}
"""Where each part's keys start."""

SCHEDULE_KEYS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
)
"""Buffers of the noise schedule, float32 (1000,) each; no parameters."""

POSITION_IDS_KEY = PREFIXES["clip"] + "embeddings.position_ids"
"""arange(77): written by some versions of transformers, never needed."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TRUNK = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.fuse_block": "fuse_block_za",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_RECOGNIZER = (
    (r"backbone\.stem\.", "backbone.conv1."),
    (r"backbone\.blocks\.(\d+)\.(depthwise|pointwise)\.", r"backbone.block_list.\1._\2_conv."),
    (r"(backbone\..+)\.conv\.", r"\1._conv."),
    (r"(backbone\..+)\.norm\.", r"\1._batch_norm."),
    (r"backbone\.blocks\.(\d+)\.gate\.", r"backbone.block_list.\1._se."),
    (r"neck\.blocks\.", "neck.encoder.svtr_block."),
    (r"neck\.(?!encoder\.)", "neck.encoder."),
    (r"head\.", "head.fc."),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one of our tensors lies in a checkpoint."""

    key: str
    as_convolution: bool = False
    """Upstream keeps this linear layer's weight (out, in) as that of a 1x1 convolution, (out, in, 1, 1)."""

    def upstream_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape in the checkpoint of a tensor of ours."""
        return (*shape, 1, 1) if self.as_convolution else tuple(shape)


def key_table(part: str, names: Iterable[str], config: NetworkConfig) -> dict[str, Entry]:
    """Return where each tensor of a part lies in a checkpoint.

    Args:
        part: a key of PREFIXES.
        names: our parameters and buffers, e.g. `module.state_dict()`.
        config: the network's sizes, on which the numbering of blocks depends.

    Raises:
        ValueError: a name is not one of that part, or two names would share a key (a bug, not bad data).
    """
    rules: dict[str, Callable[[str], Entry]] = {
        "unet": lambda name: Entry(_trunk_key(name, config.unet)),
        "writenet": lambda name: Entry(_trunk_key(name, config.unet)),
        "vae": lambda name: _vae_entry(name, len(config.vae.channel_mult)),
        "clip": lambda name: Entry(name.removeprefix("text_model.")),  # transformers 4 has it, 5 has not
        "embedding": lambda name: Entry(_recognizer_key(name)),
        "recognizer": lambda name: Entry(_recognizer_key(name)),
    }
    rule, prefix = rules[part], PREFIXES[part]
    table = {}
    for name in names:
        entry = rule(name)
        table[name] = Entry(prefix + entry.key, entry.as_convolution)
    if len({entry.key for entry in table.values()}) != len(table):
        raise ValueError(f"part {part}: two names share a checkpoint key")
    return table


def part_of(key: str) -> str | None:
    """Return the part that a checkpoint key belongs to, "schedule", or None for a foreign key."""
    if key in SCHEDULE_KEYS:
        return "schedule"
    return next((part for part, prefix in PREFIXES.items() if key.startswith(prefix)), None)


def _split(name: str, heads: dict[str, str]) -> str | None:
    """Rewrite the start of a name by the first rule that fits whole parts of it."""
    for ours, theirs in heads.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    return None


def _trunk_key(name: str, sizes: UNetConfig) -> str:
    """Rewrite a name of the UNet or of WriteNet.

    Upstream numbers a level's blocks in a row: input block 0 is the first convolution, then each level has
    num_res_blocks blocks and its downsampling; each output level has one block more, its upsampling inside.
    """
    fixed = _split(name, _TRUNK)
    if fixed is not None:
        return fixed
    if match := re.fullmatch(r"controlnet_cond_embedding\.((?:glyph|position)_block\..+)", name):
        return match[1]
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", name):
        return f"zero_convs.{match[1]}.0.{match[2]}"
    match = re.fullmatch(r"(down|up|mid)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"no rule for the parameter {name}")
    side, level, kind, index = match[1], int(match[2] or 0), match[3], int(match[4])
    rest = _split(match[5], _RESNET) or match[5] if kind == "resnets" else match[5]
    row = level * (sizes.num_res_blocks + 1)
    if kind == "downsamplers":
        return f"input_blocks.{row + sizes.num_res_blocks + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        slot = 2 if sizes.has_attention[-1 - level] else 1
        return f"output_blocks.{row + sizes.num_res_blocks}.{slot}.{rest}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{rest}"
    blocks, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    return f"{blocks}.{first + row + index}.{1 if kind == 'attentions' else 0}.{rest}"


def _vae_entry(name: str, levels: int) -> Entry:
    """Rewrite a name of the autoencoder; upstream counts the decoder's levels from the image's side."""
    name = name.removeprefix("autoencoder.")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)", name):
        rest = _split(match[2], _VAE_ATTENTION) or match[2]
        is_linear = rest.endswith(".weight") and not rest.startswith("norm.")
        return Entry(f"{match[1]}.mid.attn_1.{rest}", as_convolution=is_linear)
    name = name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        return Entry(f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}")
    if match := re.fullmatch(r"(encoder|decoder)\.(up|down)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
        coder, side, level, kind, index, rest = match.groups()
        number = int(level) if side == "down" else levels - 1 - int(level)
        inner = f"block.{index}" if kind == "resnets" else f"{side}sample"
        return Entry(f"{coder}.{side}.{number}.{inner}.{rest}")
    return Entry(name)


def _recognizer_key(name: str) -> str:
    """Rewrite a name of the recognizer, or of the line embedding with the recognizer inside."""
    inner = name.removeprefix("font_predictor.")
    if inner.startswith(("backbone.", "neck.", "head.")):
        rewritten = inner
        for pattern, replacement in _RECOGNIZER:
            rewritten = re.sub("^" + pattern, replacement, rewritten)
        return name.removesuffix(inner) + rewritten
    return name
