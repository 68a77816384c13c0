"""Starting a run from another one's adapter: which, whether it fits, and what is remembered of it.

The weights are taken over (their average, if the other run keeps one); step, order and optimizer begin anew. Once
the run has a checkpoint, its ancestor is not needed any more: the checkpoint's card names it.

RUN/ancestors.json   the ancestors, oldest first, from the run's first moment on; only if there are any
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.anytext2.unet import UNet
from common.anytext2.writenet import WriteNet
from common.config import Config
from common.differences import find_differences
from common.errors import DataError, UsageError
from common.files import canonical_json, write_bytes_atomic
from stage2_student.student.adapter import LORA_DIR, Card, find_adapter, load_tensors, read_card
from stage2_student.student.ancestors import Ancestor, hash_adapter
from stage2_student.student.checkpoint_folders import LIST_FILE, require_complete
from stage2_student.student.lora import load_parameters
from stage2_student.student.student import Student, find_modules

logger = logging.getLogger(__name__)

ANCESTORS_FILE = "ancestors.json"
"""In a run's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestry:
    """Where a run's weights come from, besides its own training."""

    adapter: Path | None = None
    """The adapter to take the weights from; None for a run that starts fresh or goes on."""
    ancestors: tuple[Ancestor, ...] = ()
    """Of the run, oldest first; the last is the one that it was started from."""

    @property
    def sha256(self) -> str | None:
        """Of the weights that the run started from; None if it started fresh."""
        return self.ancestors[-1].adapter_sha256 if self.ancestors else None


def find_ancestry(run: Path, ancestor: Path | None, checkpoint: Path | None, resume: str) -> Ancestry:
    """Find what a run starts from, or was started from.

    Args:
        run: the run's folder.
        ancestor: what --from names, or None.
        checkpoint: of the run, to go on from; None to start.
        resume: what --resume says.

    Raises:
        UsageError: the run was begun from an adapter, has no checkpoint yet, and --from is missing.
        DataError: there is no adapter, or the run that goes on was started from another one.
    """
    if checkpoint is not None:
        own = read_card(checkpoint / LORA_DIR).ancestors
        if ancestor is not None:
            _require_same_ancestor(run, own, ancestor)
        return Ancestry(ancestors=own)
    if ancestor is None:
        if resume != "none" and (run / ANCESTORS_FILE).exists():
            raise UsageError(
                f"{run} was begun from another run's adapter and has no checkpoint yet; give --from again, or"
                " start without it in another --out folder"
            )
        return Ancestry()
    adapter, card, tensors = _read(ancestor)
    return Ancestry(adapter=adapter, ancestors=(*card.ancestors, _as_ancestor(card, tensors)))


def _read(ancestor: Path) -> tuple[Path, Card, dict[str, Tensor]]:
    """Read the adapter that a path means; of a checkpoint only if all of it is as it was written."""
    adapter = find_adapter(ancestor)
    if (adapter.parent / LIST_FILE).exists():
        require_complete(adapter.parent)
    return adapter, read_card(adapter), load_tensors(adapter)


def _as_ancestor(card: Card, tensors: dict[str, Tensor]) -> Ancestor:
    return Ancestor(
        objective=card.objective,
        timesteps=card.timesteps,
        step=card.step,
        set_hash=card.set_hash,
        adapter_sha256=hash_adapter(tensors),
    )


def _require_same_ancestor(run: Path, own: Sequence[Ancestor], ancestor: Path) -> None:
    """Refuse another --from than the one that a run was started with; one that is gone is not needed."""
    remedy = "leave --from out to go on with the run, or give another --out folder"
    if not own:
        raise DataError(f"--from {ancestor}: {run} goes on, and was not started from an adapter; {remedy}")
    try:
        _, card, tensors = _read(ancestor)
    except DataError as error:
        logger.warning("--from: %s; it is not needed, as %s goes on from its own checkpoint", error, run)
        return
    received, expected = _as_ancestor(card, tensors), own[-1]
    if received.adapter_sha256 != expected.adapter_sha256:
        raise DataError(
            f"--from {ancestor}: {run} goes on, and was started from another adapter (received"
            f" {received.adapter_sha256[:12]} of step {received.step}, expected {expected.adapter_sha256[:12]} of"
            f" step {expected.step}); {remedy}"
        )


def require_fit(config: Config, ancestry: Ancestry, base_fingerprint: str) -> None:
    """Refuse to start from an adapter that is not one of the run's own kind.

    Args:
        config: the resolved configuration.
        ancestry: of the run.
        base_fingerprint: of model.checkpoint.

    Raises:
        UsageError: the configuration names modules that there are not.
        DataError: base, rank, alpha or adapted modules differ; every difference is named.
    """
    if ancestry.adapter is None:
        return
    card = read_card(ancestry.adapter)
    received = {"rank": config.lora.rank, "alpha": config.lora.alpha}
    found = find_differences(received, {"rank": card.rank, "alpha": card.alpha}, "lora")
    if card.base_fingerprint != base_fingerprint:
        found.insert(0, f"base: received {base_fingerprint[:12]}, expected {card.base_fingerprint[:12]}")
    there = {name.rpartition(".lora_")[0] for name in load_tensors(ancestry.adapter)}
    here = planned_modules(config)
    for only, where in ((here - there, "only here"), (there - here, "only in the adapter")):
        if only:
            found.append(f"lora targets: {_name(only)} {where}")
    if found:
        raise DataError(
            f"--from {ancestry.adapter}: a run cannot start from an adapter of another kind ({'; '.join(found)});"
            " set model.checkpoint and [lora] as they were, or start without --from"
        )


def _name(modules: Collection[str]) -> str:
    more = len(modules) - 1
    return f"{min(modules)}{f' and {more} more' if more else ''}"


def planned_modules(config: Config) -> set[str]:
    """Return the modules that a run will adapt, as `unet.NAME` and `writenet.NAME`, without loading anything.

    Raises:
        UsageError: a pattern of [lora] matches nothing, or a module is matched twice.
    """
    network = config.load_network()
    with torch.device("meta"):
        student = Student(UNet(network), WriteNet(network))
    return {f"{part}.{name}" for part, targets in find_modules(student, config).items() for name in targets}


def take_over(student: Student, ancestry: Ancestry) -> None:
    """Give fresh adapters the ancestor's weights, bit for bit.

    Raises:
        DataError: they are not those that the run is to start from: another training wrote there meanwhile.
    """
    if ancestry.adapter is None:
        return
    tensors = load_tensors(ancestry.adapter)
    if hash_adapter(tensors) != ancestry.sha256:
        raise DataError(f"--from {ancestry.adapter}: changed while it was read; start again")
    load_parameters(student.trainable(), tensors, f"--from {ancestry.adapter}")


def write_ancestors(run: Path, ancestry: Ancestry) -> None:
    """Note in a run's folder what it was started from."""
    path = run / ANCESTORS_FILE
    if ancestry.ancestors:
        write_bytes_atomic(path, canonical_json([asdict(ancestor) for ancestor in ancestry.ancestors]))
    else:
        path.unlink(missing_ok=True)  # of a start that never came to a checkpoint


def describe(ancestry: Ancestry) -> list[str]:
    """Return lines for people: what the run starts from, or was started from."""
    if not ancestry.ancestors:
        return []
    last, steps = ancestry.ancestors[-1], sum(ancestor.step for ancestor in ancestry.ancestors)
    how = "was started from" if ancestry.adapter is None else f"starts from {ancestry.adapter},"
    return [
        f"{how} a student of {last.num_phases} steps, {last.objective}, after {last.step} training steps"
        f" ({steps} with its ancestors'), {last.adapter_sha256[:12]}"
    ]
