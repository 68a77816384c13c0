from __future__ import annotations

import os
from importlib.metadata import version

import torch

from common.machine import describe_device, describe_machine, installed_versions, resolve_device


def test_only_installed_packages_have_a_version() -> None:
    assert installed_versions(("numpy", "no-such-package")) == {"numpy": version("numpy")}


def test_a_cpu_is_told_apart_by_its_instructions_and_the_machine_by_its_model() -> None:
    assert describe_device(torch.device("cpu")).endswith(f", {os.cpu_count()} cores")
    assert torch.backends.cpu.get_cpu_capability() in describe_device(torch.device("cpu"))
    assert f", {os.cpu_count()} cores" in describe_machine()


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
