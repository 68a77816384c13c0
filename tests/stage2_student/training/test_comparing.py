"""The scripts that compare folded adapters with PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import folded_rounding, loss_curves
from tests.stage2_student.conftest import write_shards
from tests.stage2_student.test_processes import toml_of


def test_loss_curves_of_both_ways_are_compared_with_what_a_seed_changes(
    base_folder: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = write_shards(tmp_path / "held-out", base_folder / "base.safetensors", samples=3)
    (tmp_path / "small.toml").write_text(toml_of(base_folder, num_phases=2, batch_size=2, num_workers=0))
    command = ["loss_curves.py", "--config", str(tmp_path / "small.toml"), "--shards", str(shards)]
    command += [
        "--held-out",
        str(held_out),
        "--seeds",
        "2",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "curves.json"),
    ]
    monkeypatch.setattr("sys.argv", command)
    loss_curves.main()
    curves = json.loads((tmp_path / "curves.json").read_text())
    for loss in loss_curves.LOSSES:
        plain, folded = ([seed[loss]["2"] for seed in curves[name]] for name in ("PEFT", "folded"))
        assert folded == pytest.approx(plain, rel=1e-4) and plain[0] != plain[1]
    assert capsys.readouterr().out.count("gap / spread = ") == 2


def test_the_gap_is_measured_in_what_seeds_change() -> None:
    lines = loss_curves.table_of("loss", [{10: 1.0}, {10: 3.0}], [{10: 1.5}, {10: 2.5}])
    assert lines[1].split() == ["10", "2.00000", "2.00000", "1.41421", "0.500000"]
    assert lines[-1].endswith("gap / spread = 0.354")


def test_what_rounding_leaves_of_an_adapter_is_measured_against_float64(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WIDTH": 64, "ROWS": 16, "SIZES": (0.3,)}.items():
        monkeypatch.setattr(folded_rounding, name, value)
    monkeypatch.setattr("sys.argv", ["folded_rounding.py"])
    folded_rounding.main()
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert [float(cell) for cell in row.split()] == pytest.approx([0.3, *(1.0, 0.0) * 3], abs=0.03)
    weight = folded_rounding.normal("W", 64, 64)
    assert not torch.equal(
        folded_rounding.change_of(weight.clone(), 0.3, fold=True), folded_rounding.exact_change(weight, 0.3)
    )
