from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from common.anytext2.checkpoint import load_denoiser, write_checkpoint
from common.anytext2.checkpoint_file import CheckpointFile
from common.anytext2.conditioning import Conditioning, ConditioningBatch, Uncond
from common.anytext2.denoiser import predict_branches
from common.config import Config, ModelConfig
from common.ddim import CLEAN, Grid, trailing_grid, upstream_grid
from common.errors import DataError, UsageError
from common.schedule import make_alphas_cumprod, trailing_timesteps
from stage1_teacher.rendering.rendered_input import RenderedInput
from stage1_teacher.teacher.solver import Rollout, record_rollout, solve
from stage1_teacher.teacher.teacher import Teacher
from tests.golden_rule import RuleCheckpoint
from tests.small_network import SMALL, TOKENIZER_FOLDER, teacher_checkpoint

SIZE = 32
LONG = "a market street with many signs, " * 14


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.from_checkpoint(SMALL, teacher_checkpoint(), TOKENIZER_FOLDER, negative_prompt="blurry")


def rendered(caption: str, lines: int = 1, mode: str = "generate", seed: int = 0) -> RenderedInput:
    generator = torch.Generator().manual_seed(seed)
    image = 2 * torch.rand(3, SIZE, SIZE, generator=generator) - 1
    positions = torch.zeros(lines, SIZE, SIZE, dtype=torch.uint8)
    for line in range(lines):
        positions[line, 4 + 8 * line : 10 + 8 * line, 3:28] = 1
    return RenderedInput(
        input_id=f"input{seed}",
        caption=caption,
        text_caption="Texts are " + " , ".join("*" * lines) + " . ",
        texts=("x",) * lines,
        languages=("Latin",) * lines,
        polygons=(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)),) * lines,
        colors=torch.full((lines, 3), 500.0),
        in_glyph_map=(True,) * lines,
        mode=mode,
        size=(SIZE, SIZE),
        seed=seed,
        glyphs=(positions.sum(dim=0, keepdim=True) > 0).to(torch.uint8),
        positions=positions,
        glyph_lines=(torch.rand(lines, 1, 80, 512, generator=generator) > 0.8).float(),
        font_hint=torch.zeros(1, SIZE, SIZE),
        masked_image=torch.full((3, SIZE, SIZE), -1.0) if mode == "generate" else image,
        image=image,
    )


@pytest.fixture(scope="module")
def encoded(teacher: Teacher) -> list[Conditioning]:
    return teacher.encode([rendered("a cat"), rendered(LONG, 2, "edit", 1), rendered("a dog", 3, seed=2)])


@pytest.fixture(scope="module")
def uncond(teacher: Teacher) -> Uncond:
    return teacher.unconditional()


def noise(count: int) -> Tensor:
    return torch.randn(count, 6, 8, 8, generator=torch.Generator().manual_seed(5))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    error = float((a.float() - b.float()).norm() / b.float().norm())
    assert error < tolerance, error


def test_an_encoding_has_the_sizes_that_a_record_keeps(encoded: list[Conditioning], uncond: Uncond) -> None:
    assert [len(item.image_context) for item in encoded] == [77, 154, 77]
    for item in encoded:
        assert item.text_context.shape == (77, 32)
        assert item.masked_latents.shape == (6, 8, 8)
        assert item.glyphs.shape == item.positions.shape == (1, SIZE, SIZE)
    assert float(encoded[2].positions.max()) == 1
    assert uncond.image_context.shape == uncond.text_context.shape == (77, 32)


def test_an_input_is_encoded_the_same_alone_and_among_others(
    teacher: Teacher, encoded: list[Conditioning]
) -> None:
    alone = teacher.encode([rendered(LONG, 2, "edit", 1)])[0]
    close(alone.image_context, encoded[1].image_context, 1e-5)
    close(alone.text_context, encoded[1].text_context, 1e-5)
    close(alone.masked_latents, encoded[1].masked_latents, 1e-5)
    assert torch.equal(alone.glyphs, encoded[1].glyphs)


def test_inputs_without_lines_are_encoded_too(teacher: Teacher) -> None:
    assert teacher.encode([rendered("nothing written", 0)])[0].text_context.shape == (77, 32)


def tensors_of(module: nn.Module) -> set[tuple[str, str, int]]:
    return {
        (name, attribute, id(item))
        for name, part in module.named_modules()
        for attribute, value in vars(part).items()
        for item in (value.values() if isinstance(value, dict) else [value])
        if isinstance(item, Tensor)
    }


def test_teacher_and_student_calls_in_any_order_give_the_same_numbers_and_keep_no_tensor(
    teacher: Teacher, encoded: list[Conditioning], uncond: Uncond
) -> None:
    """Upstream keeps WriteNet's result on the model; whose it is depends on who called last."""
    student = load_denoiser(SMALL, teacher_checkpoint()).requires_grad_(True)
    modules = [teacher.denoiser, teacher.vae, teacher.text_encoder.clip, student]
    modules += [teacher.glyph_embedding, teacher.recognizer]
    before = [tensors_of(module) for module in modules]
    z, t = noise(2), torch.tensor([900, 20])
    conditioning = ConditioningBatch.stack(encoded[:2])

    def of_teacher() -> list[Tensor]:
        cond, blank = predict_branches(teacher.denoiser, encoded[:2], uncond)(z, t)
        assert blank is not None
        return [cond, blank]

    def of_student() -> list[Tensor]:
        eps = student(z, t, conditioning)
        eps.square().mean().backward()  # the second backward is where upstream breaks
        return [eps.detach()]

    calls = {"teacher": of_teacher, "student": of_student}
    orders = ("teacher student", "student teacher", "student student", "teacher teacher student")
    seen: dict[str, list[Tensor]] = {}
    for order in orders:
        teacher.encode([rendered("another", seed=9)])
        for who in order.split():
            result = calls[who]()
            expected = seen.setdefault(who, result)
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), order
    student.zero_grad(set_to_none=True)
    assert [tensors_of(module) for module in modules] == before


def run(teacher: Teacher, items: list[Conditioning], uncond: Uncond, **options: object) -> Rollout:
    settings: dict[str, object] = {
        "noise": noise(len(items)),
        "grid": trailing_grid(8),
        "guidance_scale": 3.0,
        "keep": [0, 2, 4, 6],
    }
    return solve(teacher, items, uncond, **{**settings, **options})  # type: ignore[arg-type]


def test_a_rollout_keeps_the_asked_states_and_the_end(
    teacher: Teacher, encoded: list[Conditioning], uncond: Uncond
) -> None:
    rollout = run(teacher, encoded, uncond, store_predictions=True)
    assert rollout.states.shape == (3, 5, 6, 8, 8)
    assert rollout.states.dtype == torch.float16
    assert rollout.timesteps.tolist() == [999, 749, 499, 249]
    assert rollout.x0_cond is not None
    assert rollout.x0_uncond is not None
    assert rollout.x0_cond.shape == rollout.x0_uncond.shape == (3, 4, 6, 8, 8)
    assert torch.equal(rollout.states[:, 0], noise(3).half())


def test_a_solve_goes_on_from_the_recorded_state(
    teacher: Teacher, encoded: list[Conditioning], uncond: Uncond
) -> None:
    whole = run(teacher, encoded, uncond)
    rest = run(
        teacher,
        encoded,
        uncond,
        noise=whole.states[:, 2].float(),
        grid=Grid(timesteps=trailing_timesteps(8)[4:], end=torch.tensor(CLEAN)),
        keep=[0, 2],
    )
    assert torch.equal(rest.states, whole.states[:, 2:])
    unrounded = run(teacher, encoded, uncond, round_states=False)
    assert not torch.equal(unrounded.states[:, -1].half(), whole.states[:, -1])
    close(whole.states, unrounded.states, 5e-3)


def test_a_solve_does_not_depend_on_its_neighbours(
    teacher: Teacher, encoded: list[Conditioning], uncond: Uncond
) -> None:
    together = run(teacher, encoded, uncond, round_states=False)
    for row, item in enumerate(encoded):
        alone = run(teacher, [item], uncond, noise=noise(3)[row : row + 1], round_states=False)
        close(alone.states[0], together.states[row], 1e-4)


def test_rollouts_of_one_input_share_its_writenet_run(
    teacher: Teacher, encoded: list[Conditioning], uncond: Uncond
) -> None:
    a, b = encoded[:2]
    copies = [replace(x) for x in (b, a, b)]
    evaluated: list[int] = []
    handle = teacher.denoiser.writenet.register_forward_pre_hook(
        lambda module, inputs: evaluated.append(len(inputs[0]))
    )
    try:
        shared = run(teacher, [b, a, b], uncond, round_states=False)
        apart = run(teacher, copies, uncond, round_states=False)
    finally:
        handle.remove()
    assert evaluated == [4, 6]  # twice an input: with its text, and without
    close(shared.states, apart.states, 1e-5)


def test_without_guidance_there_is_one_branch(
    teacher: Teacher, encoded: list[Conditioning], uncond: Uncond
) -> None:
    sizes: list[int] = []
    handle = teacher.denoiser.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        single = run(teacher, encoded, uncond, guidance_scale=1.0)
        both = run(teacher, encoded, uncond, guidance_scale=1.0, store_predictions=True)
    finally:
        handle.remove()
    assert sizes == [3] * 8 + [6] * 8
    close(single.states, both.states, 1e-3)


def test_the_trailing_grid_is_diffusers_own(teacher: Teacher, encoded: list[Conditioning], uncond: Uncond) -> None:
    """Stock DDIMScheduler, stepped with the teacher's guided noise, lands where we land."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(4)
    item = encoded[0]
    branches = [ConditioningBatch.stack([one]) for one in (item, item.without(uncond))]
    z = noise(1)
    for t in scheduler.timesteps:
        with torch.no_grad():
            cond, blank = (teacher.denoiser(z, t, branch) for branch in branches)
        z = scheduler.step(blank + 3.0 * (cond - blank), t, z).prev_sample
    ours = run(teacher, [item], uncond, noise=noise(1), grid=trailing_grid(4), keep=[], round_states=False)
    close(ours.states[:, -1], z, 1e-4)


def test_the_exact_noise_of_one_image_leads_to_it_on_both_grids() -> None:
    """A predictor that knows x0 is solved exactly, whatever the number of steps."""
    x0, alphas = torch.linspace(-2, 2, 24).reshape(1, 6, 2, 2), make_alphas_cumprod()

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        alpha = alphas[t].reshape(-1, 1, 1, 1)
        return (z - alpha.sqrt() * x0) / (1 - alpha).sqrt(), None

    for grid, tolerance in ((trailing_grid(5), 1e-5), (upstream_grid(5), 0.05)):
        rollout = record_rollout(
            predict, torch.randn(1, 6, 2, 2), grid, guidance_scale=1.0, keep=[], round_states=False
        )
        close(rollout.states[:, -1], x0, tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("keep", [[0, 1, 2, 3], []])
def test_nan_or_inf_from_the_teacher_stops_the_run(bad: float, keep: list[int]) -> None:
    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        eps = torch.zeros_like(z)
        if int(t[0]) < 600:
            eps[1, 0, 0, 0] = bad
        return eps, None

    with pytest.raises(DataError, match="NaN or Inf .* sample 1 of the batch of 3"):
        record_rollout(predict, noise(3), trailing_grid(4), guidance_scale=1.0, keep=keep, round_states=True)


def whole_checkpoint(path: Path, change: dict[str, Tensor | None] | None = None) -> Path:
    rule: RuleCheckpoint = teacher_checkpoint()
    tensors: dict[str, Tensor | None] = {key: rule.read(key) for key in rule.sorted_keys()}
    tensors.update(change or {})
    write_checkpoint(path, {key: value for key, value in tensors.items() if value is not None})
    return path


def test_a_teacher_loads_from_its_file_and_accounts_for_every_key(
    tmp_path: Path, teacher: Teacher, encoded: list[Conditioning]
) -> None:
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    path = whole_checkpoint(tmp_path / "teacher.ckpt", {ids: torch.arange(77)[None]})
    loaded = Teacher.from_checkpoint(SMALL, CheckpointFile(path), TOKENIZER_FOLDER)
    again = loaded.encode([rendered("a cat")])[0]
    close(again.text_context, encoded[0].text_context, 1e-5)
    for key, value, message in (
        ("embedding_manager.color_proj.0.bias", None, "missing key"),
        ("text_predictor.head.extra", torch.zeros(1), "unknown key"),
        ("logvar", None, "missing key"),
        ("model_ema.decay", torch.zeros(1), "unknown key"),
    ):
        path = whole_checkpoint(tmp_path / "bad.safetensors", {key: value})
        with pytest.raises(DataError, match=f"{message} {key}"):
            Teacher.from_checkpoint(SMALL, CheckpointFile(path), TOKENIZER_FOLDER)


def test_the_full_size_network_without_a_checkpoint_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"model\.checkpoint is empty"):
        Teacher.load(Config(model=ModelConfig(network="sd15")))
