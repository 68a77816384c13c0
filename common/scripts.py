"""How a script beside the pipeline ends: the training of the embedded teacher, a benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import AppError, explain


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error meant for people ends it with one line and the exit codes of pipeline.py."""
    try:
        main()
    except BrokenPipeError:
        raise
    except (AppError, OSError) as error:
        message, code = explain(error)
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
        raise SystemExit(code) from None
