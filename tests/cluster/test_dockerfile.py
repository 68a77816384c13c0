"""The Dockerfile without an engine: linted, and its copies made and run in a scratch folder."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from common.config import PROJECT_ROOT

DOCKERFILE = PROJECT_ROOT / "Dockerfile"


def instructions() -> Iterator[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _space, rest = line.partition(" ")
            yield name, rest.strip()


def is_sent(name: str) -> bool:
    """Tell whether .dockerignore lets a top-level file or folder through: the last rule that fits counts."""
    sent = True
    for rule in (PROJECT_ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch(name, rule.removeprefix("!")):
            sent = rule.startswith("!")
    return sent


def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_pip_reads_was_copied_before_and_the_extras_are_there() -> None:
    present: set[str] = set()
    extras = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = 0
    for name, rest in instructions():
        if name == "COPY":
            present |= {word for word in rest.split()[:-1] if not word.startswith("--")}
        if name != "RUN" or "pip install" not in rest:
            continue
        for command in rest.split("&&"):
            words = shlex.split(command)
            installs += 1
            read = [
                words[place + 1] for place, word in enumerate(words) if word in ("--constraint", "--requirement")
            ]
            assert set(read) <= present
            for word in words:
                if word.startswith(".["):
                    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= present
                    assert set(word[2:-1].split(",")) <= extras.keys()
    assert installs == 3


def test_what_is_copied_is_all_that_the_commands_need(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.fingerprint.json", "anytext2")
    for name, rest in instructions():
        if name != "COPY":
            continue
        *sources, target = [word for word in rest.split() if not word.startswith("--")]
        for source in sources:
            assert is_sent(source), source
            path = PROJECT_ROOT / source
            if path.is_dir() and source == "common":  # anytext2/ is also the network's package
                shutil.copytree(path, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_dir():
                shutil.copytree(path, tmp_path / target, ignore=ignore)
            else:
                shutil.copy(path, tmp_path / target)
    entry = next(json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT")
    assert entry[0] == "python"
    command = [sys.executable, "-P", *entry[1:]]
    for options in (
        ["--help"],
        ["doctor", "--config", "configs/tiny.toml", "--shards", str(tmp_path / "set"), "--inputs", "8"],
    ):
        environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert str(tmp_path / "models") in done.stdout


def test_manifests_and_image_agree_on_the_user() -> None:
    from cluster.kubernetes import FS_GROUP

    assert ("USER", str(FS_GROUP)) in list(instructions())
