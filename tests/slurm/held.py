"""A process of a job, held in the middle of its work, so that what is to happen to it meets it there."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

_TERM = 1 << (signal.SIGTERM - 1)


class Held(threading.Thread):
    """Stops the precompute of a set (SIGSTOP) as soon as it has committed a shard."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.process = 0
        self.start()

    def run(self) -> None:
        while not any(self.folder.glob("shard-*.json")):
            time.sleep(0.002)
        self.process = find_process(self.folder)
        os.kill(self.process, signal.SIGSTOP)

    def wait(self, seconds: float) -> int:
        """Return the number of the process that is held."""
        self.join(seconds)
        assert self.process, f"nothing was committed in {self.folder}"
        return self.process

    def go_on(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was asked to stop, and let go, by Slurm
            os.kill(self.process, signal.SIGCONT)

    def was_asked_to_stop(self) -> bool:
        """Tell whether SIGTERM waits for the process, or has ended it: with it Slurm sends SIGCONT."""
        try:
            lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return True
        pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
        return any(mask & _TERM for mask in pending) or not any(line.startswith("State:\tT") for line in lines)


def find_process(folder: Path) -> int:
    """Return the python process that works on a set; srun and the batch script have it in their arguments too."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if words[1:3] == [b"pipeline.py", b"precompute"] and str(folder).encode() in words:
                return int(path.parent.name)
    raise AssertionError(f"no process works on {folder}")
