"""One adapter for each phase: each is trained on its own phase, and called in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.phase_adapters import KINDS, StudentOfPhases, _require_phases, _steps, sampled_together, trained_on
from common.errors import UsageError
from common.sections import TrainConfig
from stage2_student.student.sample import LoadedStudent
from stage2_student.training import trainer
from stage2_student.training.phases import even_phases


class Constant(nn.Module):
    """A student that predicts one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.unet, self.writenet, self.value = nn.Identity(), nn.Identity(), value

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        return torch.full_like(noisy_latents, self.value)


def test_each_is_called_in_its_own_phase() -> None:
    together = StudentOfPhases([Constant(1.0), Constant(2.0)], [999, 499])  # type: ignore[list-item]
    z = torch.zeros(3, 4, 2, 2)
    for t, expected in ((999, 1.0), (499, 2.0)):
        assert together(z, torch.full((3,), t), None).unique().tolist() == [expected]


def test_students_of_phases_are_put_together_and_others_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("first", "second", "alone")]
    for path in paths:
        path.touch()

    def load(config: Any, adapter: Path, steps: int | None = None) -> LoadedStudent:
        card: Any = SimpleNamespace(timesteps=(999, 499))
        student: Any = Constant(float(paths.index(adapter)))
        return LoadedStudent(student=student, card=card, device=torch.device("cpu"))

    monkeypatch.setattr(LoadedStudent, "load", staticmethod(load))
    first, second, alone = paths
    with sampled_together({first: [first, second], alone: [alone]}):
        found: Any = [LoadedStudent.load(None, path).student for path in (first, alone)]  # type: ignore[arg-type]
    z, t = torch.zeros(1, 4, 2, 2), torch.tensor([499])
    assert [float(student(z, t, None).mean()) for student in found] == [1.0, 2.0]


def test_each_is_trained_on_its_own_phase_alone() -> None:
    samples, settings = [(0, index) for index in range(30)], {"seed": 0, "num_rollouts": 1, "starts_only": True}
    for phase, start in enumerate((0, 4)):
        with trained_on(phase):
            drawn = trainer.draw(samples, phases=even_phases(8, 2), **settings)  # type: ignore[arg-type]
        assert drawn.state.unique().tolist() == [start]
    assert trainer.draw(samples, phases=even_phases(8, 2), **settings).state.unique().tolist() == [0, 4]  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"objective": "pcm"}, {"states": "all"}, {"grid": "upstream"}], ids=str)
def test_what_does_not_train_one_phase_is_refused(settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(UsageError, match=f"train.{key}: received {settings[key]}, expected"):
        _require_phases(TrainConfig(num_phases=2, **settings))


def test_steps_are_shared_or_not() -> None:
    assert [_steps(kind, 4, 300) for kind in KINDS] == [(300, "300"), (75, "4 x 75"), (300, "4 x 300")]
