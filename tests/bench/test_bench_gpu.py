"""The benchmark of a GPU, at the smallest size: all of `quick` runs, and values are what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench import bench_gpu
from bench.gpu import parts, training
from bench.gpu.measuring import count_flops
from bench.gpu.parts import AIMS, PARTS, choose
from bench.gpu.place import FULL, Place, make_record
from bench.gpu.rows import Aim, Row, judge, ratio, read_rows, tabulate, write_row
from common.errors import DataError, UsageError


def run(monkeypatch: pytest.MonkeyPatch, place: Place, *names: str) -> list[Row]:
    arguments: Sequence[str] = ("bench_gpu.py", *names, "--out", str(place.out), "--size", "small")
    monkeypatch.setattr("sys.argv", list(arguments))
    bench_gpu.main()
    return read_rows(place.out)


def test_quick_measures_both_stages_as_they_were_and_improved(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row.case: row for row in run(monkeypatch, place, "quick")}
    assert not [row for row in rows.values() if "failed" in row.note or row.is_wrong]
    assert {row.part for row in rows.values()} == {name for name, part in PARTS.items() if part.quick}
    measured = {aim.case for aim in AIMS if aim.case in rows} | {
        aim.baseline for aim in AIMS if aim.baseline in rows
    }
    assert {"precompute, every improvement", training.BEST, training.PEFT} <= measured
    assert (rows["precompute, every improvement"].rate or 0) > 0 < (rows[training.BEST].milliseconds or 0)
    compared = [row for row in rows.values() if row.error is not None]
    assert any(row.error for row in compared)  # not all of them are the same call twice
    table = (place.out / "table.md").read_text()
    assert table == capsys.readouterr().out
    for case in ("matrix product", "gradients, folded against PEFT", "step, ours, eager"):
        assert f"| {case} |" in table
    assert f" x {training.PEFT} |" in table


def test_a_part_by_name_runs_alone_and_what_fails_in_it_is_a_row(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(_place: Place) -> None:
        raise RuntimeError("CUDA error: no luck\nand much more")

    rows = run(monkeypatch, place, "encoding")
    assert {row.part for row in rows} == {"encoding"}
    broken = parts.Part(name="encoding", run=break_down, seconds=1, gib=1)
    monkeypatch.setitem(PARTS, "encoding", broken)
    (row,) = run(monkeypatch, place, "encoding")
    assert row.note == "failed: RuntimeError: CUDA error: no luck"


def test_values_that_differ_too_much_end_the_benchmark_with_an_error(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(place: Place) -> None:
        write_row(place.out, Row(part="encoding", case="a", error=0.5, tolerance=0.1))
        write_row(place.out, Row(part="encoding", case="b", error=float("nan"), tolerance=0.1))

    monkeypatch.setitem(PARTS, "encoding", parts.Part(name="encoding", run=differ, seconds=1, gib=1))
    with pytest.raises(DataError, match="2 values differ by more than they may, the first: a"):
        run(monkeypatch, place, "encoding")


def test_parts_are_chosen_by_name_and_the_most_important_come_first() -> None:
    quick, seconds = choose(["quick"])
    assert [part.name for part in quick] == [name for name, part in PARTS.items() if part.quick] and seconds < 240
    everything, seconds = choose(["all"])
    assert everything == list(PARTS.values()) and seconds < 540
    assert [part.name for part in choose(["profile", "step-best"])[0]] == ["step-best", "profile"]
    with pytest.raises(UsageError, match=r"part 'fast': expected one of quick, all, step-best"):
        choose(["fast"])


def test_every_case_that_an_aim_names_is_measured_by_a_part() -> None:
    """At full size; of the small one's figures there are no aims."""
    sources = " ".join(Path(module.__file__ or "").read_text() for module in (training, parts.solving))
    for aim in AIMS:
        for case in filter(None, (aim.case, aim.baseline)):
            assert (
                case in sources
                or case.replace("40", "{config.precompute.solver_steps}") in sources
                or (
                    case == "step, from shards, 1 workers" and 'f"step, from shards, {workers} workers"' in sources
                )
            )
    assert FULL.rows[1] // 2 == 16


def test_the_full_sizes_settings_and_records_are_those_of_the_released_network(tmp_path: Path) -> None:
    config = Place(tmp_path, FULL).config(*training.FASTEST, *parts.solving.FAST, "precompute.solve_size=16")
    assert config.model.compile and config.train.fold_adapters and config.precompute.side_by_side == 16
    assert (config.train.batch_size, config.lora.rank, config.train.mixed_precision) == (16, 64, "bf16")
    record = make_record(config, 0)
    assert record.rollout_latents.shape == (1, 9, 4, 64, 64) and record.image_context.shape == (77, 768)
    for settings in training.CARDS.values():
        train = Place(tmp_path, FULL).config(*settings).train
        assert train.batch_size * train.gradient_accumulation == 16


def test_rows_become_tables_with_ratios_and_aims(tmp_path: Path) -> None:
    write_row(tmp_path, Row(part="one", case="before", rate=10.0, unit="samples/s", of_matmul=0.1, gib=20.5))
    write_row(tmp_path, Row(part="two", case="after", rate=30.0, unit="samples/s", baseline="before"))
    write_row(tmp_path, Row(part="two", case="equal", error=0.2, tolerance=0.1))
    write_row(tmp_path, Row(part="two", case="broken", note="failed"))
    rows = read_rows(tmp_path)
    assert ratio(rows, "after", "before") == 3 and ratio(rows, "broken", "before") is None
    table = tabulate(rows, ["two", "one"])
    assert table.index("## two") < table.index("## one")
    assert "| after | 30 samples/s | 3.00 x before |  |  |" in table
    assert "| equal |  |  | 2.0e-01 (at most 1e-01) WRONG |  |" in table
    assert "| before | 10 samples/s | 0.100 | 20.5 |" in table
    aims = [
        Aim(what="faster", case="after", baseline="before", least=2.5),
        Aim(what="small", case="before", field="gib", most=20),
        Aim(what="gone", case="none", least=1),
        Aim(what="compared", case="after", baseline="before"),
    ]
    assert judge(rows, aims).splitlines()[2:] == [
        "| faster | at least 2.5 | 3 | met |",
        "| small | at most 20 | 20.5 | missed |",
        "| gone | at least 1 | not measured |  |",
        "| compared |  | 3 |  |",
    ]


def test_arithmetic_is_counted_twice_a_multiplication() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
