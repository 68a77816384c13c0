from __future__ import annotations

import pytest
import torch
from torch import nn

from stage1_teacher.tiny.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert float(values.min()) > 0.4 and float(values.max()) < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ result @ v.mT
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < 1e-3


def test_it_agrees_with_torchs_own_up_to_bfloat16() -> None:
    reference = getattr(torch.optim, "Muon", None)
    assert reference is not None, "the tests' torch has Muon"
    start = torch.randn(24, 10, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one = Muon([ours], lr=1e-2)
    other = reference([theirs], lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        gradient = torch.randn(24, 10, generator=torch.Generator().manual_seed(10 + seed))
        for parameter, optimizer in ((ours, one), (theirs, other)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert float(((ours - theirs).norm() / moved).detach()) < 0.05


def test_a_convolution_moves_by_the_same_size_whatever_its_gradients() -> None:
    sizes = []
    for scale in (1e-4, 1.0):
        weight = nn.Parameter(torch.zeros(8, 4, 3, 3))
        weight.grad = scale * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1e-2).step()
        sizes.append(float(weight.detach().square().mean().sqrt()))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    assert sizes[0] == pytest.approx(0.2 * 1e-2, rel=0.3)
