"""What a checkpoint holds, and how a run takes it up again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import DataError, reason
from common.faults import naming, raise_disk_fault
from common.files import canonical_json, write_bytes_atomic
from stage2_student.student.adapter import EMA_DIR, LORA_DIR, Card, load_tensors, save_adapter
from stage2_student.student.folding import FoldedAdapters
from stage2_student.student.lora import load_parameters
from stage2_student.training.critic import Critic
from stage2_student.training.ema import Ema

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "state.json"
RESUME_FILES = (OPTIMIZER_FILE, STATE_FILE)
"""What only a run that goes on needs; the rest of a checkpoint are adapters."""
_VALUE = "value"
"""Key of a critic's weights, beside their moments."""


@dataclass(kw_only=True, slots=True)
class Progression:
    """Where a run stands, as plain JSON values; changes as it goes."""

    step: int = 0
    """Optimizer steps done."""
    loader: dict[str, Any] = field(default_factory=dict)
    """The loader's whole state."""
    loss_sum: float = 0.0
    """Of the steps since the last log line."""
    loss_count: int = 0
    """Steps since the last log line."""
    scaler: dict[str, Any] | None = None
    """Of the gradient scaler, with fp16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """Everything with weights or moments."""

    parameters: dict[str, nn.Parameter]
    """The adapters', by the names of `Student.trainable`."""
    optimizer: torch.optim.Optimizer
    """AdamW over the parameters, in their order."""
    ema: Ema | None
    """Their average, if the run keeps one."""
    folded: FoldedAdapters | None = None
    """The network's weights that they are folded into, if they are: to be made anew when they change."""
    critic: Critic | None = None
    """What learns to tell the student's states from the teacher's, if the run has it."""


def write_state(
    folder: Path, learner: Learner, progression: Progression, card: Card, identity: Mapping[str, Any]
) -> None:
    """Fill a checkpoint's folder: the LoRA and its EMA as adapters, the optimizer's moments, the rest as JSON.

    Args:
        folder: empty.
        learner: what has weights.
        progression: where the run stands.
        card: of the adapters.
        identity: settings that a resumed run must share (see `run_identity`).
    """
    save_adapter(folder / LORA_DIR, learner.parameters, card)
    if learner.ema is not None:
        save_adapter(folder / EMA_DIR, learner.ema.values, card)
    with naming(folder / OPTIMIZER_FILE):
        save_file(_to_resume(learner), str(folder / OPTIMIZER_FILE))
        with (folder / OPTIMIZER_FILE).open("rb") as file:
            os.fsync(file.fileno())
    content = {"progression": asdict(progression), "identity": dict(identity)}
    write_bytes_atomic(folder / STATE_FILE, canonical_json(content))


def _to_resume(learner: Learner) -> dict[str, Tensor]:
    """Return what is no adapter, as NAME/KEY: the optimizer's moments; a critic's weights and moments."""
    found = _moments(learner.optimizer, learner.parameters)
    if learner.critic is not None:
        found |= _moments(learner.critic.optimizer, learner.critic.named())
        values = learner.critic.values()
        found |= {f"{name}/{_VALUE}": value.detach().cpu().contiguous() for name, value in values.items()}
    return found


def _moments(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in named.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def read_state(folder: Path) -> tuple[Progression, dict[str, Any]]:
    """Read where a checkpoint's run stood, and its identity.

    Raises:
        DataError: the file is not what it should be.
    """
    try:
        content = json.loads((folder / STATE_FILE).read_bytes())
        return Progression(**content["progression"]), dict(content["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise_disk_fault(error, folder / STATE_FILE)
        raise DataError(f"checkpoint {folder}: {STATE_FILE} is unreadable ({reason(error)})") from None


def restore(folder: Path, learner: Learner) -> None:
    """Give weights, average and moments their stored values, in place.

    Raises:
        DataError: the checkpoint is of another network or another version.
    """
    load_parameters(learner.parameters, load_tensors(folder / LORA_DIR), f"checkpoint {folder}")
    if learner.folded is not None:
        learner.folded.refresh()
    if learner.ema is not None:
        learner.ema.load(load_tensors(folder / EMA_DIR))
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(str(folder / OPTIMIZER_FILE)).items():
        name, _, kind = key.rpartition("/")
        found.setdefault(name, {})[kind] = tensor
    _restore_moments(folder, found, learner.optimizer, learner.parameters)
    if learner.critic is not None:
        values = {name: kinds.pop(_VALUE) for name, kinds in found.items() if _VALUE in kinds}
        load_parameters(learner.critic.values(), values, f"checkpoint {folder}, critic")
        _restore_moments(folder, found, learner.critic.optimizer, learner.critic.named())


def _restore_moments(
    folder: Path,
    found: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
) -> None:
    for name, parameter in named.items():
        if name not in found:
            raise DataError(f"checkpoint {folder}: {OPTIMIZER_FILE} has nothing for {name}")
        fused = optimizer.defaults.get("fused")  # which counts on the device, else AdamW does on the CPU
        optimizer.state[parameter] = {
            moment: (tensor.to(parameter.device) if fused else tensor)
            if moment == "step"
            else torch.empty_like(parameter).copy_(tensor)  # in the parameter's own memory order
            for moment, tensor in found[name].items()
        }
