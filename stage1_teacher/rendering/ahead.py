"""Rendering beside the teacher: threads read images and render the inputs that come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

from stage1_teacher.inputs.files import Inputs
from stage1_teacher.inputs.input import InputFailure
from stage1_teacher.rendering.rendered_input import RenderedInput, render_input
from stage1_teacher.rendering.settings import RenderSettings

Outcome = RenderedInput | InputFailure


@contextmanager
def render_ahead(
    inputs: Inputs, indices: Iterable[int], settings: RenderSettings, *, workers: int, ahead: int
) -> Iterator[Iterator[Outcome]]:
    """Render inputs in the given order, some before they are asked for.

    Args:
        inputs: all inputs of the run.
        indices: which to render.
        settings: how.
        workers: threads.
        ahead: rendered inputs kept ready at most; at 512 pixels each holds about 10 MB.

    Yields:
        An iterator over the rendered inputs; one that cannot be rendered is its failure instead.
    """

    def render(index: int) -> Outcome:
        try:
            return render_input(inputs[index], settings)
        except InputFailure as failure:
            return failure

    pool = ThreadPoolExecutor(workers, thread_name_prefix="render")
    rest = iter(indices)
    waiting: deque[Future[Outcome]] = deque(pool.submit(render, index) for index in islice(rest, ahead))

    def outcomes() -> Iterator[Outcome]:
        while waiting:
            outcome = waiting.popleft().result()
            waiting.extend(pool.submit(render, index) for index in islice(rest, 1))
            yield outcome

    try:
        yield outcomes()
    finally:
        pool.shutdown(cancel_futures=True)
