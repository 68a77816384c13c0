"""How a script beside the pipeline begins and ends: the training of the embedded teacher, a benchmark."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from common.faults import ending_with_its_pipe, explain, leave


def make_parser(text: str | None) -> argparse.ArgumentParser:
    """Return a script's parser; its help is the module's `text`, as it stands."""
    return argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def start_training(threads: int) -> None:
    """Log progress with the time, and compute in so many threads; 0 for torch's own number."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if threads:
        import torch

        torch.set_num_threads(threads)


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
