from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.sections import InputsConfig
from shards.files.names import INDEX_DIR
from shards.files.plan import extend_plan, read_plan
from shards.files.plan_extension import PlanExtension
from shards.files.tasks import Task
from stage1_teacher.inputs.annotations import Annotations
from stage1_teacher.inputs.files import Inputs, open_inputs
from stage1_teacher.inputs.index import InputIndex
from stage1_teacher.inputs.prompts import Prompts
from stage1_teacher.inputs.table import StoredTable, Table, first_of_equals, order_of, store

SETTINGS = InputsConfig(use_images=False)


def entry(number: int, **changes: object) -> dict[str, object]:
    line = {"text": f"é{number}", "polygon": [[1, 1], [90, 1], [90, 40]], "valid": True}
    return {"img_name": f"{number}.png", "caption": f"sign {number}", "annotations": [line], **changes}


def write(path: Path, *entries: object) -> Path:
    path.write_text(json.dumps({"data_root": ".", "data_list": list(entries)}, ensure_ascii=False))
    return path


def open_all(folder: Path, *annotations: Path, prompts: tuple[Path, ...] = (), limit: int | None = None) -> Inputs:
    with Task(folder, 0, 1) as task:
        return open_inputs(annotations, prompts, SETTINGS, {}, limit, index=InputIndex(folder, task))


def never(*_arguments: object) -> None:
    raise AssertionError("the file was read whole again")


def test_the_second_task_reads_only_the_entries_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {0: 2.0, 1: 0.5, 2: 2.0}  # two are left out
    entries = [entry(number, **({"wm_score": scores[number]} if number in scores else {})) for number in range(40)]
    path = write(tmp_path / "data.json", *entries)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('\n{"caption": "a", "lines": []}\n\n{"caption": "b", "lines": []}')
    plain = open_inputs([path], [prompts], SETTINGS, {})
    first = open_all(tmp_path / "set", path, prompts=(prompts,))
    monkeypatch.setattr(Annotations, "_scan", never)
    monkeypatch.setattr(Prompts, "_scan", never)
    again = open_all(tmp_path / "set", path, prompts=(prompts,))
    assert len(plain) == len(first) == len(again) == 40
    assert np.array_equal(plain.digests(), again.digests())
    for index in range(40):
        assert plain[index] == again[index] and plain.where(index) == again.where(index)
        assert again.find(plain[index].input_id) == plain.find(plain[index].input_id) == index
    assert again.find("0" * 32) is None and again.find("no hash") is None


def test_a_file_that_changed_is_read_anew_and_one_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", entry(0), entry(1))
    about = path.stat()
    inputs = open_all(tmp_path / "set", path)
    write(path, entry(0), entry(7))  # as long as before
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert path.stat().st_size == about.st_size
    inputs = open_all(tmp_path / "set", path)
    assert inputs[0].caption.startswith("sign 0")
    with pytest.raises(DataError, match=r"data\.json: the file changed") as caught:
        inputs[1]
    assert caught.value.exit_code == 3
    assert open_all(tmp_path / "set", path)[1].caption.startswith("sign 7")  # a further run takes it as it is
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="the file changed"):
        inputs[0]


def test_a_limit_ends_the_reading_and_another_one_reads_on(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", *map(entry, range(8)))
    whole = path.read_text()
    path.write_text(whole[:-20])  # wrong at its end, which the first five do not need
    assert len(open_all(tmp_path / "set", path, path, limit=5)) == 5
    with pytest.raises(DataError, match="is the file complete JSON"):
        open_all(tmp_path / "set", path)
    path.write_text(whole)
    assert len(open_all(tmp_path / "set", path)) == 8
    tables = len(list((tmp_path / "set" / INDEX_DIR).iterdir()))
    limited = open_all(tmp_path / "set", path, limit=3)  # the whole file's table has them
    assert len(limited) == 3 and len(list((tmp_path / "set" / INDEX_DIR).iterdir())) == tables
    assert limited.find(Annotations(path, use_images=False).input_id(5)) is None


def test_settings_that_decide_ids_or_which_inputs_there_are_have_tables_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", entry(0, wm_score=0.5), entry(1))
    counts = []
    for settings in (SETTINGS, SETTINGS.replace(watermark_threshold=0.1), SETTINGS):
        with Task(tmp_path / "set", 0, 1) as task:
            index = InputIndex(tmp_path / "set", task)
            counts.append(len(open_inputs([path], [], settings, {}, index=index)))
    assert counts == [2, 1, 2]


def test_a_damaged_table_is_made_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", entry(0), entry(1))
    open_all(tmp_path / "set", path)
    (table,) = (tmp_path / "set" / INDEX_DIR).iterdir()
    for damage in (b"", table.read_bytes()[:-1], b"x" + table.read_bytes()):
        table.write_bytes(damage)
        assert open_all(tmp_path / "set", path)[1].caption.startswith("sign 1")


def open_in_process(folder: Path, path: Path, index: int) -> None:
    scan = Annotations._scan

    def counted(self: Annotations, limit: int | None) -> Table:
        (folder.parent / f"scanned-{index}").touch()
        return scan(self, limit)

    Annotations._scan = counted  # type: ignore[method-assign]
    assert len(open_all(folder, path)) == 30


def test_of_tasks_that_start_together_one_reads_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", *map(entry, range(30)))
    context = multiprocessing.get_context("fork")
    tasks = [context.Process(target=open_in_process, args=(tmp_path / "set", path, index)) for index in range(8)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()
        assert task.exitcode == 0
    assert len(list(tmp_path.glob("scanned-*"))) == 1


def test_rows_are_found_by_id_and_the_first_of_equal_ones_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (500, 16), dtype=np.uint8)
    ids[:, 1:] = 0  # ids that differ in one byte alone, many of them equal
    table = Table()
    for row, digest in enumerate(ids):
        table.add(digest.tobytes().hex(), row * 1000, row, row + 1)
    store(table, tmp_path / "x.table", {"k": 1})
    stored = StoredTable(tmp_path / "x.table")
    first = first_of_equals(ids)
    values = [digest.tobytes() for digest in ids]
    assert first.tolist() == [values.index(value) == row for row, value in enumerate(values)]
    assert [values[row] for row in order_of(ids)] == sorted(values)
    for row, value in enumerate(values):
        assert stored.find(value) == table.find(value) == values.index(value)
        assert stored.where(row) == table.where(row) == (row * 1000, row, row + 1)


def test_a_plan_extended_from_digests_is_the_plan_of_the_same_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 256, (30, 16), dtype=np.uint8)
    ids[7], ids[29] = ids[3], ids[0]
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    for count in (10, 30):
        texts = [digest.tobytes().hex() for digest in ids[:count]]
        expected = extend_plan(tmp_path / "few", texts, 4)
        with PlanExtension(tmp_path / "many", ids[:count], 4, first_of_equals) as extension:
            assert extension.publish()
        with PlanExtension(tmp_path / "many", ids[:count], 4, first_of_equals) as extension:
            assert extension.publish()  # nothing is new
        assert read_plan(tmp_path / "many") == expected
    names = [path.name for path in sorted((tmp_path / "many" / "plan").iterdir())]
    assert names == ["000000.txt", "000001.txt"]
    for name in names:
        assert (tmp_path / "few/plan" / name).read_bytes() == (tmp_path / "many/plan" / name).read_bytes()
