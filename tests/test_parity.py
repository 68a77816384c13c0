from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.errors import DataError
from tests import parity

GOLDEN = Path(__file__).parent / "golden" / "tiny.safetensors"


def test_every_output_of_upstreams_own_code_is_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN), "--tolerance", "5e-5"]) == 0
    printed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    with safe_open(GOLDEN, framework="pt") as file:
        assert printed == {name for name in file.keys() if not name.startswith("in.")}  # noqa: SIM118


def test_a_difference_and_a_tensor_that_nothing_computes_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with safe_open(GOLDEN, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["emb.lines"] = tensors["emb.lines"] * 1.001
    tensors["emb.colors"] = torch.zeros(1)
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    monkeypatch.setattr(parity, "STAGES", (parity.line_embeddings,))
    assert parity.main([str(tmp_path / "other.safetensors")]) == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "9.99e-04  above" in lines["emb.lines"]
    assert "inf  above" in lines["emb.colors"]


def test_a_file_of_another_kind_is_a_data_error(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(DataError, match="golden file"):
            parity.main([str(path)])
