r"""Train the embedded teacher's UNet, WriteNet, text tower and glyph embedding together, from scratch.

    python -m stage1_teacher.tiny.train_denoiser --features runs/tiny/features --vae runs/tiny/vae \
        --position runs/tiny/position.pt --out runs/tiny/denoiser --steps 4000

Stops and goes on: the same command continues from the newest checkpoint. The first steps train without the UNet
(`Settings.probe_steps`). Then each image is seen under several noises a step: WriteNet and the text tower run once
an image, as at sampling. It computes in float32, on a GPU too: bfloat16 would round z_t too coarsely on its way
through the UNet (`networks._pass_through`).
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from common.anytext2.checkpoint import load_part
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.config import NetworkConfig
from common.anytext2.unet import Control, UNet
from common.ddim import Grid, integrate
from common.errors import DataError, UsageError
from common.files import atomic_write
from common.machine import resolve_device
from common.schedule import diffuse, make_alphas_cumprod
from common.scripts import make_parser, run_script, start_training
from stage1_teacher.teacher.glyph_embedding import PositionEncoder
from stage1_teacher.teacher.keys import PART_BUILDERS
from stage1_teacher.teacher.text_encoder import encode_tokens, encode_with_lines
from stage1_teacher.tiny.batches import LOOKS, FeatureStore, TrainingBatch
from stage1_teacher.tiny.features import FeatureMaker
from stage1_teacher.tiny.muon import Muon
from stage1_teacher.tiny.networks import WORD_SCALE, Denoiser, build_denoiser, network_config
from stage1_teacher.tiny.train_vae import learning_rate

log = logging.getLogger(__name__)

MAX_SNR = 20.0
"""Above it a noise level's weight falls (min-SNR, Hang et al. 2023, arXiv 2303.09556, with 5): the last steps of a
solve leave grain where they are learnt too little."""
MAX_WEIGHT = 200.0
"""Of an eps error. (SNR + 1) / SNR would count errors of v alike; with the plain eps loss a network learns late
what the picture is, for at high noise that hardly shows in eps."""
EMA_DECAY, EMA_EVERY = 0.98, 5
PROBE_WEIGHTS = {"letters": 0.2, "text": 0.6, "shown": 0.2, "color": 0.2, "font": 0.2}
"""Of the losses by which linear probes read off WriteNet's residuals the letters that the glyph map shows, the
text of all lines, the image that edit mode shows, and the lines' colours and fonts. An earlier network, without
them, had hardly learnt in 2,900 steps which of an image's lines a colour belongs to."""
HEADS_ONLY_STEPS = 300
"""`Settings.heads_only_steps` of a run that starts from trained weights, unless it is told otherwise."""
LOG_EVERY = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a run."""

    steps: int
    images: int
    """Per step."""
    noises: int
    """Per image."""
    peak: float
    """AdamW's learning rate after warm-up, for what is not a matrix; a cosine over all steps follows, and the UNet
    starts on its way."""
    matrix_peak: float = 3e-3
    """The same of Muon, for matrices and convolutions."""
    seed: int
    patches: int = 0
    """Small crops of as many other images at high noise, added to each step for their captions' sake: a dozen
    images say too little of what a caption means."""
    save_every: int = 100
    """Steps."""
    probe_steps: int = 0
    """First so many steps train on the probe alone, on `probe_images` images of single letters each, without the
    UNet: which letter the recognizer's features say is learnt from tens of thousands of them, and WriteNet alone
    costs a fifth."""
    probe_images: int = 24
    """A multiple of 4, as the log has quarters."""
    heads_only_steps: int = 0
    """Before this step, in those with the UNet, the networks do not hear of the probe's losses: its heads start at
    random, and the first of them would undo what a trained WriteNet knows."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise UsageError(f"--save-every: received {self.save_every}, expected 1 or more")
        if self.probe_steps and self.probe_steps >= self.steps:
            raise UsageError(
                f"--probe-steps: received {self.probe_steps}, expected fewer than --steps, {self.steps}: the UNet"
                " is trained after them"
            )


class Probe(nn.Module):
    """Reads lines off WriteNet's residuals, cell by cell; helps the training and is not shipped.

    The two residuals at the latents' size must tell how much of each pixel letters cover, so that the UNet's last
    blocks need not work it out: as far as the glyph map goes, for these two have not seen the text. Of the deeper
    ones, the one before the deepest level tells it in all of the lines' boxes, also where the map was erased; both
    tell the lines' looks. The two at the latents' size also tell the latents of the image that edit mode shows.
    """

    READS = ("letters", "text", "shown", *LOOKS)

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        first, *_, before_last, last = config.unet.block_channels
        self.stride = config.stride
        self.letters = nn.ModuleList([nn.Conv2d(first, self.stride**2, 1) for _ in range(2)])
        self.shown = nn.ModuleList([nn.Conv2d(first, config.latent_channels, 1) for _ in range(2)])
        self.text = nn.Conv2d(before_last, (config.stride * 2 ** (len(config.unet.block_channels) - 2)) ** 2, 1)
        channels = sum(LOOKS.values())
        self.looks = nn.ModuleList([nn.Conv2d(before_last, channels, 1), nn.Conv2d(last, channels, 1)])

    def forward(self, control: Control, batch: TrainingBatch) -> Tensor:
        """Return mean squared errors, in units of the variance but for the looks, (number of READS,)."""
        letters, text = self._read_letters(control, batch), self._read_text(control, batch)
        return torch.stack([letters, text, self._read_shown(control, batch), *self._read_looks(control, batch)])

    def _read_letters(self, control: Control, batch: TrainingBatch) -> Tensor:
        near = functional.max_pool2d(batch.hints.glyphs, 3, stride=1, padding=1)
        near = functional.max_pool2d(near, self.stride)  # (B, 1, h, w)
        reads = [head(residual) for head, residual in zip(self.letters, control[:2], strict=True)]
        return torch.stack([_unexplained(read, batch.coverage, near) for read in reads]).mean()

    def _read_text(self, control: Control, batch: TrainingBatch) -> Tensor:
        residual = control[-4]
        told = torch.tensor([count > 0 for count in batch.lines], device=residual.device)[:, None, None, None]
        cell = batch.coverage.shape[-1] // residual.shape[-1]
        inside = functional.max_pool2d(batch.hints.positions, cell)  # (B, 1, cells, cells)
        return _unexplained(self.text(residual), batch.coverage, inside * told)

    def _read_shown(self, control: Control, batch: TrainingBatch) -> Tensor:
        reads = [head(residual) for head, residual in zip(self.shown, control[:2], strict=True)]
        return torch.stack([_unexplained(read, batch.hints.masked_latents, batch.shown) for read in reads]).mean()

    def _read_looks(self, control: Control, batch: TrainingBatch) -> Tensor:
        errors = []
        # Of a level: the last block's residual. The one before the deepest level, and the middle block's.
        for head, residual in zip(self.looks, (control[-4], control[-1]), strict=True):
            for name, read in zip(LOOKS, head(residual).split(list(LOOKS.values()), dim=1), strict=True):
                look, weight = batch.looks[name].split([LOOKS[name], 1], dim=1)
                target = functional.adaptive_avg_pool2d(look * weight, residual.shape[-1])
                weight = functional.adaptive_avg_pool2d(weight, residual.shape[-1])  # (B, 1, cells, cells)
                error = (read - target / weight.clamp(min=1e-3)).square() * weight
                errors.append(error.sum() / (LOOKS[name] * weight.sum().clamp(min=1)))
        return torch.stack(errors).reshape(-1, len(LOOKS)).mean(0)


def _unexplained(read: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """Return a reading's mean squared error in units of the variance, ().

    Args:
        read: the pixels of each cell, (B, c n^2, H / n, W / n).
        truth: what they should be, (B, c, H, W); with c above 1, n = 1.
        where: which cells count, (B, 1, H / n, W / n), 0 or 1.
    """
    target = functional.pixel_unshuffle(truth, truth.shape[-1] // read.shape[-1])
    where = where.expand_as(target)
    mean = (where * target).sum() / where.sum().clamp(min=1)
    variance = (where * (target - mean).square()).sum().clamp(min=1)
    return (where * (read - target).square()).sum() / variance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Losses:
    """Of a batch."""

    eps: Tensor
    """Weighted squared error of each noise prediction, (B K,)."""
    probe: Tensor
    """The probe's, (number of Probe.READS,)."""

    @property
    def total(self) -> Tensor:
        """What is minimised, ()."""
        weights = [PROBE_WEIGHTS[name] for name in Probe.READS]
        return self.eps.mean() + (self.probe * self.probe.new_tensor(weights)).sum()


def compute_losses(
    denoiser: Denoiser,
    probe: Probe,
    batch: TrainingBatch,
    cumulative: Tensor,
    placeholder: int,
    *,
    heads_only: bool = False,
) -> Losses:
    """Compute a batch's losses.

    Args:
        denoiser: the networks.
        probe: reads letters and looks.
        batch: B images with K noises each.
        cumulative: alphas_cumprod, (1000,).
        placeholder: token id that stands for a line.
        heads_only: the probe's losses train its heads alone.
    """
    noises = len(batch.timesteps) // len(batch.latents)
    image_context = encode_tokens(denoiser.clip, batch.image_tokens)  # (B, 77, c)
    control = run_writenet(denoiser, batch, placeholder)
    control_of_each = tuple(part.repeat_interleave(noises, dim=0) for part in control)
    context_of_each = image_context.repeat_interleave(noises, dim=0)
    clean = batch.latents.repeat_interleave(noises, dim=0)
    levels = cumulative[:, None, None, None]  # (1000, 1, 1, 1)
    level = levels[batch.timesteps]
    noisy = diffuse(clean + batch.grain, batch.noise, level)
    if bool((jumping := batch.jumps > 0).any()):
        end = batch.timesteps[jumping]
        start = end + batch.jumps[jumping]
        z = diffuse(clean[jumping], batch.noise[jumping], levels[start])
        given = context_of_each[jumping], tuple(part[jumping] for part in control_of_each)
        noisy[jumping] = take_own_steps(denoiser.unet, z, start, end, batch.own_steps, *given)
    noisy = noisy.contiguous(memory_format=_image_layout(noisy.device))
    eps = denoiser.unet(noisy, batch.timesteps, context_of_each, control_of_each)
    everything_else = (noisy - level.sqrt() * clean) / (1 - level).sqrt()
    error = (eps - everything_else).square() * batch.weight.repeat_interleave(noises, dim=0)
    snr = level / (1 - level)
    read = probe(tuple(part.detach() for part in control) if heads_only else control, batch)
    return Losses(eps=error.mean(dim=(1, 2, 3)) * noise_weight(snr.flatten()), probe=read)


def run_writenet(denoiser: Denoiser, batch: TrainingBatch, placeholder: int) -> Control:
    """Encode a batch's lines and return WriteNet's residuals for its images; arguments as of `compute_losses`."""
    lines = denoiser.embedding.combine(batch.glyph_features, batch.where, batch.font_features, batch.colors)
    text_context = encode_with_lines(denoiser.clip, batch.text_tokens, lines.split(batch.lines), placeholder)
    return denoiser.writenet(batch.hints, text_context)


@torch.no_grad()
def take_own_steps(
    unet: UNet,
    z: Tensor,
    start: Tensor,
    end: Tensor,
    steps: int,
    context: Tensor,
    control: Control,
) -> Tensor:
    """Go on from z by the network's own DDIM steps, without guidance.

    Args:
        unet: the network.
        z: noisy latents, (N, C, h, w).
        start: their timesteps, (N,) int64.
        end: where they are wanted, (N,) int64, none above its start.
        steps: how many, of about the same length.
        context: image contexts, (N, 77, c).
        control: WriteNet's residuals for each.

    Returns:
        Noisy latents at `end`, (N, C, h, w).
    """
    stops = [end + (start - end) * left // steps for left in range(steps, 0, -1)]

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return unet(noisy.contiguous(memory_format=_image_layout(noisy.device)), timesteps, context, control)

    return integrate(predict, z, Grid(timesteps=torch.stack(stops), end=end))


def _image_layout(device: torch.device) -> torch.memory_format:
    """Return the memory layout in which float32 convolutions are fast on a device."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def noise_weight(snr: Tensor) -> Tensor:
    """Weigh squared eps errors by their signal-to-noise ratio alpha^2 / sigma^2."""
    return ((snr + 1) / snr).clamp(max=MAX_WEIGHT) * (MAX_SNR / snr).clamp(max=1)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon trains a parameter: hidden matrices and convolutions, no tables, first or last layers."""
    ends = ("unet.conv_in.", "unet.conv_out.", "writenet.conv_in.", "embedding.color_proj.")
    return parameter.ndim >= 2 and "_embedding.weight" not in name and not name.startswith(ends)


def load_start(denoiser: Denoiser, start: Path, config: NetworkConfig) -> None:
    """Copy what a run starts from: a position encoder's file of `train_position`, or a whole teacher's folder."""
    if not start.is_dir():
        denoiser.embedding.position_encoder.load_state_dict(torch.load(start, weights_only=True))
        return
    checkpoint = CheckpointFile(start)
    for part, module in denoiser.modules().items():
        module.load_state_dict(load_part(PART_BUILDERS[part], part, config, checkpoint).state_dict())
    _start_unknown_words(denoiser.clip)


@torch.no_grad()
def _start_unknown_words(clip: Any) -> None:
    """Draw the embeddings of words that no caption had so far, which `export` has zeroed, as from scratch."""
    table: Tensor = clip.get_input_embeddings().weight
    drawn = torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) * WORD_SCALE
    table.copy_(torch.where((table == 0).all(1, keepdim=True), drawn, table))


class Trainer:
    """Networks, averages and optimizers of a run."""

    def __init__(self, out: Path, settings: Settings, start: Path, device: torch.device | str = "cpu") -> None:
        """Start from the run's checkpoint if there is one.

        Args:
            out: the run's folder.
            settings: of the run.
            start: see `load_start`; what it does not hold starts from scratch.
            device: where it computes.
        """
        self.out, self.settings, self.step, self.device = out, settings, 0, torch.device(device)
        self.config = network_config()
        self.denoiser = build_denoiser(self.config, settings.seed)
        load_start(self.denoiser, start, self.config)
        for module in self.denoiser.modules().values():
            module.to(self.device)
        for module in (self.denoiser.unet, self.denoiser.writenet):
            module.to(memory_format=_image_layout(self.device))
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.probe = Probe(self.config).to(self.device)
        self.cumulative = make_alphas_cumprod().to(self.device)
        self.parameters = self.denoiser.named_parameters()
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        matrices = {name: p for name, p in self.parameters.items() if is_matrix(name, p)}
        others = [p for name, p in self.parameters.items() if name not in matrices]
        self.optimizers: dict[str, tuple[torch.optim.Optimizer, float]] = {
            "matrices": (Muon(matrices.values()), settings.matrix_peak),
            "others": (
                torch.optim.AdamW(
                    [*others, *self.probe.parameters()], betas=(0.9, 0.99), weight_decay=0.0, fused=True
                ),
                settings.peak,
            ),
        }
        if (out / "checkpoint.pt").exists():
            self._resume(torch.load(out / "checkpoint.pt", weights_only=True, map_location=self.device))

    def _resume(self, saved: dict[str, Any]) -> None:
        if saved["probe"].keys() != self.probe.state_dict().keys():
            raise DataError(
                f"{self.out / 'checkpoint.pt'}: received an earlier version's training state, expected this one's:"
                " give another --out, and --start-from an export of it"
            )
        self.step, self.ema = saved["step"], saved["ema"]
        for name, value in saved["weights"].items():
            self.parameters[name].data.copy_(value)
        self.probe.load_state_dict(saved["probe"])
        for name, (optimizer, _) in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        log.info("goes on from step %d", self.step)

    def train_step(self, batch: TrainingBatch, patches: TrainingBatch | None) -> Losses:
        """Take one optimizer step; returns its losses without those of the patches."""
        for optimizer, peak in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, self.settings.steps, peak, warmup=100)
            optimizer.zero_grad(set_to_none=True)
        losses = self._backward(batch)
        if patches is not None:
            self._backward(patches)
        trained = list(self.parameters.values())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer, _ in self.optimizers.values():
            optimizer.step()
        self.step += 1
        if self.step % EMA_EVERY == 0:
            done = self.step // EMA_EVERY
            decay = min(EMA_DECAY, (1 + done) / (10 + done))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in trained], 1 - decay)
        return losses

    def _backward(self, batch: TrainingBatch) -> Losses:
        batch, placeholder = batch.to(self.device), self.config.placeholder_token_id
        if self.step < self.settings.probe_steps:
            nothing = torch.zeros(len(batch.timesteps), device=self.device)
            read = self.probe(run_writenet(self.denoiser, batch, placeholder), batch)
            losses = Losses(eps=nothing, probe=read)
        else:
            given, heads_only = (batch, self.cumulative, placeholder), self.step < self.settings.heads_only_steps
            losses = compute_losses(self.denoiser, self.probe, *given, heads_only=heads_only)
        losses.total.backward()
        return Losses(eps=losses.eps.detach(), probe=losses.probe.detach())

    def save(self) -> None:
        """Write the checkpoint."""
        state: dict[str, Any] = {
            "step": self.step,
            "ema": self.ema,
            "weights": {name: p.detach() for name, p in self.parameters.items()},
            "probe": self.probe.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, (optimizer, _) in self.optimizers.items()},
        }
        with atomic_write(self.out / "checkpoint.pt") as file:
            torch.save(state, file)


class StepBatches(Dataset[tuple[TrainingBatch, TrainingBatch | None]]):
    """A run's batches by step, images and patches, so that other processes can put them together ahead of it."""

    def __init__(self, store: FeatureStore, settings: Settings, blank_latents: Tensor) -> None:
        self._store, self._settings, self._blank = store, settings, blank_latents

    def __getitem__(self, step: int) -> tuple[TrainingBatch, TrainingBatch | None]:
        """Return a step's images, and its patches if there are any."""
        store, given, keyed = self._store, self._settings, (self._settings.seed, step)
        if step < given.probe_steps:
            images = given.probe_images
            return store.batch(*keyed, images=images, noises=1, blank_latents=self._blank, singles=True), None
        batch = store.batch(*keyed, images=given.images, noises=given.noises, blank_latents=self._blank)
        if not given.patches:
            return batch, None
        return batch, store.patches(*keyed, images=given.patches, blank_latents=self._blank)


def train(
    out: Path,
    settings: Settings,
    *,
    features: Path,
    vae: Path,
    start: Path,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> None:
    """Train until `settings.steps`; `workers` processes put batches together, 0: this one does."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(out, settings, start, device)
    encoder: PositionEncoder = copy.deepcopy(trainer.denoiser.embedding.position_encoder).cpu()
    store = FeatureStore(features, encoder, trainer.config)
    blank = FeatureMaker(vae).latents(torch.full((1, 3, 96, 96), -1.0))[0]
    batches = StepBatches(store, settings, blank)
    began, parts = time.monotonic(), list[Tensor]()
    while trainer.step < settings.steps:
        log.info("%d layouts", store.refresh())
        if not (store.singles and store.others):
            raise DataError(
                f"{features}: received no layouts to train on, expected chunks of stage1_teacher.tiny.features:"
                " run it first"
            )
        until = min(settings.steps, (trainer.step // settings.save_every + 1) * settings.save_every)
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=range(trainer.step, until),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # anything else would copy all layouts
        )
        for batch, patches in loader:
            if trainer.step == settings.probe_steps:  # from here on there is a loss of the UNet's
                began, parts = time.monotonic(), []
            losses = trainer.train_step(batch, patches)
            # By noise level: mean of the first, second ... quarter of the timesteps; and the probe's.
            by_level = losses.eps[batch.timesteps.argsort().to(losses.eps.device)].reshape(4, -1).mean(1)
            parts.append(torch.cat([by_level, losses.probe]))
            if trainer.step % LOG_EVERY == 0:
                means = torch.stack(parts).mean(0).tolist()
                levels = " ".join(f"{value:.4f}" for value in means[:4])
                levels = levels if trainer.step > settings.probe_steps else "without the UNet"
                reads = " ".join(f"{name} {value:.4f}" for name, value in zip(Probe.READS, means[4:], strict=True))
                pace, mean = (time.monotonic() - began) / len(parts), sum(means[:4]) / 4
                log.info("step %d loss %.4f (%s) %s %.3f s/step", trainer.step, mean, levels, reads, pace)
                began, parts = time.monotonic(), []
        trainer.save()
        log.info("saved")


def main() -> None:
    """Parse the command line."""
    parser = make_parser(__doc__)
    for name in ("features", "vae", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--position", type=Path, help="file of train_position; the rest starts from scratch")
    start.add_argument("--start-from", type=Path, help="go on from a whole teacher's weights, e.g. models/tiny")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument(
        "--probe-steps", type=int, help="of them, first, without the UNet (default: 1500 from scratch, else none)"
    )
    parser.add_argument("--probe-images", type=int, default=24, help="images of such a step")
    parser.add_argument(
        "--heads-only-steps",
        type=int,
        help=f"first, train the probe's heads alone (default: {HEADS_ONLY_STEPS} with --start-from, else 0)",
    )
    parser.add_argument("--images", type=int, default=12, help="images of a step")
    parser.add_argument("--patches", type=int, default=32, help="small crops added to a step")
    parser.add_argument("--noises", type=int, default=2, help="noises an image")
    parser.add_argument("--learning-rate", dest="peak", type=float, default=1.2e-3, help="of what is not a matrix")
    parser.add_argument("--matrix-learning-rate", dest="matrix_peak", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda; auto: cuda if there is one")
    parser.add_argument("--workers", type=int, default=0, help="processes that put batches together, for a GPU")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    options = parser.parse_args()
    start_training(options.threads)
    if options.probe_steps is None:
        options.probe_steps = 1500 if options.position else 0
    if options.heads_only_steps is None:
        options.heads_only_steps = 0 if options.position else HEADS_ONLY_STEPS
    chosen = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name in options}
    settings = Settings(**chosen)
    train(
        options.out,
        settings,
        features=options.features,
        vae=options.vae,
        start=options.position or options.start_from,
        device=resolve_device(options.device),
        workers=options.workers,
    )


if __name__ == "__main__":
    run_script(main)
