from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from both_stages.diffusers_folder import make_scheduler
from both_stages.exporting import hand_on
from both_stages.sampling import ImageSampler
from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.config import PROJECT_ROOT, Config
from common.ddim import integrate
from common.errors import UsageError
from common.schedule import trailing_timesteps, upstream_timesteps
from pipeline import cli
from stage2_student.student.adapter import adapter_files, find_adapter, load_tensors, read_card
from tests.fresh_student import write_fresh_student
from tests.stage1_teacher.small_teacher import load, write_teacher
from tests.stage2_student.report.crowded import make_evaluation


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    torch.set_num_threads(1)
    return load(write_teacher(tmp_path_factory.mktemp("exporting")), "lora.rank=2")


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose adapter changes what is sampled."""
    folder = tmp_path_factory.mktemp("run")
    write_fresh_student(folder, config)
    for part in folder.glob("*/adapter_model.safetensors"):
        generator = torch.Generator().manual_seed(3)
        tensors = load_file(part)
        moved = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
        save_file(moved, part, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(config: Config, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "student"
    hand_on(config, run, "diffusers-pipeline", out)
    return out


def python(code: str, folder: Path, *path: Path) -> None:
    """Run code where only what is installed, and `path`, can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def blocks(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def test_diffusers_alone_samples_what_we_sample(folder: Path, config: Config, run: Path) -> None:
    code, ours = blocks(folder)
    check = (
        "import importlib.util, sys\n"
        "ours = ('common', 'both_stages', 'stage1_teacher', 'stage2_student')\n"
        "assert not any(map(importlib.util.find_spec, ours)), 'this project can be imported'\n"
        "eps = unet(given['noise'].float(), 499, given['image_context'],"
        " down_block_additional_residuals=control[:-1],"
        " mid_block_additional_residual=control[-1]).sample.detach()\n"
        "from safetensors.torch import save_file\n"
        "save_file({'eps': eps.contiguous(), 'latents': latents.contiguous()}, 'made.safetensors')\n"
        "from transformers import CLIPTextModel, CLIPTokenizer\n"
        "tokens = CLIPTokenizer.from_pretrained('tokenizer')\n"
        "ids = tokens('a storefront with a sign', padding='max_length', max_length=77, return_tensors='pt')\n"
        "clip = CLIPTextModel.from_pretrained('text_encoder')\n"
        "image_context = clip(ids['input_ids']).last_hidden_state\n"
        "assert image_context.shape == given['image_context'].shape\n"
    )
    python(code + check, folder, folder)
    made = load_file(folder / "made.safetensors")
    given = load_file(folder / "example.safetensors")
    sampler = ImageSampler(config, adapter=run)
    student = sampler.student
    conditioning = ConditioningBatch.stack(
        [Conditioning(**{field.name: given[field.name][0] for field in dataclasses.fields(Conditioning)})]
    )
    with torch.no_grad():
        eps = student.student(given["noise"], torch.tensor([499]), conditioning)
    torch.testing.assert_close(made["eps"], eps, rtol=1e-5, atol=1e-5)
    latents = student.latents(conditioning, given["noise"][:, None])
    torch.testing.assert_close(made["latents"], latents, rtol=1e-4, atol=1e-4)
    image, example = (np.asarray(Image.open(folder / name)).astype(int) for name in ("image.png", "example.png"))
    assert np.abs(image - example).max() <= 1
    assert "ImageSampler" in ours


def test_contexts_are_made_as_its_card_says(folder: Path, config: Config, tmp_path: Path) -> None:
    code = blocks(folder)[1].replace('Path("configs/sd15.toml")', f"Path({str(config.source)!r})")
    code = code.replace("(100, 180, 412, 300)", "(8, 16, 56, 40)")
    python(code, tmp_path, PROJECT_ROOT)
    made, given = load_file(tmp_path / "conditioning.safetensors"), load_file(folder / "example.safetensors")
    assert {name: tensor.shape for name, tensor in given.items() if name != "noise"} == {
        name: tensor.shape for name, tensor in made.items()
    }


def test_its_scheduler_walks_the_students_grid(folder: Path) -> None:
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert settings["timestep_spacing"] == "trailing" and settings["set_alpha_to_one"] is True
    assert settings["_class_name"] == "DDIMScheduler" and settings["clip_sample"] is False


@pytest.mark.parametrize("steps", [2, 4, 8])
@pytest.mark.parametrize("grid", ["trailing", "upstream"])
def test_the_scheduler_of_either_grid_takes_our_steps(grid: str, steps: int, run: Path) -> None:
    timesteps = {"trailing": trailing_timesteps, "upstream": upstream_timesteps}[grid](steps)
    card = dataclasses.replace(read_card(run), grid=grid, timesteps=tuple(timesteps.tolist()))
    scheduler = make_scheduler(card)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(card.timesteps)
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    z = noise
    for t in scheduler.timesteps:
        z = scheduler.step(torch.sin(3 * z), t, z).prev_sample
    torch.testing.assert_close(
        z, integrate(lambda z, _: torch.sin(3 * z), noise, card.solve), rtol=1e-4, atol=1e-4
    )


KINDS = {
    "adapter": ("a", "peft", "adapter"),
    "diffusers": ("d/student.safetensors", "diffusers", "adapter"),
    "kohya": ("k/student.safetensors", "diffusers", "adapter"),
    "merged": ("m/student.safetensors", "anytext2", "finetune"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_export_has_a_card_that_a_hub_can_read(kind: str, config: Config, run: Path, tmp_path: Path) -> None:
    name, library, relation = KINDS[kind]
    done = hand_on(config, run, kind, tmp_path / name)
    place = done.files[0] if kind == "adapter" else done.files[0].parent
    card = ModelCard.load(place / "README.md")
    assert card.data.library_name == library and card.data.base_model == "teacher"
    assert card.data.license == "apache-2.0" and "anytext2" in card.data.tags
    assert card.data.to_dict()["base_model_relation"] == relation
    for fact in (done.card.base_fingerprint, done.card.set_hash, "[999, 499]", "pipeline.py sample"):
        assert fact in card.text
    if kind != "merged":
        assert load_tensors(find_adapter(done.files[0])).keys() == load_tensors(run).keys()


def test_the_card_is_no_part_of_the_adapters_identity(config: Config, run: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    hand_on(config, run, "adapter", tmp_path / "a", evaluation=make_evaluation(tmp_path / "evaluation"))
    said = (tmp_path / "a" / "README.md").read_text()
    samples = re.findall(r"!\[.*?\]\((samples/.*?)\)", said)
    assert "## Measured" in said and "| Sen. Acc |" in said and samples
    assert all((tmp_path / "a" / sample).is_file() for sample in samples)
    assert set(adapter_files(tmp_path / "a")) == set(adapter_files(run))
    assert ImageSampler(config, adapter=tmp_path / "a").model == ImageSampler(config, adapter=run).model


def test_a_readme_of_something_else_stays(
    config: Config, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text("mine")
    done = hand_on(config, run, "diffusers", tmp_path / "student.safetensors")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert done.files[-1] == tmp_path / "student.md" and "stays" in caplog.text
    (tmp_path / "README.md").unlink()
    for kind in ("diffusers", "diffusers"):  # the card of the same student may be written again
        assert hand_on(config, run, kind, tmp_path / "student.safetensors").files[-1].name == "README.md"


def test_a_folder_that_is_there_is_not_written_over(config: Config, run: Path, folder: Path) -> None:
    for kind in ("adapter", "diffusers-pipeline"):
        with pytest.raises(UsageError, match="is there already"):
            hand_on(config, run, kind, folder)


def test_the_command_writes_weights_and_card(config: Config, run: Path, tmp_path: Path) -> None:
    arguments = ["--config", config.source, "--adapter", run, "--format", "diffusers", "--base-model", "me/base"]
    result = CliRunner().invoke(
        cli, ["export", *map(str, arguments), "--out", str(tmp_path / "s" / "a.safetensors")]
    )
    assert result.exit_code == 0, result.output
    assert "a.safetensors" in result.output and "README.md" in result.output
    assert ModelCard.load(tmp_path / "s" / "README.md").data.base_model == "me/base"
