"""SD1.5's UNet from diffusers, with AnyText2's AttnX in some of its transformer blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from common.anytext2.config import NetworkConfig

Control = tuple[Tensor, ...]
"""WriteNet's residuals, shallow to deep, the middle block's last."""
ATTNX_ALIASES = {"attnx1": "attn1x", "attnx2": "attn2x"}
"""AttnX's names in kohya's LoRA files: diffusers' converter of these files takes `attn1` for its own wherever it
stands, and makes `attn1.processorx` of `attn1x`."""


class AttnXBlock(BasicTransformerBlock):
    """A transformer block with a second pair of attentions, `attn1x` and `attn2x`, whose weight is an argument.

    diffusers builds these blocks; ours takes the place of one, parameters and names unchanged. All blocks of a
    UNet are replaced, with or without AttnX, because diffusers hands `attnx_scale` to every one of them.
    """

    def __init__(self, stock: BasicTransformerBlock, *, attnx: bool) -> None:
        """Take over a stock block's sizes; its parameters are not kept."""
        sizes: dict[str, Any] = {
            "dim": stock.dim,
            "num_attention_heads": stock.num_attention_heads,
            "attention_head_dim": stock.attention_head_dim,
        }
        super().__init__(**sizes, cross_attention_dim=stock.cross_attention_dim)
        self.attn1x: Attention | None = None
        self.attn2x: Attention | None = None
        if attnx:
            heads: dict[str, Any] = {"heads": stock.num_attention_heads, "dim_head": stock.attention_head_dim}
            self.attn1x = Attention(query_dim=stock.dim, **heads)
            self.attn2x = Attention(query_dim=stock.dim, cross_attention_dim=stock.cross_attention_dim, **heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Run the block on (B, h w, C) with a context of (B, L, c) and its bias of (B, 1, L)."""
        x, context = hidden_states, encoder_hidden_states
        x = x + self.attn1(self.norm1(x))  # (B, h w, C)
        x = x + self.attn2(self.norm2(x), context, encoder_attention_mask)
        if self.attn1x is not None and self.attn2x is not None:
            scale = (cross_attention_kwargs or {}).get("attnx_scale", 1.0)
            x = x + scale * self.attn1x(self.norm1(x))
            x = x + scale * self.attn2x(self.norm2(x), context, encoder_attention_mask)
        return x + self.ff(self.norm3(x))


def trunk_sizes(config: NetworkConfig) -> dict[str, Any]:
    """Return diffusers' arguments for what UNet and WriteNet have in common, down to the middle block."""
    sizes = config.unet
    return {
        "in_channels": config.latent_channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in sizes.has_attention),
        "block_out_channels": sizes.block_channels,
        "layers_per_block": sizes.num_res_blocks,
        "norm_num_groups": sizes.norm_groups,
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": sizes.num_heads,  # diffusers' misnomer: the number of heads
    }


class UNet(UNet2DConditionModel):
    """Predicts noise; a pure function of its arguments. Module names are diffusers' own."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the UNet with PyTorch's initial weights."""
        sizes = config.unet
        up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(sizes.has_attention)]
        super().__init__(**trunk_sizes(config), out_channels=config.latent_channels, up_block_types=tuple(up))
        _replace_blocks(self.mid_block, attnx=sizes.attnx_mid)
        for level, block in enumerate(self.down_blocks):
            _replace_blocks(block, attnx=sizes.attnx_down and sizes.has_attention[level])
        for level, block in zip(reversed(range(len(up))), self.up_blocks, strict=True):
            _replace_blocks(block, attnx=level in sizes.attnx_levels)

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load a LoRA as diffusers does, which calls this of its pipelines too; AttnX may go by its aliases."""
        lora = pretrained_model_name_or_path_or_dict
        if isinstance(lora, Mapping):
            lora = _without_aliases(lora)
        if kwargs.get("network_alphas"):
            kwargs["network_alphas"] = _without_aliases(kwargs["network_alphas"])
        super().load_lora_adapter(lora, *args, **kwargs)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        image_context: Tensor,
        control: Control | None = None,
        *,
        context_mask: Tensor | None = None,
        attnx_scale: float = 1.0,
    ) -> Tensor:
        """Predict the noise in noisy latents.

        Args:
            noisy_latents: z_t, (B, C, h, w).
            timesteps: int64, (B,) or (), in 0..999.
            image_context: caption encodings, (B, L, c), L = 77 k.
            control: WriteNet's residuals, or None to go without.
            context_mask: bool (B, L), False where image_context is padding; None if nothing is.
            attnx_scale: weight of AttnX.

        Returns:
            eps, (B, C, h, w).
        """
        output = super().forward(
            noisy_latents,
            timesteps,
            image_context,
            cross_attention_kwargs={"attnx_scale": attnx_scale},
            down_block_additional_residuals=None if control is None else control[:-1],
            mid_block_additional_residual=None if control is None else control[-1],
            encoder_attention_mask=context_mask,
            return_dict=False,
        )
        eps: Tensor = output[0]
        return eps


def _replace_blocks(module: nn.Module | None, *, attnx: bool) -> None:
    for attention in getattr(module, "attentions", ()):
        blocks = attention.transformer_blocks
        for index, block in enumerate(blocks):
            blocks[index] = AttnXBlock(block, attnx=attnx)


def _without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give AttnX its own name in the keys of a LoRA."""
    named = {}
    for key, value in values.items():
        for alias, name in ATTNX_ALIASES.items():
            key = key.replace(f".{alias}.", f".{name}.")
        named[key] = value
    return named
