"""The configuration's sections: every key, what it means, its default, and what it may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import UsageError


def _require(condition: bool, key: str, received: object, expected: str) -> None:
    if not condition:
        raise UsageError(f"config {key}: received {received!r}, expected {expected}")


def _spread_states(solver_steps: int) -> int:
    """Return the solver steps between kept states: 8, 4, 2 or 1 states, at least 2 steps apart if there are 2."""
    counts = [count for count in (8, 4, 2) if solver_steps % count == 0 and solver_steps >= 2 * count]
    return solver_steps // max(counts, default=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which network, and where its weights lie."""

    network: str = "sd15"
    """"sd15" (the released AnyText2) or a network TOML (see models/tiny/network.toml)."""
    checkpoint: str = ""
    """A .ckpt, a .safetensors, or a folder of .safetensors files, with AnyText2's key names."""
    clip: str = ""
    """Folder of the CLIP tokenizer (vocab.json, merges.txt), e.g. a copy of clip-vit-large-patch14."""
    dtype: str = "float32"
    """Arithmetic of the frozen networks: float32, float16 or bfloat16."""
    device: str = "auto"
    """"auto" (CUDA if there is one), or a torch device such as "cuda:1" or "cpu"."""

    def __post_init__(self) -> None:
        _require(
            self.dtype in ("float32", "float16", "bfloat16"), "model.dtype", self.dtype, "a float type's name"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """How prompts and lines become the teacher's conditioning."""

    prompt_suffix: str = "best quality, extremely detailed"
    """Appended to every image caption after ", "; empty for none."""
    negative_prompt: str = ""
    """Image caption of the unconditional branch."""
    font: str = ""
    """Font file that draws glyph lines and glyph maps."""
    fonts: dict[str, str] = field(default_factory=dict)
    """Further fonts by name, for lines that ask for one."""
    font_hint_prob: float = 1.0
    """Share of lines with a font hint (their look in the image, or as drawn in the font they name), 0 to 1."""

    def __post_init__(self) -> None:
        _require(0 <= self.font_hint_prob <= 1, "teacher.font_hint_prob", self.font_hint_prob, "0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeConfig:
    """What stage one draws and solves."""

    seed: int = 0
    """Keys every random choice, with the input's id and the choice's purpose."""
    size: int = 512
    """Side of the square images, pixels."""
    source: str = "rollout"
    """"rollout" (the teacher's solves) or "noised" (data latents noised at drawn timesteps, for `lcm`)."""
    num_rollouts: int = 1
    """Solves recorded per input, each from its own noise."""
    solver_steps: int = 40
    """DDIM steps of a solve, on the trailing grid."""
    record_every: int = 0
    """Keep every this many-th state; solver_steps must be a multiple. 0 keeps 8, 4, 2 or 1 states, as many as are
    evenly spaced with at least 2 solver steps from one to the next (40 steps: 8 states, every 5th)."""
    guidance_scale: float = 7.5
    """s in eps_u + s (eps_c - eps_u)."""
    batch_size: int = 8
    """Solves run side by side."""
    store_predictions: bool = False
    """Store the one-step predictions x0_cond and x0_uncond (needed by objectives `lcm` and `x0`)."""
    edit_fraction: float = 0.0
    """Share of inputs with an image that are recorded in edit mode, 0 to 1."""
    max_lines: int = 5
    """Lines used of an annotation that has more."""
    max_chars: int = 20
    """Characters used of a line that has more."""
    watermark_threshold: float = 1.0
    """Annotations with a larger wm_score are skipped."""
    use_images: bool = True
    """False leaves annotations' image files alone: no edit mode, no looks of lines as hints, 512 x 512 assumed."""
    random_fonts: bool = False
    """Draw each line in a font chosen from teacher.font and teacher.fonts, where it does not name one."""
    ignore_fields: tuple[str, ...] = ()
    """Further json fields that annotations and prompts may have; they are not read."""
    max_failures: int = 100
    """Failed inputs in one task after which it stops."""
    draw_workers: int = 2
    """Threads that read images and draw while the teacher works."""

    def __post_init__(self) -> None:
        _require(self.source in ("rollout", "noised"), "precompute.source", self.source, '"rollout" or "noised"')
        _require(
            self.size >= 64 and self.size % 8 == 0,
            "precompute.size",
            self.size,
            "a multiple of 8, at least 64",
        )
        for key in (
            "num_rollouts",
            "solver_steps",
            "batch_size",
            "max_lines",
            "max_chars",
            "draw_workers",
        ):
            _require(getattr(self, key) >= 1, f"precompute.{key}", getattr(self, key), "at least 1")
        _require(self.max_lines <= 30, "precompute.max_lines", self.max_lines, "at most 30 (of 77 tokens)")
        _require(self.solver_steps <= 1000, "precompute.solver_steps", self.solver_steps, "at most 1000")
        if self.record_every == 0:
            object.__setattr__(self, "record_every", _spread_states(self.solver_steps))
        _require(
            self.record_every > 0 and self.solver_steps % self.record_every == 0,
            "precompute.record_every",
            self.record_every,
            f"a divisor of precompute.solver_steps ({self.solver_steps})",
        )
        _require(0 <= self.edit_fraction <= 1, "precompute.edit_fraction", self.edit_fraction, "0 to 1")
        _require(self.max_failures >= 0, "precompute.max_failures", self.max_failures, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsConfig:
    """How records are packed, and read."""

    samples_per_shard: int = 256
    """Inputs per shard."""
    window_shards: int = 8
    """Shards whose samples are shuffled together in an epoch's order."""

    def __post_init__(self) -> None:
        for key in ("samples_per_shard", "window_shards"):
            _require(getattr(self, key) >= 1, f"shards.{key}", getattr(self, key), "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How the student is trained."""

    seed: int = 0
    """Keys the order of samples and every draw of rollout, phase and noise."""
    objective: str = "phased"
    """phased, pcm, lcm or x0."""
    num_phases: int = 4
    """M: the steps that the student samples with."""
    loss: str = "huber"
    """"huber" (pseudo-Huber), "l2", or "landing" (error of the landed state)."""
    huber_c: float = 1e-3
    """Pseudo-Huber's c."""
    states: str = "starts"
    """`phased`: train at phase "starts", "all" stored states, or "interpolated" ones
    (Rectified Diffusion)."""
    pcm_target: str = "online"
    """`pcm`: whose value at the next state is the target, the "online" student's or the "ema" one's."""
    guidance_scale: float = 7.5
    """s with which `lcm` and `x0` combine the recorded x0_cond and x0_uncond."""
    lcm_solver_steps: int = 50
    """`lcm`: its solver step is 1000 / this many timesteps long."""
    text_region_weight: float = 1.0
    """Weight of the loss inside `positions`, 1 elsewhere."""
    max_steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 16
    """Samples per rank and forward."""
    gradient_accumulation: int = 1
    """Forwards per optimizer step."""
    learning_rate: float = 1e-4
    """Peak of the schedule."""
    warmup_steps: int = 50
    """Linear warm-up."""
    schedule: str = "constant"
    """After warm-up: "constant" or "cosine" (to zero at max_steps)."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm; 0 for no clipping."""
    mixed_precision: str = "no"
    """accelerate's: "no", "fp16" or "bf16"."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    ema_decay: float = 0.0
    """EMA of the LoRA weights; 0 for none."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    log_every: int = 10
    """Optimizer steps between log lines."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        _require(
            self.objective in ("phased", "pcm", "lcm", "x0"),
            "train.objective",
            self.objective,
            "phased, pcm, lcm or x0",
        )
        _require(self.num_phases >= 1, "train.num_phases", self.num_phases, "at least 1")
        _require(self.loss in ("huber", "l2", "landing"), "train.loss", self.loss, "huber, l2 or landing")
        _require(
            self.states in ("starts", "all", "interpolated"),
            "train.states",
            self.states,
            "starts, all or interpolated",
        )
        _require(self.pcm_target in ("online", "ema"), "train.pcm_target", self.pcm_target, "online or ema")
        if self.objective == "pcm" and self.pcm_target == "ema":
            _require(self.ema_decay > 0, "train.ema_decay", self.ema_decay, 'above 0 with pcm_target = "ema"')
        if self.objective in ("lcm", "x0"):
            _require(
                self.loss != "landing",
                "train.loss",
                self.loss,
                f"huber or l2 with objective {self.objective}",
            )
        _require(
            1 <= self.lcm_solver_steps <= 1000,
            "train.lcm_solver_steps",
            self.lcm_solver_steps,
            "1 to 1000",
        )
        _require(self.guidance_scale > 0, "train.guidance_scale", self.guidance_scale, "above 0")
        _require(self.schedule in ("constant", "cosine"), "train.schedule", self.schedule, "constant or cosine")
        _require(
            self.mixed_precision in ("no", "fp16", "bf16"),
            "train.mixed_precision",
            self.mixed_precision,
            "no, fp16 or bf16",
        )
        for key in (
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        _require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "above 0")
        for key in ("warmup_steps", "weight_decay", "max_grad_norm", "num_workers"):
            _require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "0 or more")
        _require(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 to below 1")
        _require(self.huber_c > 0, "train.huber_c", self.huber_c, "above 0")
        _require(self.text_region_weight > 0, "train.text_region_weight", self.text_region_weight, "above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What is adapted."""

    rank: int = 64
    """Rank of every adapter."""
    alpha: float = 64.0
    """The adapter's output is scaled by alpha / rank."""
    targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
    )
    """UNet modules whose dotted name ends with one of these (AnyText2's AttnX included)."""
    writenet: bool = False
    """Adapt WriteNet too."""
    writenet_targets: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "controlnet_down_blocks.*",
        "controlnet_mid_block",
    )
    """WriteNet modules, likewise; `*` stands for one name part."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        _require(len(self.targets) > 0, "lora.targets", self.targets, "at least one pattern")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """How text accuracy is measured."""

    num_samples: int = 500
    """Held-out layouts: the first this many inputs that can be used."""
    samples_per_layout: int = 1
    """Images of each layout, each from its own noise; AnyText-benchmark has 4."""
    recognizer: str = "ppocr_v4"
    """Reads the images; never the recogniser that conditions the model."""
    batch_size: int = 8
    """Images sampled side by side."""
    seed: int = 0
    """Keys the initial noise, the same for every run compared."""
    keep_images: int = 16
    """Layouts whose first image is kept, for the report."""
    fid_weights: str = ""
    """TorchScript Inception file (inception-2015-12-05.pt): FID. Keeps all images."""
    fid_reference: str = ""
    """Folder of images (.png, .jpg, of any sizes) that FID compares with; empty for the true images of --truth."""
    clip_score_model: str = ""
    """Folder of a CLIP model with its image tower: CLIP score with the caption. Keeps all images."""

    def __post_init__(self) -> None:
        for key in ("num_samples", "samples_per_layout", "batch_size"):
            _require(getattr(self, key) >= 1, f"evaluate.{key}", getattr(self, key), "at least 1")
        _require(self.keep_images >= 0, "evaluate.keep_images", self.keep_images, "0 or more")
