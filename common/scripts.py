"""How a script beside the pipeline ends: the training of the embedded teacher, a benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common.faults import ending_with_its_pipe, explain, leave


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error meant for people ends it with one line and the exit codes of pipeline.py."""
    try:
        with ending_with_its_pipe():
            main()
            sys.stdout.flush()
    except Exception as error:
        ending = explain(error)
        if ending is None:
            raise
        message, code = ending
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
        leave(code)
