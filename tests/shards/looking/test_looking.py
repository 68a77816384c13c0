"""status, inspect, verify and the contact sheet."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.files import canonical_json
from common.progress import format_seconds
from common.schedule import ddim_step, make_alphas_cumprod
from shards.files.failures import count_by_reason, read_failures
from shards.files.how_made import HowMade
from shards.files.names import COMMAND
from shards.files.tasks import Task, note_path
from shards.looking.contact_sheet import Picture, implied_x0, make_contact_sheet
from shards.looking.inspect import describe_set
from shards.looking.status import read_status
from shards.looking.status_text import format_numbers, format_status, status_values, summarise
from shards.looking.verify import audit
from shards.reading.reader import ShardSet
from shards.writing.writer import ShardWriter
from tests.shards.builders import flip_bit, input_ids, join_set, make_record, write_set

ROOT = Path(__file__).parents[3]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "pipeline.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", [*input_ids(9), "bad1"])
    return tmp_path / "set"


def test_status_counts_what_is_done_in_work_dead_and_failed(folder: Path) -> None:
    manifest = join_set(folder)
    for number in range(3):
        sidecar = folder / f"shard-{number:06d}.json"
        os.utime(sidecar, (1000 + 60 * number,) * 2)
    write_set(folder, [*input_ids(9), "bad1", *input_ids(8, "new")])
    for suffix in ("json", "tar"):
        (folder / f"shard-000004.{suffix}").unlink()
    (folder / ".shard-000004.tar.another-machine.0123456789ab.tmp").write_bytes(b"x")
    os.utime(folder / "shard-000003.json", (1180, 1180))
    with ShardWriter(folder, 4, identity_sha256=manifest.identity_sha256, provenance={}) as writer:
        writer.add(14, make_record("new0004"))
        status = read_status(folder, now=1240)
    assert (status.shards_planned, status.shards_done, status.inputs_planned, status.inputs_done) == (5, 4, 18, 14)
    assert status.shards_in_work == ("shard-000004.tar",) and status.missing == ()
    assert status.leftovers == 1  # another machine's, without a task that lives
    assert status.failures == {"image missing": 1} and status.problems == ()
    assert status.inputs_per_second == pytest.approx(10 / 180) and status.seconds_since_commit == 60
    assert status.seconds_left == pytest.approx(4 * 18)
    text = "\n".join(format_status(status))
    assert "4 of 5 done, 1 in work\n" in text and "left     1 min 12 s" in text and "1 image missing" in text


def test_status_names_what_does_not_count_as_done(folder: Path) -> None:
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000001.tar").write_bytes(b"short")
    (folder / "shard-000002.json").write_bytes(b"")
    status = read_status(folder)
    assert status.shards_done == 0 and status.inputs_per_second is None and status.seconds_left is None
    assert [problem.split(":")[0] for problem in status.problems] == [
        "shard-000000.json", "shard-000001.tar", "shard-000002.json"
    ]  # fmt: skip
    with pytest.raises(DataError, match="no such folder"):
        read_status(folder / "none")


def test_status_names_tasks_and_what_is_missing_with_the_command_that_makes_it(folder: Path) -> None:
    write_set(folder, [*input_ids(9), "bad1", *input_ids(30, "new")])
    for number in (2, 3, 5, 8):
        (folder / f"shard-{number:06d}.json").unlink()
    made = HowMade(
        arguments=["pipeline.py", "precompute", "--num-tasks", "4", "--out", "a b"], folder="/x", num_tasks=4
    )
    with Task(folder, 3, 4) as task:
        task.say(shard="shard-000003.tar", committed=2)
        (folder / COMMAND).write_bytes(canonical_json(dataclasses.asdict(made)))
        status = read_status(folder)
        gone = dataclasses.replace(
            task.note, token="0123456789ab-1", machine="other", host="node7", shard="shard-000005.tar"
        )
        path = note_path(folder, gone.token)
        path.write_bytes(canonical_json(dataclasses.asdict(gone)))
        os.utime(path, (1000, 1000))
        later = read_status(folder)
    assert (status.shards_done, status.shards_in_work, status.missing) == (7, ("shard-000003.tar",), (2, 5, 8))
    assert later.missing == (2, 5, 8)  # a dead node's shard is in nobody's work
    assert [(seen.note.host, seen.alive) for seen in later.tasks if not seen.alive] == [("node7", False)]
    values = json.loads(json.dumps(status_values(later)))
    assert (values["missing"], values["missing_tasks"], values["num_tasks"]) == ([2, 5, 8], [0, 1, 2], 4)
    assert sorted(task["shard"] for task in values["tasks"]) == [3, 5] and not values["complete"]
    text = "\n".join(format_status(later))
    for said in (
        "7 of 11 done, 1 in work, 3 missing",
        "task     3 of 4 on node7: dead",
        "missing  2,5,8",
        "cd /x && python pipeline.py precompute --out 'a b'",
        "--array=0-2 with --num-tasks 4",
    ):
        assert said in text, text
    assert summarise(later) == "7 of 11 shards done, 1 in work by other tasks, 3 missing (2,5,8)"
    assert read_status(folder).tasks[0].note.host == "node7"


def test_a_finished_shards_leftover_is_in_nobodys_work(folder: Path) -> None:
    (folder / ".shard-000001.tar.other-machine.0123456789ab-3.tmp").write_bytes(b"x")
    status = read_status(folder)
    assert status.shards_in_work == () and status.leftovers == 1 and status.is_complete
    assert summarise(status) == "3 of 3 shards done"


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5, 7, 8), "0-2,5,7-8")])
def test_numbers_are_shown_as_slurm_writes_an_array(numbers: tuple[int, ...], text: str) -> None:
    assert format_numbers(numbers) == text


def test_seconds_are_shown_for_people() -> None:
    shown = [format_seconds(s) for s in (0, 59.4, 61, 3600, 7 * 3600 + 720, 3 * 86400 + 4 * 3600)]
    assert shown == ["0 s", "59 s", "1 min 1 s", "1 h 0 min", "7 h 12 min", "3 d 4 h"]


def test_inspect_shows_counts_settings_failures_and_ranges(folder: Path) -> None:
    text = "\n".join(describe_set(ShardSet.open(folder), count_by_reason(read_failures(folder))))
    for shown in ("9 in 3 shards", "1 image missing", f"  {'solver.guidance_scale':<32} 7.5", "device cpu"):
        assert shown in text
    row = next(line for line in text.splitlines() if line.startswith("text_context")).split()
    values = torch.stack([make_record(i).text_context.double() for i in input_ids(9)])
    assert [float(v) for v in row[1:4]] == pytest.approx(
        [float(values.min()), float(values.max()), float(values.square().mean().sqrt())], rel=1e-3
    )
    assert row[4] == f"{values[0].numel():,}"


def test_verify_names_all_damage_of_all_kinds_at_once(folder: Path) -> None:
    assert audit(folder)[1] == []
    flip_bit(folder / "shard-000000.tar", 8 * 600)
    last = ShardSet.open(folder).table(1)[-1].members[-1]
    (folder / "shard-000001.tar").write_bytes((folder / "shard-000001.tar").read_bytes()[: last.offset + 50])
    (folder / "shard-000002.json").unlink()
    flip_bit(folder / "plan" / "000000.txt", 8 * 120)
    shards, found, _unread = audit(folder)
    text = "\n".join(found)
    assert shards is not None
    for named in (
        "shard-000000.tar: sample 000000000, json: crc32c",
        "shard-000001.tar: sample 000000007, positions.png: the file ends",
        "shard-000002.tar: it has no sidecar",
        "000000.txt: the plan is damaged",
    ):
        assert named in text
    flip_bit(folder / "uncond.safetensors", 999)
    assert audit(folder)[0] is None and "uncond" in audit(folder)[1][0]


def test_a_set_in_work_is_no_damage(folder: Path) -> None:
    for suffix in ("json", "tar"):
        (folder / f"shard-000002.{suffix}").unlink()
    assert audit(folder)[1] == []


def test_the_implied_x0_is_where_a_ddim_step_would_land_on_the_next_state() -> None:
    record = make_record("a")
    states, timesteps = record.rollout_latents[0].float(), record.rollout_timesteps
    x0 = implied_x0(states, timesteps)
    alphas = torch.cat([make_alphas_cumprod()[timesteps], torch.ones(1)])
    for step in range(len(timesteps)):
        alpha, sigma = alphas[step].sqrt(), (1 - alphas[step]).sqrt()
        eps = (states[step] - alpha * x0[step]) / sigma
        landed = ddim_step(states[step], eps, alphas[step], alphas[step + 1])
        torch.testing.assert_close(landed, states[step + 1], rtol=1e-4, atol=1e-4)


def test_the_contact_sheet_shows_every_picture_of_every_record() -> None:
    decoded: list[torch.Tensor] = []

    def decode(latents: torch.Tensor) -> list[Picture]:
        decoded.append(latents)
        return [np.full((32, 32, 3), 10 * place + 5, np.uint8) for place in range(len(latents))]

    records = [make_record("a"), make_record("b")]
    sheet = np.asarray(make_contact_sheet(records, decode))
    assert [len(latents) for latents in decoded] == [5, 5]
    assert torch.equal(decoded[1][0], records[1].rollout_latents[0, -1].float())
    height, cell = sheet.shape[0] // 2, sheet.shape[1] // 7
    for row, record in enumerate(records):
        area = sheet[row * height : (row + 1) * height]
        pictures = [area[-32 - 8 : -8, place * cell + 4 : place * cell + 36, 0] for place in range(7)]
        np.testing.assert_array_equal(pictures[0], record.glyphs[0].numpy() * 255)
        np.testing.assert_array_equal(pictures[1], record.positions[0].numpy() * 127)
        assert [int(picture.mean()) for picture in pictures[2:]] == [5, 15, 25, 35, 45]


def test_the_commands_print_exit_and_do_without_torch(folder: Path) -> None:
    done = run("status", "--shards", folder)
    assert done.returncode == 0 and "3 of 3 done" in done.stdout, done.stderr
    done = run("inspect", "--shards", folder)
    assert done.returncode == 0 and "9 in 3 shards" in done.stdout, done.stderr
    done = run("verify", "--shards", folder)
    assert done.returncode == 0 and "sound, 9 samples in 3 shards" in done.stdout, done.stderr
    flip_bit(folder / "shard-000000.tar", 8 * 600)
    done = run("verify", "--shards", folder)
    assert done.returncode == 3 and "sample 000000000, json: crc32c" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: ") and "1 damage found" in done.stderr
    shutil.rmtree(folder)
    assert [run(c, "--shards", folder).returncode for c in ("status", "inspect", "verify")] == [3, 3, 3]


def test_looking_at_a_set_imports_no_torch() -> None:
    code = (
        "import sys, shards.looking.status, shards.looking.inspect, shards.looking.verify;"
        "import shards.looking.finalize, shards.reading.reader, shards.writing.writer;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
