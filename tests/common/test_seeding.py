from __future__ import annotations

import torch

from common.seeding import derive_seed, generator, rng


def test_seeds_depend_on_every_part_on_its_type_and_on_nothing_else() -> None:
    assert derive_seed(0, "id", "noise") == derive_seed(0, "id", "noise")
    keys = [(0, "id", "noise"), (1, "id", "noise"), (0, "id", "font"), ("0", "id", "noise"), (0, "idnoise")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_the_derivation_never_changes() -> None:
    # A changed derivation would silently change every recorded noise.
    assert derive_seed(0, "id", "noise") == 1_034_779_766_263_003_295


def test_generators_of_the_same_key_draw_the_same() -> None:
    torch.manual_seed(1)
    first = torch.randn(3, generator=generator(0, "a"))
    torch.manual_seed(2)
    assert torch.equal(first, torch.randn(3, generator=generator(0, "a")))
    assert rng(0, "a").random() == rng(0, "a").random()
