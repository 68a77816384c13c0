"""A student as a folder that diffusers loads component by component, without the rest of this project."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from string import Template
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler
from diffusers import __version__ as diffusers_version
from safetensors.torch import save
from torch import nn

from both_stages.examples import examples
from both_stages.sampling import ImageSampler, Prompt, TextLine
from common.anytext2 import modules
from common.anytext2.config import NetworkConfig
from common.anytext2.unet import unet_sizes
from common.anytext2.writenet import writenet_sizes
from common.config import Config
from common.files import read_bytes, write_bytes_atomic
from common.grids import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS
from common.pictures import write_png
from stage1_teacher.teacher.text_encoder import load_tokenizer
from stage2_student.student.adapter import Card, find_adapter, load_tensors
from stage2_student.student.model_card import CARD_NAME, SAMPLES_DIR, Measured, render_card, scheduler_arguments

MODULE = "anytext2.py"
EXAMPLE = "example.safetensors"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SEED = 0


def fill_folder(config: Config, adapter: Path, folder: Path, base: str, measured: Measured | None) -> int:
    """Fill a folder: unet, writenet, vae, text_encoder, tokenizer, scheduler, code, an example and the card.

    Args:
        config: model, teacher and inputs are used; tensors have the type of model.dtype.
        adapter: see `find_adapter`.
        folder: empty.
        base: name of the base model.
        measured: for the card.

    Returns:
        How many modules are adapted.

    Raises:
        DataError: the adapter or the checkpoint is unreadable, or they do not belong together.
    """
    sampler = ImageSampler(config, adapter=adapter)
    network, student, teacher = config.load_network(), sampler.student, sampler.teacher
    card = student.card
    _save_network(folder / "unet", "AnyText2UNet", unet_sizes(network), student.student.unet)
    _save_network(folder / "writenet", "AnyText2WriteNet", writenet_sizes(network), student.student.writenet)
    teacher.vae.autoencoder.save_pretrained(folder / "vae")
    teacher.text_encoder.clip.save_pretrained(folder / "text_encoder")
    load_tokenizer(config.resolve(config.model.clip, "model.clip"), network).save_pretrained(folder / "tokenizer")
    make_scheduler(card).save_pretrained(folder / "scheduler")
    write_bytes_atomic(folder / MODULE, read_bytes(Path(modules.__file__)))
    _write_example(sampler, config, folder)
    for name, data in (measured.samples if measured else {}).items():
        (folder / SAMPLES_DIR).mkdir(exist_ok=True)
        write_bytes_atomic(folder / SAMPLES_DIR / name, data)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = render_card(
        card, "diffusers-pipeline", files=files, base=base, measured=measured, usage=_usage(card, config, network)
    )
    write_bytes_atomic(folder / CARD_NAME, text.encode())
    return len(load_tensors(find_adapter(adapter))) // 2


def make_scheduler(card: Card) -> DDIMScheduler | LCMScheduler:
    """Return diffusers' scheduler that walks the student's grid."""
    name, arguments = scheduler_arguments(card)
    kind = {"DDIMScheduler": DDIMScheduler, "LCMScheduler": LCMScheduler}[name]
    return kind(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        **arguments,
    )


def _save_network(folder: Path, kind: str, sizes: Mapping[str, Any], network: nn.Module) -> None:
    """Write a network as `from_pretrained` of its class in MODULE reads it."""
    folder.mkdir()
    config = {"_class_name": kind, "_diffusers_version": diffusers_version, **sizes}
    write_bytes_atomic(folder / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    write_bytes_atomic(folder / _WEIGHTS, save(state, metadata={"format": "pt"}))


def _write_example(sampler: ImageSampler, config: Config, folder: Path) -> None:
    """Write one prompt's conditioning and noise, and the image that this project samples from them."""
    example = examples(config.inputs.size, ())[0]
    lines = [TextLine(text=line["text"], box=line["box"], color=line["color"]) for line in example["lines"]]
    prompt = Prompt(text=example["caption"], lines=lines)
    conditioning, samples = sampler.encode(prompt), sampler.sample(prompt, seed=_SEED)
    given = {
        field.name: getattr(conditioning, field.name)[None].cpu().contiguous() for field in fields(conditioning)
    }
    shape = tuple(given["masked_latents"].shape[1:])
    noise = sampler.student.noise(_SEED, [0], shape)[:, 0].contiguous()
    write_bytes_atomic(folder / EXAMPLE, save({**given, "noise": noise}, metadata={"format": "pt"}))
    write_png(folder / "example.png", samples.pictures[0], samples.texts[0])


def _usage(card: Card, config: Config, network: NetworkConfig) -> str:
    """Say how to sample with diffusers alone, and where contexts come from."""
    scheduler, _ = scheduler_arguments(card)
    template = Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    return template.substitute(
        module=MODULE,
        example=EXAMPLE,
        scheduler=scheduler,
        steps=card.num_steps if scheduler == "DDIMScheduler" else f"timesteps={list(card.timesteps)}",
        count=card.num_steps,
        dtype=config.model.dtype,
        width=network.context_dim,
        channels=network.latent_channels,
        stride=network.stride,
    ).strip()
