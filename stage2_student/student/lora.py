"""LoRA on the frozen networks: which modules, their parameters, their file format.

Modules are named as diffusers names them. PEFT does the arithmetic; the files are PEFT's own
(`adapter_config.json`, `adapter_model.safetensors`), one folder per adapted network.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from common.errors import DataError, UsageError, reason
from common.faults import raise_disk_fault
from common.files import canonical_json, write_bytes_atomic
from common.seeding import generator

ADAPTER_NAME = "student"
PEFT_PREFIX = "base_model.model."
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A module that was given an adapter."""

    part: str
    """"unet" or "writenet"."""
    name: str
    """The module's dotted name."""
    pattern: str
    """The pattern of lora.targets (or lora.writenet_targets) that it matched."""
    kind: str
    """"Linear" or "Conv2d"."""
    parameters: int
    """Trainable parameters of its adapter."""


def find_targets(model: nn.Module, patterns: Sequence[str], key: str) -> dict[str, str]:
    """Find the modules to adapt.

    Args:
        model: a network.
        patterns: ends of dotted module names; `*` stands for one name part.
        key: the configuration key that the patterns come from, for errors.

    Returns:
        The pattern of each matched module, by name in the network's order.

    Raises:
        UsageError: a pattern matches no linear layer or convolution, or two match the same one.
    """
    candidates = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found: dict[str, str] = {}
    for name in candidates:
        matching = [pattern for pattern in patterns if _matches(name, pattern)]
        if len(matching) > 1:
            raise UsageError(
                f"config {key}: module {name} is matched by both {matching[0]!r} and {matching[1]!r} and would be"
                " adapted twice; remove one of the patterns"
            )
        if matching:
            found[name] = matching[0]
    for pattern in patterns:
        if pattern not in found.values():
            ends = {".".join(name.split(".")[-n:]) for name in candidates for n in (1, 2, 3)}
            near = difflib.get_close_matches(pattern, sorted(ends), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"config {key}: pattern {pattern!r} matches no linear layer or convolution of the network{hint}"
            )
    return {name: found[name] for name in candidates if name in found}


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    ends = parts[-len(wanted) :]
    return len(ends) == len(wanted) and all(w in ("*", part) for w, part in zip(wanted, ends, strict=True))


def adapt(
    model: nn.Module, part: str, targets: Mapping[str, str], *, rank: int, alpha: float, seed: int
) -> list[Adapted]:
    """Add LoRA adapters in place; parameters are float32 whatever the base's type.

    A is drawn from a generator keyed by (seed, part, module), B is zero: at first the adapted network computes
    what the base does.

    Args:
        model: a frozen network.
        part: "unet" or "writenet".
        targets: pattern of each module to adapt, by name (see `find_targets`).
        rank: r.
        alpha: the adapter's output is scaled by alpha / r.
        seed: train.seed.

    Source: Hu et al. 2021 (LoRA), section 4.1.
    """
    inject_adapter_in_model(peft_config(targets, rank, alpha), model, adapter_name=ADAPTER_NAME)
    layers = adapted_layers(model)
    if set(layers) != set(targets):  # PEFT matches by suffix too; full names leave it no choice
        raise ValueError(f"PEFT adapted {sorted(set(layers) ^ set(targets))[:3]} against the plan")
    adapted = []
    for name, layer in layers.items():
        a, b = lora_pair(layer)
        a.data, b.data = a.data.float(), b.data.float()
        draw = torch.empty(a.shape)
        nn.init.kaiming_uniform_(draw, a=5**0.5, generator=generator(seed, "lora", part, name))
        a.data.copy_(draw)
        nn.init.zeros_(b)
        kind = "Conv2d" if isinstance(layer.get_base_layer(), nn.Conv2d) else "Linear"
        size = a.numel() + b.numel()
        adapted.append(Adapted(part=part, name=name, pattern=targets[name], kind=kind, parameters=size))
    return adapted


def peft_config(targets: Mapping[str, str], rank: int, alpha: float) -> PeftLoraConfig:
    """Return PEFT's description of an adapter over modules with exactly these names."""
    scale = int(alpha) if float(alpha).is_integer() else alpha
    return PeftLoraConfig(r=rank, lora_alpha=scale, target_modules=sorted(targets), bias="none")


def adapted_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return the modules that carry an adapter, by the name that the base module had."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def leave_types_to_autocast(model: nn.Module) -> None:
    """Keep PEFT from converting what goes into an adapter to float32, for autocast to convert it back.

    The results are the same bits. Without autocast an adapter needs the conversion.
    """
    for layer in adapted_layers(model).values():
        layer.cast_input_dtype_enabled = False


def merge(model: nn.Module) -> list[str]:
    """Add the adapters to the weights, W + (alpha / rank) B A, and take them off; returns the changed modules."""
    layers = adapted_layers(model)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        base.weight.data += layer.get_delta_weight(ADAPTER_NAME).to(base.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    return list(layers)


def lora_pair(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """Return an adapter's A, (r, in, ...), and B, (out, r, ...)."""
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by PEFT's name, e.g. `mid_block.resnets.0.conv1.lora_A.weight`."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in adapted_layers(model).items():
        parameters[f"{name}.lora_A.weight"], parameters[f"{name}.lora_B.weight"] = lora_pair(layer)
    return parameters


def summarise(adapted: Sequence[Adapted]) -> list[str]:
    """Return lines that say what was adapted: a count per network and pattern, then the total."""
    rows = Counter((a.part, a.pattern, a.kind) for a in adapted)
    sizes: Counter[tuple[str, str, str]] = Counter()
    for a in adapted:
        sizes[a.part, a.pattern, a.kind] += a.parameters
    lines = [
        f"{part:<9} {pattern:<24} {kind:<7} {count:>4} modules {sizes[part, pattern, kind]:>12,} parameters"
        for (part, pattern, kind), count in rows.items()
    ]
    total = sum(a.parameters for a in adapted)
    return [*lines, f"adapted   {len(adapted)} modules, {total:,} trainable parameters"]


# Files.


def save_lora(folder: Path, tensors: Mapping[str, Tensor], *, rank: int, alpha: float) -> None:
    """Write one network's adapter in PEFT's format.

    Args:
        folder: made if missing.
        tensors: by PEFT's name without its prefix (see `lora_parameters`).
        rank: r.
        alpha: as trained.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = {name.removesuffix(".lora_A.weight"): "" for name in tensors if name.endswith(".lora_A.weight")}
    config: dict[str, Any] = peft_config(targets, rank, alpha).to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_bytes_atomic(folder / CONFIG_FILE, canonical_json(plain))
    stored = {PEFT_PREFIX + name: t.detach().cpu().float().contiguous() for name, t in tensors.items()}
    write_bytes_atomic(folder / WEIGHTS_FILE, save_tensors(stored, metadata={"format": "pt"}))


def load_lora(folder: Path) -> tuple[dict[str, Tensor], int, float]:
    """Read an adapter in PEFT's format.

    Returns:
        The tensors by PEFT's name without its prefix, the rank, and alpha.

    Raises:
        DataError: a file is missing or not what it should be.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
        tensors = load_tensors((folder / WEIGHTS_FILE).read_bytes())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except FileNotFoundError as error:
        raise DataError(f"adapter {folder}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise_disk_fault(error, folder)
        raise DataError(f"adapter {folder}: unreadable ({reason(error)})") from None
    except Exception as error:  # safetensors raises its own type, which is no subclass of the above
        raise_disk_fault(error, folder)
        raise DataError(f"adapter {folder}/{WEIGHTS_FILE}: not a safetensors file ({reason(error)})") from None
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}, rank, alpha


def attach(model: nn.Module, part: str, tensors: Mapping[str, Tensor], *, rank: int, alpha: float) -> None:
    """Give a base network a stored adapter, for sampling or to go on training.

    Raises:
        DataError: the adapter names modules that the network does not have, or has other shapes.
    """
    names = {module for module, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    targets = {name.removesuffix(".lora_A.weight"): "stored" for name in tensors if ".lora_A." in name}
    missing = sorted(set(targets) - names)
    if missing:
        raise DataError(
            f"the adapter is of another network: {part} has no module {missing[0]}"
            f" ({len(missing)} of {len(targets)} are missing)"
        )
    adapt(model, part, targets, rank=rank, alpha=alpha, seed=0)
    load_parameters(lora_parameters(model), tensors, f"adapter of {part}")


def load_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy stored tensors into parameters in place.

    Raises:
        DataError: names or shapes differ.
    """
    odd = sorted(set(parameters) ^ set(tensors))
    if odd:
        raise DataError(f"{what}: {odd[0]} is in only one of the network and the file ({len(odd)} such names)")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise DataError(
                f"{what}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
            )
        parameter.data.copy_(tensors[name])
