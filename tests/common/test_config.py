from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import common.anytext2.config
import common.cluster_settings
import common.config
import common.sections
from common.anytext2.config import load_network_config
from common.config import PROJECT_ROOT, Config, load_config
from common.errors import DataError, UsageError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_come_from_the_file_then_from_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "[train]\nmax_steps = 7\nlearning_rate = 1\n[lora]\ntargets = ['to_q']\n")
    config = load_config(path, ["train.max_steps=9", "inputs.font=a b.ttf", "inputs.fonts.serif=s.ttf"])
    assert config.train.max_steps == 9
    assert config.train.learning_rate == 1.0
    assert config.lora.targets == ("to_q",)
    assert config.inputs.font == "a b.ttf"
    assert config.inputs.fonts == {"serif": "s.ttf"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\n", "unknown section [trian]; did you mean train?"),
        ("[train]\nmax_step = 1\n", "unknown key train.max_step; did you mean max_steps?"),
        ("[train]\nmax_steps = 'many'\n", "train.max_steps: received 'many', expected int"),
        ("[train]\nmax_steps = true\n", "expected int"),
        ("[train]\nmax_steps = 0\n", "train.max_steps: received 0, expected at least 1"),
        ("[precompute]\nsolver_steps = 41\nrecord_every = 5\n", "divisor"),
        ("train = 3\n", "train must be a section, as in [train]; received 3"),
        ("[train\n", "config file"),
        ("[inputs]\nsize = '64'\n", "inputs.size: received '64', expected int"),
        ("[inputs]\nsize = 64.0\n", "inputs.size: received 64.0, expected int"),
        ("[inputs]\nsize = 65\n", "inputs.size: received 65, expected a multiple of 8"),
        ("[inputs]\nmax_lines = 31\n", "inputs.max_lines: received 31, expected at most 30"),
        ("[inputs]\nuse_images = 1\n", "inputs.use_images: received 1, expected true or false"),
        ("[inputs]\nfont_hint_prob = true\n", "inputs.font_hint_prob: received True, expected a number"),
        ("[inputs]\nfont_hint_prob = nan\n", "inputs.font_hint_prob: received nan, expected a finite number"),
        ("[inputs]\nedit_fraction = 1.5\n", "inputs.edit_fraction: received 1.5, expected at most 1"),
        ("[inputs]\nignore_fields = 'a'\n", "inputs.ignore_fields: received 'a', expected a list"),
        ("[inputs]\nignore_fields = ['a', 2]\n", "inputs.ignore_fields.1: received 2, expected a valid string"),
        ("[inputs]\nfonts = ['a']\n", "inputs.fonts: received ['a'], expected a table"),
        ("[inputs.fonts]\nserif = 1\n", "inputs.fonts.serif: received 1, expected a valid string"),
        ("[train]\nlearning_rate = 0\n", "train.learning_rate: received 0, expected above 0"),
        ("[train]\nema_decay = 1\n", "train.ema_decay: received 1, expected below 1"),
        (
            "[train]\nschedule = 'square'\n",
            "train.schedule: received 'square', expected 'constant', 'cosine' or 'linear'",
        ),
        (
            "[train]\nobjective = 'pcm'\npcm_target = 'ema'\n",
            "train.ema_decay: received 0.0, expected above 0 with",
        ),
        ("[train]\nobjective = 'x0'\nloss = 'landing'\n", "train.loss: received 'landing', expected huber or l2"),
        ("[lora]\ntargets = []\n", "lora.targets: received [], expected 1 or more values"),
        ("source = 'a.toml'\n", "source: received 'a.toml', expected"),
        ("[sources]\n", "unknown section [sources]; known: cluster, evaluate, inputs, lora,"),
    ],
)
def test_a_wrong_file_is_an_error_that_says_what_where_and_what_was_expected(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(write(tmp_path, text))
    assert said in str(caught.value)
    assert str(tmp_path / "run.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_overridden_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[lora]\nrank = 0\n")
    with pytest.raises(UsageError, match=r"^--set: train\.max_steps: received 'ten', expected int$"):
        load_config(path, ["train.max_steps=ten", "lora.rank=4"])
    with pytest.raises(UsageError, match=r"^--set: unknown key train\.max_step; did you mean max_steps\?$"):
        load_config(None, ["train.max_step=1"])
    with pytest.raises(UsageError, match=r"run\.toml: lora\.rank: received 0, expected at least 1$"):
        load_config(path, ["train.max_steps=10"])


def test_a_key_that_moved_says_where_it_is_now(tmp_path: Path) -> None:
    path = write(tmp_path, "[precompute]\nsize = 64\n")
    with pytest.raises(UsageError, match=r"run\.toml: precompute\.size has moved to inputs\.size$"):
        load_config(path)
    with pytest.raises(UsageError, match=r"^--set: teacher\.fonts has moved to inputs\.fonts$"):
        load_config(None, ["teacher.fonts.serif=s.ttf"])
    for former, key in common.config.MOVED.items():
        settings = Config().as_dict()
        (old_section, old_name), (section, name) = former.split("."), key.split(".")
        assert old_name not in settings[old_section]
        assert name in settings[section]


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


def test_settings_are_checked_when_they_are_replaced_and_never_change_in_place() -> None:
    config = Config()
    small = config.replace(inputs=config.inputs.replace(size=64))
    assert (small.inputs.size, config.inputs.size) == (64, 512)
    assert small.replace(inputs=config.inputs) == config
    with pytest.raises(ValidationError, match="multiple of 8"):
        config.inputs.replace(size=65)
    with pytest.raises(ValidationError, match="Extra inputs"):
        config.inputs.replace(sise=64)
    with pytest.raises(ValidationError, match="frozen"):
        config.inputs.size = 64  # type: ignore[misc]


def test_a_configuration_is_plain_json_and_goes_to_other_processes(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "[train]\nguidance_scale = 2\n[lora]\ntargets = ['to_q']\n"))
    values = config.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["lora"]["targets"] == ["to_q"]
    assert json.dumps(values["train"]["guidance_scale"]) == "2.0"
    assert "source" not in values
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(config)).source == config.source


@pytest.mark.parametrize(
    "module", [common.config, common.sections, common.cluster_settings, common.anytext2.config]
)
def test_every_key_is_documented_beneath_itself(module: object) -> None:
    undocumented = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text("utf-8"))):  # type: ignore[attr-defined]
        if not isinstance(node, ast.ClassDef) or node.name in ("Config", "NetworkConfig"):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and not documented:
                undocumented.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert undocumented == []


def test_reading_a_configuration_imports_no_network_library() -> None:
    code = "import sys, common.config; print(sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, check=True)
    assert done.stdout.strip() == b"[]"


SUFFIX = "qualité supérieure, 高清"
"""Neither ASCII nor Latin-1."""


def test_toml_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = write(tmp_path, f'[teacher]\nprompt_suffix = "{SUFFIX}"\n')
    (tmp_path / "network.toml").write_text("scale_factor = 2  # 高清\n", encoding="utf-8")
    code = (
        "import json, locale, sys; from pathlib import Path\n"
        "from common.config import load_config; from common.anytext2.config import load_network_config\n"
        "config = load_config(Path(sys.argv[1])); network = load_network_config(Path(sys.argv[2]))\n"
        "print(json.dumps([locale.getencoding(), config.teacher.prompt_suffix, network.scale_factor]))\n"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "network.toml")]
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=env, capture_output=True, check=True)
    encoding, suffix, factor = json.loads(done.stdout)
    assert encoding.lower() not in ("utf-8", "utf8")  # or this test would show nothing
    assert (suffix, factor) == (SUFFIX, 2.0)


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f'[teacher]\nprompt_suffix = "{SUFFIX}"\n', encoding="utf-8-sig")
    assert load_config(path).teacher.prompt_suffix == SUFFIX
    path.write_text("[vae]\nlatent_channels = 6\n", encoding="utf-8-sig")
    assert load_network_config(path).latent_channels == 6


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[teacher]\nprompt_suffix = "高清"\n', encoding="gbk")
    with pytest.raises(UsageError, match=r"^config file .*run\.toml: 'utf-8' codec .*; save the file as UTF-8$"):
        load_config(path)
