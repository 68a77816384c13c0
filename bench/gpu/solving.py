"""Stage one's parts: the networks alone, `precompute` beside a bare loop of UNet calls, values of devices."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import devices
from bench.gpu.measuring import Step, alone, count_flops, free, matmul_rate, time_step, time_stream
from bench.gpu.place import Place
from bench.gpu.rows import Row, write_row
from bench.inputs import finish, render_inputs
from common.anytext2.conditioning import Conditioning, ConditioningBatch
from common.anytext2.denoiser import predict_branches
from common.compiling import prepare_networks
from common.config import Config
from stage1_teacher.inputs.files import open_inputs
from stage1_teacher.precompute import precompute
from stage1_teacher.recording import making
from stage1_teacher.recording.making import Maker, repeatable
from stage1_teacher.recording.recorder import Recorder
from stage1_teacher.recording.shard_maker import ShardMaker
from stage1_teacher.rendering.settings import RenderSettings
from stage1_teacher.teacher.teacher import Teacher

FAST = ("model.compile=true", "model.channels_last=true")
BF16_TOLERANCE, EXACT_TOLERANCE = 1e-1, 1e-3
"""Of a network's output: bfloat16 against float32, and float32 on two devices."""
COMPILED_TOLERANCE = 2e-2
"""Of compiled against eager, both in bfloat16."""


def encode(place: Place, config: Config, teacher: Teacher, count: int) -> list[Conditioning]:
    """Encode drawn inputs, as many at a time as `precompute` does."""
    inputs, size = render_inputs(config, place.annotations, count), config.precompute.batch_size
    with alone(place.out):
        return [item for start in range(0, count, size) for item in teacher.encode(inputs[start : start + size])]


class Calls:
    """Calls of UNet and WriteNet on encoded inputs, both branches of guidance side by side."""

    def __init__(self, teacher: Teacher, conditionings: Sequence[Conditioning]) -> None:
        """Prepare what `precompute` prepares once a solve; two rows an input."""
        self._teacher, self._conditionings, count = teacher, list(conditionings), len(conditionings)
        self._predict = predict_branches(teacher.denoiser, self._conditionings, teacher.unconditional())
        latents = conditionings[0].masked_latents
        generator = torch.Generator().manual_seed(0)
        self._z = torch.randn((count, *latents.shape), generator=generator).to(teacher.device)
        self._t = torch.full((count,), 500, device=teacher.device)

    def unet(self) -> Tensor:
        """Predict the noise of all rows, (rows, C, h, w)."""
        cond, uncond = self._predict(self._z, self._t)
        assert uncond is not None
        return torch.cat([cond, uncond])

    @torch.no_grad()
    def writenet(self) -> Tensor:
        """Run WriteNet on all rows; returns its first residual."""
        where = (self._teacher.device, self._teacher.dtype)
        batch = ConditioningBatch.stack([item.to(*where) for item in self._conditionings * 2])
        return self._teacher.denoiser.control(batch)[0]


class Rates:
    """Rows of a part, with the arithmetic of its calls counted once."""

    def __init__(self, place: Place, part: str) -> None:
        """Measure the matrix product."""
        self.place, self.part = place, part
        self.matmul = matmul_rate(place.out, place.size.matmul_side, place.dtype)

    def add(self, case: str, step: Step, rows: int, flops_a_row: float, **more: Any) -> None:
        """Time a step of so many rows and write it down; an error is written down too."""
        try:
            timed = time_step(self.place.out, step, self.place.size.rounds)
        except Exception as error:
            self.fail(case, error)
            return
        rate = rows / timed.seconds
        figures = {"milliseconds": 1000 * timed.seconds, "first_seconds": timed.first, "gib": timed.gib}
        self.note(case, rate, flops_a_row, **figures, **more)

    def note(self, case: str, rate: float, flops_a_row: float, **more: Any) -> None:
        """Write down rows a second."""
        share = rate * flops_a_row / self.matmul
        write_row(
            self.place.out, Row(part=self.part, case=case, rate=rate, unit="rows/s", of_matmul=share, **more)
        )

    def compare(self, case: str, received: Tensor, expected: Tensor, tolerance: float) -> None:
        """Write down how far values are from others."""
        received, expected = received.float().cpu(), expected.float().cpu()
        error = float((received - expected).norm() / expected.norm())
        write_row(self.place.out, Row(part=self.part, case=case, error=error, tolerance=tolerance))

    def fail(self, case: str, error: Exception) -> None:
        """Write down why there is no figure."""
        write_row(self.place.out, Row(part=self.part, case=case, note=describe_failure(error)))


def describe_failure(error: Exception) -> str:
    """Say in a line what went wrong."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"failed: {type(error).__name__}: {first[:200]}"


def solve_today(place: Place) -> None:
    """The networks and `precompute` as they were: eager, 8 inputs at a time; and with what needs no setting."""
    rates, config = Rates(place, "solve-today"), place.config()
    product = Row(part=rates.part, case="matrix product", rate=rates.matmul / 1e12, unit="TFLOP/s")
    write_row(place.out, product)
    teacher = Teacher.load(config)
    least, most = place.size.rows[0], place.size.rows[-1]
    encoded = encode(place, config, teacher, most // 2)
    few = Calls(teacher, encoded[: least // 2])
    with alone(place.out):
        unet_flops, writenet_flops = count_flops(few.unet) / least, count_flops(few.writenet) / least
    for rows in place.size.rows:
        rates.add(f"UNet, eager, {rows} rows", Calls(teacher, encoded[: rows // 2]).unet, rows, unet_flops)
    longer = replace(encoded[0], image_context=torch.cat([encoded[0].image_context] * 2))
    masked = Calls(teacher, [longer, *encoded[1 : least // 2]])
    rates.add(f"UNet, eager, {least} rows, context mask", masked.unet, least, unet_flops)
    rates.add(f"WriteNet, eager, {most} rows", Calls(teacher, encoded).writenet, most, writenet_flops)
    inputs, bare = place.size.inputs // 3 or 1, f"UNet, eager, {least} rows"
    for case, overlaps in (("precompute, as it was", False), ("precompute, eager, work beside the solves", True)):
        time_precompute(rates, case, config, teacher, inputs, unet_flops, baseline=bare, overlaps=overlaps)


def solve_best(place: Place) -> None:
    """`precompute` with every improvement, beside a loop of the same UNet calls and nothing else."""
    rows, part = place.size.rows[1], Rates(place, "solve-best")
    config = place.config(*FAST, f"precompute.solve_size={rows // 2}")
    with preparing(place, config) as maker:
        eager = Teacher.load(config)
        encoded = encode(place, config, eager, rows // 2)
        with alone(place.out):
            calls = Calls(eager, encoded)
            flops, expected = count_flops(calls.unet) / rows, calls.unet()
        teacher = prepare_teacher(maker, eager)
        calls = Calls(teacher, encoded)
        part.compare("UNet, compiled, against eager", calls.unet(), expected, COMPILED_TOLERANCE)
        case, eager_calls = f"UNet, channels_last and compiled, {rows} rows", f"UNet, eager, {rows} rows"
        part.add(case, calls.unet, rows, flops, baseline=eager_calls)
        case = "precompute, every improvement"
        bare = f"bare loop of {config.precompute.solver_steps} calls, the same"
        loop = time_stream(place.out, calls.unet, config.precompute.solver_steps)
        part.note(bare, rows / loop, flops)
        time_precompute(part, case, config, teacher, place.size.inputs, flops, baseline=bare)


def solve_variants(place: Place) -> None:
    """Each improvement alone, and other sizes of calls."""
    rates, base = Rates(place, "solve-variants"), place.size.rows[0]
    for setting in (("model.channels_last=true",), ("model.compile=true",), FAST):
        config = place.config(*setting)
        teacher = Teacher.load(config)
        encoded = encode(place, config, teacher, place.size.rows[-1] // 2)
        flops = count_flops(Calls(teacher, encoded[: base // 2]).unet) / base
        prepare_networks(config.model, teacher.denoiser.unet, teacher.denoiser.writenet)
        name = ", ".join(each.removeprefix("model.").removesuffix("=true") for each in setting)
        for rows in (base, place.size.rows[-1]) if setting == FAST else (base,):
            calls = Calls(teacher, encoded[: rows // 2])
            eager = f"UNet, eager, {rows} rows"
            rates.add(f"UNet, {name}, {rows} rows", calls.unet, rows, flops, baseline=eager)
        del teacher
        free()


def encoding(place: Place) -> None:
    """Encoding a batch of inputs, the recognizer's norms as they are and folded."""
    rates, config = Rates(place, "encoding"), place.config()
    teacher, inputs = Teacher.load(config), render_inputs(config, place.annotations, config.precompute.batch_size)

    def texts() -> Tensor:
        return torch.stack([item.text_context for item in teacher.encode(inputs)])

    def add(case: str, baseline: str = "") -> None:
        timed = time_step(place.out, texts, place.size.rounds)
        figures = {"rate": len(inputs) / timed.seconds, "milliseconds": 1000 * timed.seconds}
        row = Row(part=rates.part, case=case, unit="inputs/s", baseline=baseline, **figures)  # type: ignore[arg-type]
        write_row(place.out, row)

    add("encoding, as it was")
    expected = texts()
    teacher.recognizer.fold_norms()
    teacher.glyph_embedding.font_predictor.fold_norms()
    add("encoding, folded norms", "encoding, as it was")
    tolerance = BF16_TOLERANCE if place.dtype == torch.bfloat16 else 1e-4
    rates.compare("text's context, folded norms against as it was", texts(), expected, tolerance)


def compare_devices(place: Place) -> None:
    """Each network's output on the GPU against float32 on the CPU; without a GPU, of bfloat16."""
    rates, config = Rates(place, "devices"), place.config()
    rendered = devices.draw(config)
    reference = devices.compute(devices.load(config, "cpu", "float32"), rendered, {})
    device, types = "cpu", {"bfloat16": BF16_TOLERANCE}
    if torch.cuda.is_available():
        device, types = "cuda", {"float32": EXACT_TOLERANCE, **types}
    for dtype, tolerance in types.items():
        with devices.tf32(False):
            found = devices.compute(devices.load(config, device, dtype), rendered, reference)
        for name, value in found.items():
            rates.compare(f"{name}, {device} {dtype} against CPU float32", value, reference[name], tolerance)
        free()


# Running `precompute`.


@contextmanager
def preparing(place: Place, config: Config) -> Iterator[Maker]:
    """Make a maker as `precompute` does, under its settings of cuDNN."""
    settings = RenderSettings.from_config(config)
    inputs = open_inputs([place.annotations], [], config.inputs, settings.fonts)
    with repeatable():
        yield Maker(config=config, settings=settings, inputs=inputs, folder=place.out)


def prepare_teacher(maker: Maker, teacher: Teacher) -> Teacher:
    """Let a maker prepare a teacher that is loaded already."""
    load = Teacher.load
    Teacher.load = staticmethod(lambda _config: teacher)  # type: ignore[method-assign, assignment]
    try:
        return maker.teacher
    finally:
        Teacher.load = load  # type: ignore[method-assign]


def time_precompute(
    rates: Rates,
    case: str,
    config: Config,
    teacher: Teacher,
    inputs: int,
    flops: float,
    *,
    baseline: str,
    overlaps: bool = True,
) -> None:
    """Run `precompute` with a prepared teacher, warm; counted is the making of its shards, writing included."""
    run = partial(_time_shards, rates.place, config, teacher, overlaps)
    try:
        run(config.precompute.inputs_a_solve)
        seconds = run(inputs)
    except Exception as error:
        rates.fail(case, error)
        return
    rows = inputs * config.precompute.num_rollouts * 2 * config.precompute.solver_steps
    gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    rates.note(case, rows / seconds, flops, baseline=baseline, gib=gib)


def _time_shards(place: Place, config: Config, teacher: Teacher, overlaps: bool, inputs: int) -> float:
    seconds = 0.0
    make_all, own = ShardMaker.make_all, Maker.__dict__["teacher"]

    def timed(*arguments: Any) -> None:
        nonlocal seconds
        finish()
        with alone(place.out):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            before = time.perf_counter()
            make_all(*arguments)
            finish()
            seconds = time.perf_counter() - before

    out = Path(tempfile.mkdtemp(dir=place.out))
    ShardMaker.make_all, Maker.teacher = timed, teacher  # type: ignore[method-assign, assignment]
    making.Recorder = partial(Recorder, overlaps=overlaps)  # type: ignore[misc, assignment]
    try:
        precompute(config, out / "set", annotations=[place.annotations], limit=inputs)
    finally:
        ShardMaker.make_all, Maker.teacher = make_all, own  # type: ignore[method-assign]
        making.Recorder = Recorder  # type: ignore[misc]
        shutil.rmtree(out)
    return seconds
