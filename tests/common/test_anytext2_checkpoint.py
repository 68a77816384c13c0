from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.anytext2.checkpoint import (
    check_schedule,
    export_state,
    load_unet,
    load_vae,
    load_writenet,
    schedule_buffers,
    write_checkpoint,
)
from common.anytext2.checkpoint_file import CheckpointFile
from common.errors import DataError
from tests.golden_rule import RuleCheckpoint
from tests.small_network import SMALL, base_checkpoint


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    rule = base_checkpoint()
    return {key: rule.read(key) for key in rule.sorted_keys()}


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write a checkpoint of any format by the path's name; a folder gets one file per part."""
    if path.suffix:
        write_checkpoint(path, tensors)
        return path
    path.mkdir()
    for prefix in sorted({key.split(".")[0] for key in tensors}):
        write_checkpoint(
            path / f"{prefix}.safetensors", {k: v for k, v in tensors.items() if k.startswith(prefix + ".")}
        )
    return path


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["teacher.ckpt", "teacher.safetensors", "folder"])
def test_every_format_loads_the_same_network_and_exports_the_same_keys(
    tmp_path: Path, tensors: dict[str, Tensor], name: str
) -> None:
    path = write(tmp_path / name, tensors)
    exported = {
        **export_state(load_unet(SMALL, path), "unet", SMALL),
        **export_state(load_writenet(SMALL, path), "writenet", SMALL),
        **export_state(load_vae(SMALL, path), "vae", SMALL),
    }
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key], tensors[key]) for key in tensors)


def test_a_bare_state_dict_and_the_old_pickle_format_load_too(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "bare.ckpt")
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    expected = load_unet(SMALL, base_checkpoint())
    assert same(load_unet(SMALL, tmp_path / "bare.ckpt"), expected)
    assert same(load_unet(SMALL, tmp_path / "old.ckpt"), expected)


def test_a_loaded_part_is_frozen_in_eval_mode_and_of_the_asked_type() -> None:
    unet = load_unet(SMALL, base_checkpoint(), dtype=torch.bfloat16)
    assert not unet.training
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_loading_one_part_reads_nothing_of_the_others() -> None:
    class Counting(RuleCheckpoint):
        def read(self, key: str) -> Tensor:
            read.append(key)
            return super().read(key)

    read: list[str] = []
    load_writenet(SMALL, Counting(base_checkpoint().shapes))
    assert len(read) == len(set(read)) > 100
    assert all(key.startswith("control_model.") for key in read)


def test_parts_that_are_not_asked_for_may_be_absent(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    only = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    load_unet(SMALL, write(tmp_path / "unet.safetensors", only))


def test_a_loaded_network_does_not_depend_on_the_file_any_more(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for name in ("a.ckpt", "a.safetensors"):
        path = write(tmp_path / name, tensors)
        vae = load_vae(SMALL, path)
        with path.open("r+b") as file:  # in place: a mapped tensor would change with it
            file.write(b"\xff" * path.stat().st_size)
        assert same(vae, load_vae(SMALL, base_checkpoint()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("control_model.fuse_block_za.weight"),
            r"missing key control_model\.fuse_block_za\.weight",
        ),
        (
            lambda t: t.update({"control_model.extra.weight": torch.zeros(1)}),
            r"unknown key control_model\.extra\.weight",
        ),
        (lambda t: t.update({"step": torch.zeros(1)}), "unknown key step"),
        (
            lambda t: t.update({"control_model.time_embed.0.bias": torch.zeros(3)}),
            r"control_model\.time_embed\.0\.bias has shape \(3,\), expected \(64,\)",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_the_key(
    tmp_path: Path, tensors: dict[str, Tensor], change: object, message: str
) -> None:
    changed = dict(tensors)
    change(changed)  # type: ignore[operator]
    path = write(tmp_path / "other.safetensors", changed)
    with pytest.raises(DataError, match=message) as error:
        load_writenet(SMALL, path)
    assert "\n" not in str(error.value)


def test_a_key_in_two_files_of_a_folder_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"betas": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DataError, match="betas is in more than one file"):
        CheckpointFile(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_files_that_are_no_checkpoint_are_one_line_errors(
    tmp_path: Path, tensors: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tensors, tmp_path / "pickle.safetensors")
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + header)
    good = write(tmp_path / "good.safetensors", tensors).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[: len(good) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("hello")
    whole = write(tmp_path / "good.ckpt", tensors).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.ckpt")
    torch.save({"state_dict": {"a": 3}}, tmp_path / "number.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    (tmp_path / "folder").mkdir()
    bad = [path for path in sorted(tmp_path.iterdir()) if not path.name.startswith("good")]
    for path in [*bad, tmp_path / "none.ckpt"]:
        with pytest.raises(DataError) as error:
            CheckpointFile(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value), path
    assert len(bad) == 11
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_checkpoint_cast_to_half_is_on_the_same_schedule(tmp_path: Path, dtype: torch.dtype) -> None:
    cast = {key: value.to(dtype) for key, value in schedule_buffers().items()}
    for name in ("cast.ckpt", "cast.safetensors"):
        check_schedule(CheckpointFile(write(tmp_path / name, cast)))
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)  # another one that is in use, cast too
    cast["alphas_cumprod"] = torch.cumprod(1 - betas, 0).to(dtype)
    with pytest.raises(DataError, match="alphas_cumprod differs by"):
        check_schedule(CheckpointFile(write(tmp_path / "other.safetensors", cast)))


class Callback:
    """As Lightning stores its own beside the weights."""


def test_what_is_no_plain_checkpoint_says_what_it_is_and_what_to_do(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    torch.save({"state_dict": tensors, "callbacks": {"x": Callback()}}, tmp_path / "lightning.ckpt")
    expected = r"lightning\.ckpt holds other objects than tensors \(tests.*\.Callback\)"
    with pytest.raises(DataError, match=expected) as caught:
        CheckpointFile(tmp_path / "lightning.ckpt")
    assert "\n" not in str(caught.value)
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(command.replace("weights.ckpt", str(tmp_path / "weights.ckpt")))  # the remedy, as it is given
    assert CheckpointFile(tmp_path / "weights.ckpt").shapes.keys() == tensors.keys()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 6000000000\n"
    for name in ("a.ckpt", "b.safetensors", "folder/c.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(pointer)
        with pytest.raises(DataError, match=r"git-lfs's pointer to the checkpoint, a text of 75 .*git lfs pull"):
            CheckpointFile((tmp_path / name).parent if "/" in name else tmp_path / name)


def test_the_schedules_buffers_are_the_released_ones_and_others_are_refused(tmp_path: Path) -> None:
    buffers = schedule_buffers()
    assert len(buffers) == 13
    assert all(value.shape == (1000,) and bool(value.isfinite().all()) for value in buffers.values())
    assert abs(float(buffers["betas"][0]) - 0.00085) < 1e-6
    assert abs(float(buffers["betas"][-1]) - 0.012) < 1e-5
    check_schedule(CheckpointFile(write(tmp_path / "good.safetensors", buffers)))
    other = {**buffers, "alphas_cumprod": buffers["alphas_cumprod"] * 0.99}
    with pytest.raises(DataError, match="alphas_cumprod differs"):
        check_schedule(CheckpointFile(write(tmp_path / "other.safetensors", other)))
    del buffers["logvar"]
    with pytest.raises(DataError, match="missing key logvar"):
        check_schedule(CheckpointFile(write(tmp_path / "less.safetensors", buffers)))
