from __future__ import annotations

from pathlib import Path

import pytest

from common.config import PROJECT_ROOT, load_config
from common.errors import DataError, UsageError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_values_come_from_the_file_then_from_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\nmax_steps = 7\nlearning_rate = 1\n[lora]\ntargets = ['to_q']\n")
    config = load_config(path, ["train.max_steps=9", "teacher.font=a b.ttf", "teacher.fonts.serif=s.ttf"])
    assert config.train.max_steps == 9
    assert config.train.learning_rate == 1.0
    assert config.lora.targets == ("to_q",)
    assert config.teacher.font == "a b.ttf"
    assert config.teacher.fonts == {"serif": "s.ttf"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\n", "unknown section [trian]; did you mean train?"),
        ("[train]\nmax_step = 1\n", "unknown key train.max_step; did you mean max_steps?"),
        ("[train]\nmax_steps = 'many'\n", "train.max_steps: received 'many', expected int"),
        ("[train]\nmax_steps = true\n", "expected int"),
        ("[train]\nmax_steps = 0\n", "config train.max_steps: received 0, expected at least 1"),
        ("[precompute]\nsolver_steps = 41\nrecord_every = 5\n", "divisor"),
        ("train = 3\n", "train must be a section"),
        ("[train\n", "config file"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_what_where_and_what_was_expected(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("solver_steps", "every"), [(40, 5), (16, 2), (20, 5), (8, 2), (4, 2), (2, 2), (1, 1), (5, 5), (50, 25)]
)
def test_kept_states_are_spread_evenly_over_any_number_of_solver_steps(solver_steps: int, every: int) -> None:
    config = load_config(None, [f"precompute.solver_steps={solver_steps}"])
    assert config.precompute.record_every == every


@pytest.mark.parametrize("override", ["train.max_steps", "max_steps=3", "=3", "train.=3"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(UsageError, match=r"expected section\.key=value"):
        load_config(None, [override])


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_config(tmp_path / "none.toml")


def test_paths_resolve_against_the_file_then_against_the_project(tmp_path: Path) -> None:
    (tmp_path / "here.txt").touch()
    config = load_config(write(tmp_path, ""))
    assert config.resolve("here.txt", "model.clip") == tmp_path / "here.txt"
    assert config.resolve("pipeline.py", "model.clip") == PROJECT_ROOT / "pipeline.py"
    with pytest.raises(DataError, match=r"config model\.clip: no file or folder 'gone'; looked at"):
        config.resolve("gone", "model.clip")
    with pytest.raises(UsageError, match=r"config model\.clip is empty"):
        config.resolve("", "model.clip")
