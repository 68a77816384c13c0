"""SD1.5's UNet from diffusers, with AnyText2's AttnX in some of its transformer blocks, of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.anytext2.config import NetworkConfig
from common.anytext2.modules import AnyText2UNet

MASKED = -10_000.0
"""Of attention's scores, for tokens that are padding: as diffusers has it."""
Control = tuple[Tensor, ...]
"""WriteNet's residuals, shallow to deep, the middle block's last."""
ATTNX_ALIASES = {"attnx1": "attn1x", "attnx2": "attn2x"}
"""AttnX's names in kohya's LoRA files: diffusers' converter of these files takes `attn1` for its own wherever it
stands, and makes `attn1.processorx` of `attn1x`."""


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


def unet_sizes(config: NetworkConfig) -> dict[str, Any]:
    """Return the arguments of `AnyText2UNet`."""
    sizes = config.unet
    return {
        **trunk_sizes(config),
        "out_channels": config.latent_channels,
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(sizes.has_attention)
        ),
        "attnx_mid": sizes.attnx_mid,
        "attnx_down": sizes.attnx_down,
        "attnx_levels": sizes.attnx_levels,
    }


class UNet(AnyText2UNet):
    """Predicts noise; a pure function of its arguments. Module names are diffusers' own."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the UNet with PyTorch's initial weights."""
        super().__init__(**unet_sizes(config))

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

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """C_l of each level that `features` returns."""
        widths: tuple[int, ...] = tuple(self.config.block_out_channels)  # type: ignore[attr-defined]
        return (*widths, widths[-1])

    def features(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        image_context: Tensor,
        *,
        context_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Return what the blocks on the way down and the middle block give, which WriteNet does not reach.

        About a third of `forward`'s work. Arguments as of `forward`.

        Returns:
            (B, C_l, h_l, w_l) of each block on the way down, shallow to deep, then of the middle block.
        """
        embedding = self.time_embedding(self.get_time_embed(noisy_latents, timesteps))
        bias = None
        if context_mask is not None:  # added to attention's scores
            bias = (1 - context_mask.to(noisy_latents.dtype))[:, None] * MASKED
        context: dict[str, Any] = {"encoder_hidden_states": image_context, "encoder_attention_mask": bias}
        hidden, found = self.conv_in(noisy_latents), list[Tensor]()
        for block in self.down_blocks:
            hidden, _ = block(
                hidden, embedding, **(context if getattr(block, "has_cross_attention", False) else {})
            )
            found.append(hidden)
        found.append(self.mid_block(hidden, embedding, **context))
        return found


def _without_aliases(values: Mapping[str, Any]) -> dict[str, Any]:
    """Give AttnX its own name in the keys of a LoRA."""
    named = {}
    for key, value in values.items():
        for alias, name in ATTNX_ALIASES.items():
            key = key.replace(f".{alias}.", f".{name}.")
        named[key] = value
    return named
