"""The commands that make students, figures and the report itself again, for pasting into a shell."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import PROJECT_ROOT, Config
from stage2_student.evaluation.invocation import INVOCATIONS_FILE
from stage2_student.report.data import ReportData, Training

_PROGRAM = ("python", "pipeline.py")
_SECTIONS = ("model", "shards", "train", "lora")
"""What a training run reads of the configuration."""


def commands(data: ReportData, out: Path, title: str) -> list[str]:
    """Return commands in the order in which they are run, in the project's root.

    Args:
        data: of the report.
        out: the page's file.
        title: the page's.
    """
    evaluations = list(dict.fromkeys(_with_python(str(line["command"])) for line in data.invocations))
    if not evaluations:
        evaluations = [f"# how it was evaluated is not known: no {INVOCATIONS_FILE} in {from_root(data.folder)}"]
    return [*map(_train, data.trainings), *evaluations, _report(data, out, title)]


def _train(run: Training) -> str:
    """Return a training command: every value that differs from its default, as the run's folder keeps them."""
    lacks = [name for name, found in (("config.json", run.config), ("shards.json", run.shards)) if not found]
    if run.shards is None or lacks:
        return f"# how {run.name} was trained is not known: no {' and no '.join(lacks)} in {from_root(run.folder)}"
    location = run.shards.location
    words = [*_PROGRAM, "train", *_settings(run.config)]
    words += ["--shards", location if "://" in location else from_root(Path(location))]
    words += ["--exclude-damaged"] if run.shards.excluded else []
    return shlex.join([*words, "--out", from_root(run.folder), "--resume", "auto"])


def _settings(config: Mapping[str, Any]) -> list[str]:
    defaults = Config().as_dict()
    words = []
    for section in _SECTIONS:
        values = config.get(section)
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if value != defaults[section].get(key):
                words += ["--set", f"{section}.{key}={_toml(value)}"]
    return words


def _toml(value: Any) -> str:
    """Write a value as --set takes it; a plain word needs no quotes."""
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z_][\w./-]*", value)
        and value not in ("true", "false", "inf", "nan")
    ):
        return value
    return json.dumps(value, ensure_ascii=False)


def _with_python(command: str) -> str:
    """Put the interpreter before a script, which as a file is not executable."""
    return f"python {command}" if re.match(r"\S+\.py\b|'[^']+\.py'", command) else command


def _report(data: ReportData, out: Path, title: str) -> str:
    words = [*_PROGRAM, "report", "--evaluation", from_root(data.folder)]
    for run in data.trainings:
        words += ["--run", from_root(run.folder)]
    return shlex.join([*words, "--out", from_root(out), "--examples", str(data.num_examples), "--title", title])


def from_root(path: Path) -> str:
    """Write a path as seen from the project's root if it is in there."""
    absolute = path.absolute()
    return str(absolute.relative_to(PROJECT_ROOT) if absolute.is_relative_to(PROJECT_ROOT) else absolute)
