from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.anytext2.conditioning import Uncond
from common.errors import DataError
from shards.files.manifest import create_or_check, read_manifest, read_uncond
from shards.files.names import MANIFEST, UNCOND
from tests.shards.builders import IDENTITY, PROVENANCE, flip_bit, join_set, make_uncond


def refuse_to_compute() -> Uncond:
    raise AssertionError("the unconditional contexts were computed again")


def test_the_first_task_creates_and_later_ones_read_without_computing(tmp_path: Path) -> None:
    first, uncond = create_or_check(tmp_path / "new", IDENTITY, PROVENANCE, make_uncond)
    before = (tmp_path / "new" / MANIFEST).read_bytes()
    second, again = create_or_check(tmp_path / "new", IDENTITY, {"host": "another"}, refuse_to_compute)
    assert first == second and first.provenance == PROVENANCE
    assert torch.equal(uncond.image_context, again.image_context)
    assert torch.equal(uncond.text_context, make_uncond().text_context)
    assert (tmp_path / "new" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": "sd15"}, 'model: received "sd15", expected "tiny"'),
        ({"solver": {"steps": 8, "guidance_scale": 9.0}}, "solver.guidance_scale: received 9.0, expected 7.5"),
        ({"solver": {"steps": 8}}, "solver.guidance_scale: received none, expected 7.5"),
        ({"new": 1}, "new: received 1, expected none"),
        ({"fonts": []}, "fonts: received \\[\\]"),
        ({"seed": 0.0}, "seed: received 0.0, expected 0"),
    ],
)
def test_a_task_with_other_settings_refuses_and_names_the_difference(
    tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    join_set(tmp_path)
    with pytest.raises(DataError, match=named):
        create_or_check(tmp_path, {**IDENTITY, **changes}, PROVENANCE, refuse_to_compute)


def test_racing_tasks_agree_on_one_manifest(tmp_path: Path) -> None:
    made = []

    def uncond() -> Uncond:
        made.append(1)
        noise = torch.randn(77, 8).half()  # as on devices that differ
        return Uncond(image_context=noise, text_context=noise)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: create_or_check(tmp_path, IDENTITY, {"n": n}, uncond), range(8)))
    assert len({manifest.identity_sha256 for manifest, _ in results}) == 1
    assert all(torch.equal(results[0][1].image_context, u.image_context) for _, u in results)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, UNCOND]


def test_uncond_left_by_a_run_with_other_settings_is_not_used(tmp_path: Path) -> None:
    create_or_check(tmp_path, {**IDENTITY, "model": "other"}, PROVENANCE, make_uncond)
    (tmp_path / MANIFEST).unlink()  # as if that run had been killed between the two
    with pytest.raises(DataError, match="made with other settings"):
        join_set(tmp_path)


def test_a_killed_first_task_is_continued(tmp_path: Path) -> None:
    whole = join_set(tmp_path)
    (tmp_path / MANIFEST).unlink()
    again, _ = create_or_check(tmp_path, IDENTITY, PROVENANCE, refuse_to_compute)
    assert again == whole


def test_every_bit_of_the_identity_and_of_uncond_is_guarded(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    for name in (MANIFEST, UNCOND):
        path = tmp_path / name
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 7 if name == MANIFEST else 101):
            flip_bit(path, bit)
            try:  # a flip in white space or provenance changes nothing that counts
                received = read_manifest(tmp_path)
                assert received.identity == manifest.identity
                uncond = read_uncond(tmp_path, received)
                assert name == MANIFEST and torch.equal(uncond.image_context, make_uncond().image_context)
            except DataError as error:
                assert name in str(error) or "schema" in str(error)
            path.write_bytes(whole)
        for data in (b"", whole[: len(whole) // 2]):
            path.write_bytes(data)
            with pytest.raises(DataError, match=name):
                read_uncond(tmp_path, read_manifest(tmp_path))
        path.unlink()
        with pytest.raises(DataError, match=name):
            read_uncond(tmp_path, read_manifest(tmp_path))
        path.write_bytes(whole)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    manifest = join_set(tmp_path)
    values = json.loads((tmp_path / MANIFEST).read_bytes())
    values["identity"]["schema"] = 99
    from shards.files.manifest import hash_identity

    values["identity_sha256"] = hash_identity(values["identity"])
    (tmp_path / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match="shard format 99"):
        read_manifest(tmp_path)
    assert manifest.identity["schema"] == 1


@pytest.mark.parametrize(
    "kind, named", [("missing", "no such folder"), ("empty", "an empty folder"), ("other", "not a")]
)
def test_a_folder_without_a_set_says_so(tmp_path: Path, kind: str, named: str) -> None:
    folder = tmp_path / "set"
    if kind != "missing":
        folder.mkdir()
    if kind == "other":
        (folder / "x").touch()
    with pytest.raises(DataError, match=named):
        read_manifest(folder)
