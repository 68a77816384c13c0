"""The configuration's sections: every key, what it means, its default, and what it may be."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, field_validator, model_validator
from pydantic_core.core_schema import ValidationInfo

from common.toml import Count, Section, require

Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
"""Any list of strings."""


def _spread_states(solver_steps: int) -> int:
    """Return the solver steps between kept states: 8, 4, 2 or 1 states, at least 2 steps apart if there are 2."""
    counts = [count for count in (8, 4, 2) if solver_steps % count == 0 and solver_steps >= 2 * count]
    return solver_steps // max(counts, default=1)


class ModelConfig(Section):
    """Which network, and where its weights lie."""

    network: str = "sd15"
    """"sd15" (the released AnyText2) or a network TOML (see models/tiny/network.toml)."""
    checkpoint: str = ""
    """A .ckpt, a .safetensors, or a folder of .safetensors files, with AnyText2's key names."""
    clip: str = ""
    """Folder of the CLIP tokenizer (vocab.json, merges.txt), e.g. a copy of clip-vit-large-patch14."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Arithmetic of the frozen networks."""
    device: str = "auto"
    """"auto" (CUDA if there is one), or a torch device such as "cuda:1" or "cpu"."""
    compile: bool = False
    """`precompute` and `train`: compile UNet and WriteNet, once for each shape of a batch. Results differ in
    rounding. What was compiled is kept for later processes, see `common.compiling`."""
    channels_last: bool = False
    """`precompute` and `train`: keep UNet's and WriteNet's weights in the memory order in which a GPU's tensor
    cores convolve. Results differ in rounding."""


class TeacherConfig(Section):
    """What the teacher is told besides what an input says."""

    prompt_suffix: str = "best quality, extremely detailed"
    """Appended to every image caption after ", "; empty for none."""
    negative_prompt: str = ""
    """Image caption of the unconditional branch."""


class InputsConfig(Section):
    """How inputs are read and rendered, by `precompute` and `evaluate` alike."""

    size: Annotated[int, Field(ge=64, multiple_of=8)] = 512
    """Side of the square images, pixels."""
    font: str = ""
    """Font file that renders glyph lines and glyph maps."""
    fonts: dict[str, str] = Field(default_factory=dict)
    """Further fonts by name, for lines that ask for one."""
    fallback_fonts: Names = ()
    """Names of `fonts`, or font files: where a line's font lacks some of its characters, the first of these that
    has all of them renders it. An input with a line that none can render fails."""
    random_fonts: bool = False
    """Render each line in a font chosen from `font` and `fonts`, where it does not name one."""
    font_hint_prob: Share = 1.0
    """Share of lines with a font hint (their look in the image, or as rendered in the font they name), 0 to 1."""
    edit_fraction: Share = 0.0
    """Share of inputs with an image that are recorded in edit mode, 0 to 1."""
    max_lines: Annotated[int, Field(ge=1, le=30)] = 5
    """Lines used of an annotation that has more; 30 fit into a caption's 77 tokens."""
    max_chars: Count = 20
    """Characters used of a line that has more."""
    watermark_threshold: float = 1.0
    """Annotations with a larger wm_score are skipped."""
    use_images: bool = True
    """False leaves annotations' image files alone: no edit mode, no looks of lines as hints."""
    frame: NonNegativeInt = 0
    """Side in pixels of the square that annotations' polygons refer to where no image says: with
    use_images = false, or when images are scored and the annotated one is not there. 0 takes AnyWord's 512."""
    ignore_fields: Names = ()
    """Further json fields that annotations and prompts may have; they are not read."""


class PrecomputeConfig(Section):
    """What stage one solves of each input, and how."""

    seed: int = 0
    """Keys every random choice of a record, the rendering's and the solve's, with the input's id and the choice's
    purpose. One seed for both, so it is here and not in [inputs]."""
    source: Literal["rollout", "noised", "student"] = "rollout"
    """"rollout" (the teacher's solves), "noised" (data latents noised at drawn timesteps, for `lcm`), or "student"
    (a student's own states, each with where the teacher goes from it: what --states-from sets)."""
    num_rollouts: Count = 1
    """Rollouts recorded per input, each from its own noise."""
    solver_steps: Annotated[int, Field(ge=1, le=1000)] = 40
    """DDIM steps of a solve, on the trailing grid."""
    record_every: Annotated[int, Field(ge=0, validate_default=True)] = 0
    """Keep every this many-th state; solver_steps must be a multiple. 0 keeps 8, 4, 2 or 1 states, as many as are
    evenly spaced with at least 2 solver steps from one to the next (40 steps: 8 states, every 5th)."""
    guidance_scale: float = 7.5
    """s in eps_u + s (eps_c - eps_u)."""
    batch_size: Count = 8
    """Inputs encoded side by side, and rollouts solved side by side unless `solve_size` says otherwise."""
    solve_size: NonNegativeInt = 0
    """Rollouts solved side by side, of several batches of inputs if it is larger; 0 takes batch_size. More of them
    keep a large GPU busier. Part of a set's identity where it differs from batch_size."""
    store_predictions: bool = False
    """Store the one-step predictions x0_cond and x0_uncond (needed by objectives `lcm` and `x0`)."""
    max_failures: NonNegativeInt = 100
    """Failed inputs in one task after which it stops."""
    render_workers: Count = 2
    """Threads that read images and render while the teacher works."""

    @property
    def side_by_side(self) -> int:
        """Rollouts solved side by side, with `solve_size` or without."""
        return self.solve_size or self.batch_size

    @property
    def inputs_a_solve(self) -> int:
        """Inputs whose rollouts fill a batch of solves."""
        return -(-self.side_by_side // self.num_rollouts)

    @field_validator("record_every")
    @classmethod
    def _spread(cls, every: int, info: ValidationInfo) -> int:
        return every or _spread_states(info.data.get("solver_steps", 1))

    @model_validator(mode="after")
    def _check(self) -> Self:
        divides = self.solver_steps % self.record_every == 0
        expected = f"a divisor of precompute.solver_steps ({self.solver_steps})"
        require(divides, "record_every", self.record_every, expected)
        return self


class ShardsConfig(Section):
    """How records are packed, and read."""

    samples_per_shard: Count = 256
    """Inputs per shard."""
    window_shards: Count = 8
    """Shards whose samples are shuffled together in an epoch's order."""


class TrainConfig(Section):
    """How the student is trained."""

    seed: int = 0
    """Keys the order of samples and every draw of rollout, phase and noise."""
    objective: Literal["phased", "unrolled", "pcm", "lcm", "x0"] = "phased"
    """What the student is trained towards; docs/training.md has what each needs and costs."""
    num_phases: Count = 4
    """M: the steps that the student samples with."""
    grid: Literal["trailing", "upstream"] = "trailing"
    """Where the student is called: "trailing" (4 steps: 999, 749, 499, 249; diffusers' DDIM), or "upstream"
    (751, 501, 251, 1), so that a merged checkpoint runs in AnyText2's own program: for `phased` and `unrolled`
    with 2, 4 or 8."""
    loss: Literal["huber", "l2", "landing"] = "huber"
    """"huber" (pseudo-Huber), "l2", or "landing" (error of the landed state)."""
    huber_c: PositiveFloat = 1e-3
    """Pseudo-Huber's c."""
    states: Literal["starts", "all", "interpolated"] = "starts"
    """`phased`: train at phase "starts", "all" stored states, or "interpolated" ones
    (Rectified Diffusion)."""
    unrolled_phase_weight: NonNegativeFloat = 0.1
    """`unrolled`: weight of the landings on the way, the last one's being 1; 0 for the last one alone."""
    pcm_target: Literal["online", "ema"] = "online"
    """`pcm`: whose value at the next state is the target, the "online" student's or the "ema" one's."""
    guidance_scale: PositiveFloat = 7.5
    """s with which `lcm` and `x0` combine the recorded x0_cond and x0_uncond."""
    lcm_solver_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """`lcm`: its solver step is 1000 / this many timesteps long."""
    text_region_weight: PositiveFloat = 1.0
    """Weight of the loss inside `positions`, 1 elsewhere."""
    perceptual_weight: NonNegativeFloat = 0.0
    """`phased` and `unrolled`: weight of a second loss, between what the frozen base's down and middle blocks see
    in the landed state and in the teacher's; 0 for none. About a third as much work again."""
    perceptual_text_weight: PositiveFloat = 1.0
    """Weight of that loss inside `positions`, 1 elsewhere."""
    critic_weight: NonNegativeFloat = 0.0
    """`phased` and `unrolled`: weight of a critic, which learns beside the student to tell its landed states from
    the teacher's, by the same features; 0 for none. About a third as much work again."""
    critic_text_weight: NonNegativeFloat = 1.0
    """What the critic asks of landed latents inside `positions` counts so much, 1 elsewhere; 0: it changes no
    letter."""
    critic_learning_rate: PositiveFloat = 3e-3
    """Of the critic's own AdamW."""
    max_steps: Count = 2000
    """Optimizer steps."""
    batch_size: Count = 16
    """Samples per rank and forward."""
    gradient_accumulation: Count = 1
    """Forwards per optimizer step."""
    draws_per_sample: Count = 1
    """States of a sample that are trained on side by side, at different phases as long as there are any left: one
    call of WriteNet for all of them. A forward has batch_size times this many rows."""
    learning_rate: PositiveFloat = 1e-4
    """Peak of the schedule."""
    warmup_steps: NonNegativeInt = 50
    """Linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up: "constant", or "cosine" or "linear" to zero at max_steps."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's norm; 0 for no clipping."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """accelerate's: "no", "fp16" or "bf16"."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    fold_adapters: bool = False
    """Add the adapters to the weights once a step and run the plain network: fewer operations and activations a
    layer, for the gradients of all weights. Results differ in rounding; checkpoints are the same."""
    deterministic: bool = False
    """Choose algorithms that give the same bits in every run, so that a run on a GPU goes on as if it had never
    stopped. Slower."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """EMA of the LoRA weights; 0 for none."""
    num_workers: NonNegativeInt = 2
    """Loader processes per rank; 0 loads in the training process."""
    log_every: Count = 10
    """Optimizer steps between log lines."""
    trackers: Names = ("tensorboard",)
    """Who gets the figures of the log: names that accelerate knows, such as "tensorboard", "wandb", "mlflow" and
    "trackio"; each but TensorBoard is a package to install."""
    tracker_project: str = "anytext2-distill"
    """What these call the project; the run is called by its folder's name."""
    held_out_every: Count = 100
    """Optimizer steps between measurements of the loss on --held-out."""
    held_out_samples: Count = 128
    """Records of it that are measured: the first this many."""
    checkpoint_every: Count = 500
    """Optimizer steps between checkpoints."""
    keep_checkpoints: Count = 3
    """Newest checkpoints kept whole, to go on from."""
    keep_adapters: bool = True
    """Keep the adapters of all older checkpoints too, without what a resumed run needs; else remove these."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.objective == "pcm" and self.pcm_target == "ema":
            require(self.ema_decay > 0, "ema_decay", self.ema_decay, 'above 0 with pcm_target = "ema"')
        if self.objective in ("lcm", "x0"):
            require(self.loss != "landing", "loss", self.loss, f"huber or l2 with objective {self.objective}")
        if self.objective == "unrolled":
            self._check_unrolled()
        if self.grid == "upstream":
            self._check_upstream()
        for key, weight in self._looks.items():
            fits = self.objective in ("phased", "unrolled") and self.states != "interpolated"
            expected = "0 unless the objective is unrolled, or phased at stored states"
            require(not weight or fits, key, weight, expected)
        return self

    @property
    def looks_at_landings(self) -> bool:
        """Whether the frozen base looks at landed states, for the perceptual loss or the critic."""
        return any(self._looks.values())

    @property
    def _looks(self) -> dict[str, float]:
        return {"perceptual_weight": self.perceptual_weight, "critic_weight": self.critic_weight}

    def _check_unrolled(self) -> None:
        met = "with objective unrolled: it walks a whole solve and meets every phase at the student's own states"
        require(self.states == "starts", "states", self.states, f"starts {met}")
        require(self.draws_per_sample == 1, "draws_per_sample", self.draws_per_sample, f"1 {met}")

    def _check_upstream(self) -> None:
        fits = self.objective in ("phased", "unrolled") and self.states != "all"
        received = f"{self.objective}, states = {self.states}"
        expected = 'phased at "starts" or "interpolated" states, or unrolled, with grid = "upstream"'
        require(fits, "objective", received, expected)
        reason = "calls t = 1 on pure noise" if self.num_phases == 1 else "is out of range, or at no stored state"
        expected = f'2, 4 or 8 with grid = "upstream": AnyText2\'s own grid of {self.num_phases} {reason}'
        require(self.num_phases in (2, 4, 8), "num_phases", self.num_phases, expected)


_BLOCKS = (
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
)
"""Ends of the names of what UNet and WriteNet have in common."""


class LoraConfig(Section):
    """What is adapted."""

    rank: Count = 64
    """Rank of every adapter."""
    alpha: PositiveFloat = 64.0
    """The adapter's output is scaled by alpha / rank."""
    targets: Annotated[Names, Field(min_length=1)] = (
        *_BLOCKS,
        "conv_shortcut",
        "time_emb_proj",
    )
    """UNet modules whose dotted name ends with one of these (AnyText2's AttnX included)."""
    writenet: bool = False
    """Adapt WriteNet too."""
    writenet_targets: Names = (
        *_BLOCKS,
        "controlnet_down_blocks.*",
        "controlnet_mid_block",
    )
    """WriteNet modules, likewise; `*` stands for one name part."""


class EvaluateConfig(Section):
    """How text accuracy is measured."""

    num_samples: Count = 500
    """Held-out layouts: the first this many inputs that can be used."""
    samples_per_layout: Count = 1
    """Images of each layout, each from its own noise; AnyText-benchmark has 4."""
    judge: str = "ppocr_v4"
    """Reads the images; never the recognizer that conditions the model."""
    batch_size: Count = 8
    """Images sampled side by side."""
    seed: int = 0
    """Keys the initial noise, the same for every run compared."""
    keep_images: NonNegativeInt = 16
    """Layouts whose first image is kept, for the report."""
    endpoint_error: bool = True
    """Measure every run against the teacher's own solve from the same noise; false spares that solve where the
    teacher is not evaluated. A recorded set (--held-out) brings its solves."""
    fid_weights: str = ""
    """TorchScript Inception file (inception-2015-12-05.pt): FID. Keeps all images."""
    fid_reference: str = ""
    """Folder of images (.png, .jpg, of any sizes) that FID compares with; empty for the true images of --truth."""
    clip_score_model: str = ""
    """Folder of a CLIP model with its image tower: CLIP score with the caption. Keeps all images."""
