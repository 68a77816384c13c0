from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import DataError, Stopped
from common.layouts import Layout
from common.pictures import Picture
from common.signals import StopFlag
from stage2_student.evaluation.runs import Job
from stage2_student.evaluation.solves import EndpointMeasure, KeptSolves, Solve

LAYOUTS = [Layout(layout_id=f"l{number}", size=(8, 8), lines=()) for number in range(4)]
JOBS: list[Job] = [(layout, 0) for layout in LAYOUTS]


class Solver:
    """Solves a job to latents that its number tells; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, jobs: Sequence[Job]) -> Tensor:
        self.asked += [layout.layout_id for layout, _ in jobs]
        numbers = [float(layout.layout_id[1:]) for layout, _ in jobs]
        return torch.tensor(numbers)[:, None, None, None].expand(-1, 4, 2, 2)


def left_half(jobs: Sequence[Job]) -> Tensor:
    return torch.tensor([[1, 0], [1, 0]]).expand(len(jobs), 1, 2, 2)


def grey(latents: Tensor) -> list[Picture]:
    return [np.full((8, 8, 3), round(100 * float(one.mean())), np.uint8) for one in latents]


def test_a_solve_is_made_once_and_kept(tmp_path: Path) -> None:
    first, second = Solver(), Solver()
    KeptSolves(tmp_path, first, left_half).of(JOBS[:2])
    solves = KeptSolves(tmp_path, second, left_half).of(JOBS[:3])
    assert (first.asked, second.asked) == (["l0", "l1"], ["l2"])
    assert [float(solve.latents.mean()) for solve in solves] == [0, 1, 2]
    assert solves[0].latents.dtype == torch.float16 and solves[0].latents.shape == (4, 2, 2)
    assert solves[0].cells.tolist() == [[[1, 0], [1, 0]]]


def test_what_a_run_of_the_table_solved_is_kept_and_not_made_again(tmp_path: Path) -> None:
    solver = Solver()
    kept = KeptSolves(tmp_path, solver, left_half)
    kept.keep(JOBS[:1], torch.full((1, 4, 2, 2), 7.0))
    kept.keep(JOBS[:1], torch.full((1, 4, 2, 2), 9.0))
    assert float(kept.of(JOBS[:1])[0].latents.mean()) == 7 and solver.asked == []


def test_filling_stops_between_batches_and_goes_on(tmp_path: Path) -> None:
    solver, stop = Solver(), StopFlag()
    kept = KeptSolves(tmp_path, solver, left_half)
    kept.fill(JOBS[:2], 2, stop)
    stop.stop_requested = True
    with pytest.raises(Stopped, match="2 of 4 solves"):
        kept.fill(JOBS, 2, stop)
    kept.fill(JOBS, 1, StopFlag())
    assert solver.asked == ["l0", "l1", "l2", "l3"]
    kept.fill(JOBS, 1, stop)  # nothing is left, so there is nothing to stop


def test_a_damaged_solve_is_named_and_never_used(tmp_path: Path) -> None:
    kept = KeptSolves(tmp_path, Solver(), left_half)
    kept.of(JOBS[:1])
    (path,) = (tmp_path / "solve").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-3], b"", b"\x80" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"l0_0\.safetensors.*remove the file, and evaluate again"):
            kept.of(JOBS[:1])
    path.unlink()
    assert float(kept.of(JOBS[:1])[0].latents.mean()) == 0


def test_a_batch_is_measured_image_by_image(tmp_path: Path) -> None:
    measure = EndpointMeasure(KeptSolves(tmp_path, Solver(), left_half), grey)
    latents = torch.zeros(2, 4, 2, 2)
    latents[0, :, :, 0] = 2.0  # inside the text, where the solve has 0; the second is 1 off everywhere
    first, second = measure(JOBS[:2], latents, grey(latents))
    assert (first.latents.inside, first.latents.outside, first.latents.whole) == (4, 0, 2)
    assert (second.latents.inside, second.latents.outside, second.latents.whole) == (1, 1, 1)
    assert first.psnr == second.psnr == pytest.approx(20 * math.log10(255 / 100))
    (itself,) = measure(JOBS[1:2], torch.ones(1, 4, 2, 2), grey(torch.ones(1, 4, 2, 2)))
    assert (itself.latents.whole, itself.psnr, itself.way) == (0, None, ())


class Recorded:
    """One solve with its states at 999, 499 and the end."""

    def of(self, jobs: Sequence[Job]) -> list[Solve]:
        states = {999: torch.zeros(4, 2, 2), 499: torch.full((4, 2, 2), 1.0), -1: torch.full((4, 2, 2), 2.0)}
        cells = torch.zeros(1, 2, 2, dtype=torch.uint8)
        return [Solve(latents=states[-1].half(), cells=cells, states=states) for _ in jobs]


def test_states_are_measured_where_the_teacher_has_one_of_the_same_timestep() -> None:
    measure = EndpointMeasure(Recorded(), grey, along_the_way=True)
    end = torch.full((1, 4, 2, 2), 2.5)
    states = [(499, torch.full((1, 4, 2, 2), 4.0)), (333, end), (-1, end)]
    (distance,) = measure(JOBS[:1], end, grey(end), states)
    assert [(state.timestep, state.square) for state in distance.way] == [(499, 9.0), (-1, 0.25)]
