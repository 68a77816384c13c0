"""How a script beside the pipeline ends: the training of the embedded teacher, a benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common.faults import PIPE_CLOSED, explain, output_is_closed, silence_output


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error meant for people ends it with one line and the exit codes of pipeline.py."""
    try:
        main()
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            silence_output()
            raise SystemExit(PIPE_CLOSED) from None
        ending = explain(error)
        if ending is None:
            raise
        message, code = ending
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
        raise SystemExit(code) from None
