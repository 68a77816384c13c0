"""Adapters folded into the weights for training: the network runs plain, and the weights' gradients give theirs.

PEFT adds two matrix products, a scaling and a sum to every adapted layer, keeps what they need for the backward
pass, and converts types around them. Folded, none of this is there; in return a backward pass computes the
gradient of every adapted weight. That is about 3 F of arithmetic, F that of a forward pass, instead of 2.5 F.

With s = alpha / r and W' = W + s B A (Hu et al. 2021, LoRA, section 4.1): dB = s dW' A^T and dA = s B^T dW'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stage2_student.student.lora import ADAPTER_NAME, adapted_layers, lora_pair


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fold:
    """One adapted layer."""

    base: Tensor
    """W, (out, in ...), as (out, in) float32; it never changes."""
    weight: nn.Parameter
    """W + s B A in the type of the arithmetic, in the network."""
    a: nn.Parameter
    """A, (r, in ...) float32."""
    b: nn.Parameter
    """B, (out, r ...) float32."""
    scale: float
    """s = alpha / r."""

    def refresh(self) -> None:
        """Add the adapter to W in float32 and cast the sum once."""
        total = torch.addmm(self.base, self.b.flatten(1), self.a.flatten(1), alpha=self.scale)
        self.weight.copy_(total.view(self.weight.shape))

    def take(self, weight: Tensor) -> None:
        """Turn dW into dA and dB, which add up in float32, and let go of it."""
        assert weight.grad is not None
        gradient, weight.grad = weight.grad.flatten(1).float(), None
        _add_gradient(self.b, gradient, self.a.flatten(1).T, self.scale)
        _add_gradient(self.a, self.b.flatten(1).T, gradient, self.scale)


def _add_gradient(parameter: nn.Parameter, left: Tensor, right: Tensor, scale: float) -> None:
    """Add scale times a product of matrices to a gradient."""
    if parameter.grad is None:
        parameter.grad = torch.mm(left, right).mul_(scale).view(parameter.shape)
    else:
        parameter.grad.flatten(1).addmm_(left, right, alpha=scale)


@contextmanager
def _without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the types at hand, without gradients."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class FoldedAdapters:
    """The adapters of networks, taken out of these and folded into their weights.

    The weights are up to date after `refresh`, which has to follow every change of A and B: an optimizer's step,
    values that were loaded, an average that takes their place. Backward passes add to the gradients of A and B as
    PEFT's would. No gradient passes through A and B themselves, so that a launcher's wrapper would wait for it in
    vain: `agreement.average_gradients` does its work.
    """

    def __init__(self, networks: Iterable[nn.Module], *, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        """Put plain layers in the place of PEFT's, cast all weights, and fold.

        Where weights are rounded to bfloat16 before a small update is added, it vanishes from all of them when the
        sum is rounded. Where they are not, the sum goes to the next bfloat16 number in as many weights as it
        should on average. So networks come in float32, adapted weights stay in it, and the sum is cast.

        Args:
            networks: with adapters, in float32, on their device.
            dtype: of what is not adapted.
            compute_dtype: of the weights that adapters are folded into: autocast's, which would cast them to it.
        """
        self._folds: list[_Fold] = []
        for network in networks:
            for name, layer in adapted_layers(network).items():
                base = layer.get_base_layer()
                self._folds.append(_fold(base, *lora_pair(layer), layer.scaling[ADAPTER_NAME], compute_dtype))
                parent, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(parent), leaf, base)
            folded = {id(fold.weight) for fold in self._folds}
            for parameter in network.parameters():
                if id(parameter) not in folded:
                    parameter.data = parameter.data.to(dtype)
        for fold in self._folds:
            fold.weight.register_post_accumulate_grad_hook(self._take(fold))
        self.refresh()

    def refresh(self) -> None:
        """Fold A and B as they are now."""
        with _without_autocast(self._folds[0].weight.device):
            for fold in self._folds:
                fold.refresh()

    def base_weight(self, parameter: nn.Parameter) -> Tensor | None:
        """Return W of a weight that an adapter is folded into, in its type and shape; None for any other."""
        for fold in self._folds:
            if fold.weight is parameter:
                return fold.base.view(parameter.shape).to(parameter.dtype)
        return None

    def gradients(self) -> list[Tensor]:
        """Return those of A and B, which DistributedDataParallel does not average over processes."""
        return [p.grad for fold in self._folds for p in (fold.a, fold.b) if p.grad is not None]

    def _take(self, fold: _Fold) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            with _without_autocast(weight.device):
                fold.take(weight)

        return take


def _fold(base: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float, dtype: torch.dtype) -> _Fold:
    weight = base.weight
    assert isinstance(weight, nn.Parameter)
    if weight.dtype != torch.float32 or getattr(base, "groups", 1) != 1:
        raise ValueError(f"{base} with weights of {weight.dtype}: folding takes ungrouped float32 layers")
    base.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
    return _Fold(base=weight.detach().flatten(1).contiguous(), weight=base.weight, a=a, b=b, scale=scale)
