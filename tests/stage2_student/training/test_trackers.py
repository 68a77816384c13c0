"""Where a run's figures go besides its log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    get_available_trackers,
    register_tracker_class,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UsageError
from stage2_student.train import train
from stage2_student.training.runlog import read_log
from tests.stage2_student.conftest import Configure
from tests.stage2_student.test_train import same, weights


class Notebook(GeneralTracker):
    """A tracker of one's own, as accelerate lets one register it: a file of JSON lines beside the run's log."""

    name = "notebook"
    requires_logging_directory = True
    breaks_at = 10**9

    def __init__(self, project: str, folder: str) -> None:
        super().__init__()
        self.project, self.path = project, Path(folder) / "notebook.jsonl"

    @property
    def tracker(self) -> Path:
        return self.path

    def _write(self, what: str, **facts: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"what": what, **facts}) + "\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._write("start", project=self.project, values=values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step is not None and step >= self.breaks_at:
            raise ConnectionError("the server is away")
        self._write("log", step=step, values=values)

    def finish(self) -> None:
        self._write("finish")


@pytest.fixture
def notebook() -> Iterator[type[Notebook]]:
    register_tracker_class(Notebook)
    yield Notebook
    del LOGGER_TYPE_TO_CLASS[Notebook.name]
    Notebook.breaks_at = 10**9


def pages(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "notebook.jsonl").read_text().splitlines()]


def test_trackers_get_the_settings_and_the_figures_of_the_log(
    configure: Configure, shards: Path, tmp_path: Path, notebook: type[Notebook]
) -> None:
    config = configure(max_steps=4, trackers=("tensorboard", "notebook"), tracker_project="signs")
    run = train(config, shards=shards, run=tmp_path / "run").run
    start, *logged, end = pages(run)
    assert (start["what"], start["project"], end["what"]) == ("start", "signs", "finish")
    assert start["values"]["train.max_steps"] == 4 and start["values"]["lora.targets"] == '["to_q", "conv1"]'
    assert [{"step": page["step"], **page["values"]} for page in logged] == read_log(run)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [2, 4]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in read_log(run)]
    )

    plain = train(configure(max_steps=4, trackers=()), shards=shards, run=tmp_path / "plain")
    assert not (plain.run / "tensorboard").exists() and not (plain.run / "trackers.json").exists()
    assert json.loads((run / "trackers.json").read_text()).keys() == {"notebook"}
    again = train(configure(max_steps=4), shards=shards, run=run, resume="auto")  # other trackers: the same run
    assert same(weights(plain), weights(again))


def test_a_tracker_that_fails_on_the_way_is_named_once_and_training_goes_on(
    configure: Configure, shards: Path, tmp_path: Path, notebook: type[Notebook], caplog: pytest.LogCaptureFixture
) -> None:
    notebook.breaks_at = 4
    config = configure(max_steps=6, trackers=("notebook",))
    result = train(config, shards=shards, run=tmp_path / "run")
    assert result.steps == 6 and [line["step"] for line in read_log(result.run)] == [2, 4, 6]
    assert [page["what"] for page in pages(result.run)] == ["start", "log"]
    assert caplog.text.count("tracker notebook failed (the server is away) and gets nothing more") == 1


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything_is_made(
    configure: Configure, shards: Path, tmp_path: Path
) -> None:
    missing = min(set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()})
    for name, message in (
        ("wandbb", "received 'wandbb', expected names among .* did you mean 'wandb'"),
        (missing, f"{missing} is not installed; pip install {missing}, or leave it out"),
    ):
        with pytest.raises(UsageError, match=message):
            train(configure(trackers=("tensorboard", name)), shards=shards, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
