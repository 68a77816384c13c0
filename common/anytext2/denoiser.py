"""UNet and WriteNet together: the network that a solve calls, with and without guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.anytext2.conditioning import Conditioning, ConditioningBatch, Uncond
from common.anytext2.unet import Control, UNet
from common.anytext2.writenet import WriteNet
from common.ddim import Predict
from common.schedule import guided

NO_CONTROL: Control = ()
"""For a UNet that goes without WriteNet."""

PredictBranches = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(z_t (B, C, h, w), t (B,) int64) to the eps of both branches, float32; None if there is no unconditional one."""


class Denoiser(nn.Module):
    """Predicts noise; a pure function of its arguments. One module, so that a launcher can wrap it whole."""

    def __init__(self, unet: UNet, writenet: WriteNet) -> None:
        super().__init__()
        self.unet, self.writenet = unet, writenet

    @property
    def dtype(self) -> torch.dtype:
        """Float type of the weights, and so of what goes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.unet.conv_in.weight.device

    @property
    def parts(self) -> dict[str, nn.Module]:
        """UNet and WriteNet, by the names that checkpoints and adapters know them by."""
        return {"unet": self.unet, "writenet": self.writenet}

    def control(self, conditioning: ConditioningBatch) -> Control:
        """Return WriteNet's residuals; they depend on neither z_t nor t."""
        return self.writenet(conditioning.hints, conditioning.text_context)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: ConditioningBatch,
        control: Control | None = None,
        *,
        attnx_scale: float = 1.0,
    ) -> Tensor:
        """Predict the noise, without guidance.

        Args:
            noisy_latents: z_t, (B, C, h, w), any float type.
            timesteps: (B,) int64.
            conditioning: of B images, on the network's device and in its float type.
            control: WriteNet's residuals if they are at hand; computed here if not. `NO_CONTROL` goes without.
            attnx_scale: weight of AttnX.

        Returns:
            eps, (B, C, h, w), in the network's float type.
        """
        if control is None:
            control = self.control(conditioning)
        return self.unet(
            noisy_latents.to(self.dtype),
            timesteps,
            conditioning.image_context,
            control or None,
            context_mask=conditioning.context_mask,
            attnx_scale=attnx_scale,
        )


@torch.no_grad()
def predict_branches(
    denoiser: Denoiser,
    conditionings: Sequence[Conditioning],
    uncond: Uncond | None,
    *,
    attnx_scale: float = 1.0,
    with_writenet: bool = True,
) -> PredictBranches:
    """Prepare what stays the same over a solve: WriteNet's residuals and the padded contexts of both branches.

    Args:
        denoiser: the network.
        conditionings: B of them, on any device, of any float type; one object that occurs more than once (several
            rollouts of an input) is run through WriteNet once.
        uncond: the other branch of guidance, which runs in the same batch, 2 B rows; None for no such branch.
        attnx_scale: weight of AttnX.
        with_writenet: False leaves WriteNet out.
    """
    count = len(conditionings)
    rows = _stack_branches(denoiser, conditionings, uncond)
    control = _control_once(denoiser, conditionings, uncond) if with_writenet else NO_CONTROL

    @torch.no_grad()
    def predict(noisy_latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
        if uncond is not None:
            noisy_latents, timesteps = torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2)
        eps = denoiser(noisy_latents, timesteps, rows, control, attnx_scale=attnx_scale).float()
        return (eps, None) if uncond is None else (eps[:count], eps[count:])

    return predict


def guide(predict: PredictBranches, guidance_scale: float) -> Predict:
    """Join both branches: eps_u + s (eps_c - eps_u); the conditional one alone where there is no other."""

    def predict_guided(noisy_latents: Tensor, timesteps: Tensor) -> Tensor:
        cond, uncond = predict(noisy_latents, timesteps)
        return cond if uncond is None else guided(cond, uncond, guidance_scale)

    return predict_guided


def _stack_branches(
    denoiser: Denoiser, conditionings: Sequence[Conditioning], uncond: Uncond | None
) -> ConditioningBatch:
    """Stack [conditional, unconditional] rows where the network computes."""
    placed = {id(item): item.to(denoiser.device, denoiser.dtype) for item in conditionings}
    rows = [placed[id(item)] for item in conditionings]
    if uncond is not None:
        without = uncond.to(denoiser.device, denoiser.dtype)
        rows += [item.without(without) for item in rows]
    return ConditioningBatch.stack(rows)


def _control_once(denoiser: Denoiser, conditionings: Sequence[Conditioning], uncond: Uncond | None) -> Control:
    """Run WriteNet once per different conditioning and branch; returns residuals of all rows."""
    different = list({id(item): item for item in conditionings}.values())
    row_of = {id(item): row for row, item in enumerate(different)}
    rows = [row_of[id(item)] for item in conditionings]
    if uncond is not None:
        rows += [len(different) + row for row in rows]
    control = denoiser.control(_stack_branches(denoiser, different, uncond))
    if len(different) == len(conditionings):
        return control
    index = torch.tensor(rows, device=denoiser.device)
    return tuple(residual[index] for residual in control)
