"""All checks, in the order in which a run would meet what they look for."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from both_stages.doctor.finding import Finding, examine
from both_stages.doctor.folder import check_folder, check_space
from both_stages.doctor.given import check_checkpoint, check_credentials, check_fonts, check_tokenizer
from both_stages.doctor.machine import check_gpu, check_shared_memory, check_threads
from common.config import Config


def examine_all(
    config: Config, folder: Path, *, inputs: int | None = None, url: str | None = None
) -> Iterator[Finding]:
    """Yield what every check finds.

    Args:
        config: of the run to be.
        folder: the set's, there or not.
        inputs: that the set will have; None for those of its plan.
        url: where its shards are to be copied, or None.
    """
    yield from check_folder(folder)
    yield from examine("space", functools.partial(check_space, folder, config, inputs))
    yield from examine("shared memory", check_shared_memory)
    yield from examine("threads", check_threads)
    yield from examine("checkpoint", functools.partial(check_checkpoint, config))
    yield from examine("tokenizer", functools.partial(check_tokenizer, config))
    yield from examine("fonts", functools.partial(check_fonts, config))
    if url is not None:
        yield from examine("credentials", functools.partial(check_credentials, url))
    yield from examine("GPU", functools.partial(check_gpu, config))


def worst(findings: list[Finding]) -> int:
    """Return the exit code of the first fault, 0 without any."""
    return next((each.exit_code for each in findings if each.level == "fault"), 0)
