"""Trackers: TensorBoard, W&B, MLflow, trackio and others, by the names that accelerate knows them by.

RUN/trackers.json   what the run is called by trackers that choose a name themselves, so that one that goes on is
                    the same run there
"""

from __future__ import annotations

import difflib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from common.config import Config
from common.errors import UsageError, reason
from common.faults import naming, raise_disk_fault
from common.files import canonical_json, write_bytes_atomic

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
"""The name of the tracker, and of its folder in a run's."""
IDS_FILE = "trackers.json"


def require_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and installed.

    Args:
        names: train.trackers.

    Raises:
        UsageError: one is not.
    """
    missing = {str(name) for name in LoggerType} - {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            near = difflib.get_close_matches(name, LOGGER_TYPE_TO_CLASS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(
                f"train.trackers: received {name!r}, expected names among {', '.join(LOGGER_TYPE_TO_CLASS)}{hint}"
            )
        if name in missing:
            raise UsageError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


class Trackers:
    """What a run's figures are sent to, from the main process."""

    def __init__(self, run: Path, config: Config, step: int, *, title: str = "") -> None:
        """Start the trackers.

        Args:
            run: the run's folder.
            config: its train.trackers and train.tracker_project; all of it is told to trackers but TensorBoard.
            step: optimizer steps done; TensorBoard drops what an interrupted run logged after them.
            title: what trackers call the run; "" for its folder's name.

        Raises:
            UsageError: a tracker did not start.
        """
        self._run, self._title = run, title or run.name
        self._trackers: dict[str, GeneralTracker] = {}
        for name in dict.fromkeys(config.train.trackers):
            if name == TENSORBOARD:
                self._trackers[name] = self._start_tensorboard(step)
            else:
                self._trackers[name] = self._start(name, config)

    def _start_tensorboard(self, step: int) -> GeneralTracker:
        tracker = LOGGER_TYPE_TO_CLASS[TENSORBOARD](TENSORBOARD, str(self._run), purge_step=step + 1)
        with naming(self._run / TENSORBOARD):
            tracker.start()
        return tracker

    def _start(self, name: str, config: Config) -> GeneralTracker:
        ids = read_ids(self._run)
        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = (str(self._run),) if kind.requires_logging_directory else ()
        own = ids.get(name) or uuid.uuid4().hex[:12]
        try:
            tracker = kind(
                config.train.tracker_project,
                *folder,
                **_naming_of(name, self._run, self._title, ids.get(name), own),
            )
            tracker.start()
            tracker.store_init_configuration(flat(config.as_dict()))
        except Exception as error:  # each library raises its own
            raise_disk_fault(error)
            raise UsageError(
                f"train.trackers: {name} did not start ({reason(error)}); log in or set it up as its documentation"
                f" says, or leave it out"
            ) from error
        given = tracker.tracker.info.run_id if name == "mlflow" else own
        write_bytes_atomic(self._run / IDS_FILE, canonical_json({**ids, name: given}))
        return tracker

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send figures; a tracker other than TensorBoard that fails is warned of, and gets nothing more.

        Args:
            step: optimizer steps done.
            values: finite numbers by name.
        """
        for name, tracker in list(self._trackers.items()):
            if name == TENSORBOARD:
                with naming(self._run / TENSORBOARD):
                    tracker.log(dict(values), step=step)
                continue
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # training is worth more than what follows it
                logger.warning(
                    "tracker %s failed (%s) and gets nothing more; all figures are in %s's log",
                    *(name, reason(error), self._run),
                )
                del self._trackers[name]

    def close(self) -> None:
        """Let the trackers finish."""
        for name, tracker in self._trackers.items():
            if name == TENSORBOARD:
                with naming(self._run / TENSORBOARD):
                    tracker.finish()
                continue
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("tracker %s did not finish (%s)", name, reason(error))


def _naming_of(name: str, run: Path, title: str, before: str | None, own: str) -> dict[str, Any]:
    """Return how a tracker is told the run's name, and that one that goes on is the same run."""
    if name == "wandb":
        return {"name": title, "id": own, "resume": "allow", "dir": str(run)}
    if name == "trackio":
        return {"name": f"{title}-{own}", "resume": "allow"}
    if name == "mlflow":
        return {"run_name": title, "run_id": before}
    return {}


def read_ids(run: Path) -> dict[str, str]:
    """Return what a run is called by its trackers; empty if it has none, or they cannot be read."""
    try:
        found = json.loads((run / IDS_FILE).read_bytes())
        return {str(name): str(own) for name, own in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | tuple) else value
    return found
