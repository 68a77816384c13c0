"""Stage two's parts: a step of training in every way, from shards, beside the online teacher, on smaller cards."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import profiler
from torch.profiler import ProfilerActivity

from bench.gpu.learning import (
    Learnt,
    first_batch,
    from_shards,
    gradients,
    in_memory,
    noise_step,
    online_step,
    open_trainer,
    ours,
    plain_peft,
    read_batch,
)
from bench.gpu.measuring import Step, Timed, alone, count_flops, free, matmul_rate, time_step, time_stream
from bench.gpu.place import FULL, Place
from bench.gpu.rows import Row, write_row
from bench.gpu.solving import FAST, Calls, describe_failure, encode
from bench.inputs import finish, render_inputs
from common.compiling import as_it_is, prepare_networks
from common.files import write_bytes_atomic
from stage1_teacher.teacher.teacher import Teacher
from stage2_student.train import train
from stage2_student.training.trainer import Trainer

PEFT = "step, plain PEFT under autocast, eager"
BEST = "step, folded and compiled"
FASTEST = ("train.fold_adapters=true", "model.compile=true")
EPS_TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
GRADIENT_TOLERANCE = {torch.bfloat16: 1e-1, torch.float32: 1e-3}
"""Of folded or compiled against PEFT, relative, by the base's type: bfloat16 rounds by 4e-3 in each operation."""


class Steps:
    """Rows of a part: samples a second, and the share of what the plain student's arithmetic allows."""

    def __init__(self, place: Place, part: str) -> None:
        """Measure the matrix product."""
        self.place, self.part = place, part
        self._matmul = matmul_rate(place.out, place.size.matmul_side, place.dtype)

    def add(
        self,
        case: str,
        make: Callable[[], Step],
        *,
        samples: int = 0,
        stream: bool = False,
        baseline: str = "",
        note: str = "",
        keep: bool = False,
    ) -> None:
        """Make a step, time it, write it down, and free it; an error is written down too.

        Args:
            case: what it is.
            make: makes the step; what it holds is part of the memory.
            samples: of a step; 0 for the size's batch.
            stream: time a row of steps instead of each to its end.
            baseline: the case to compare its rate with.
            note: what else there is to say.
            keep: keep what the step holds, and its compiled code, for the next case.
        """
        place, samples = self.place, samples or self.place.size.batch
        try:
            timed = self._time(make(), stream=stream)
            if not keep:
                free()  # before another student is made for the count
            flops = sample_flops(place)
        except Exception as error:
            write_row(place.out, Row(part=self.part, case=case, note=describe_failure(error)))
        else:
            rate = samples / timed.seconds
            row = Row(
                part=self.part,
                case=case,
                rate=rate,
                unit="samples/s",
                milliseconds=1000 * timed.seconds,
                first_seconds=timed.first,
                of_matmul=rate * flops / self._matmul,
                gib=timed.gib,
                baseline=baseline,
                note=note,
            )
            write_row(place.out, row)
        if not keep:
            free()

    def _time(self, step: Step, *, stream: bool) -> Timed:
        out, rounds = self.place.out, self.place.size.rounds
        timed = time_step(out, step, rounds)
        return replace(timed, seconds=time_stream(out, step, 2 * rounds)) if stream else timed

    def compare(self, case: str, error: float, tolerance: float) -> None:
        """Write down how far values are from what they should be."""
        write_row(self.place.out, Row(part=self.part, case=case, error=error, tolerance=tolerance))

    def compare_learning(self, what: str, found: Learnt, expected: Learnt) -> None:
        """Compare predictions and gradients; see `gradients`."""
        error = float((found[0] - expected[0]).norm() / expected[0].norm())
        self.compare(f"eps, {what}", error, EPS_TOLERANCE[self.place.dtype])
        pairs = [(found[1][name], value) for name, value in expected[1].items()]
        difference = sum(float((mine - other).square().sum()) for mine, other in pairs) ** 0.5
        norm = sum(float(other.square().sum()) for _, other in pairs) ** 0.5
        self.compare(f"gradients, {what}", difference / norm, GRADIENT_TOLERANCE[self.place.dtype])


def sample_flops(place: Place) -> float:
    """Return a sample's arithmetic in plain PEFT, forward, backward and WriteNet; counted once for all parts."""
    path = place.out / "sample_flops.json"
    if not path.exists():
        step = noise_step(plain_peft(place), read_batch(place, 1))  # seconds of loading, beside other processes
        with alone(place.out):
            write_bytes_atomic(path, json.dumps(count_flops(step)).encode())
    return float(json.loads(path.read_text()))


def _ours(place: Place, *settings: str) -> Callable[[], Step]:
    return lambda: in_memory(open_trainer(place, *settings))


def step_today(place: Place) -> None:
    """The baseline, and ours without any improvement."""
    steps = Steps(place, "step-today")
    steps.add(PEFT, lambda: noise_step(plain_peft(place), read_batch(place, place.size.batch)))
    steps.add("step, ours, eager", _ours(place), baseline=PEFT)


def step_best(place: Place) -> None:
    """The fastest step, and its gradients against the same network's as it is."""
    steps = Steps(place, "step-best")

    def make() -> Step:
        trainer = open_trainer(place, *FASTEST)
        batch = first_batch(trainer)
        with as_it_is(), alone(place.out):
            expected = gradients(trainer, batch)
        steps.compare_learning("compiled against eager", gradients(trainer, batch), expected)
        return in_memory(trainer)

    steps.add(BEST, make, baseline=PEFT)


def step_values(place: Place) -> None:
    """Predictions and gradients of the folded student against PEFT's."""
    steps = Steps(place, "step-values")
    trainer = open_trainer(place)
    batch = first_batch(trainer)
    expected = gradients(trainer, batch)
    del trainer
    free()
    found = gradients(open_trainer(place, "train.fold_adapters=true"), batch)
    steps.compare_learning("folded against PEFT", found, expected)


def step_variants(place: Place) -> None:
    """Each improvement alone, and what may help beside the best."""
    steps = Steps(place, "step-variants")
    steps.add("step, folded, eager", _ours(place, "train.fold_adapters=true"), baseline=PEFT)
    half = place.size.batch // 2
    draws = (f"train.batch_size={half}", "train.draws_per_sample=2", *FASTEST)
    steps.add("step, folded and compiled, two states an image", _ours(place, *draws), baseline=PEFT)
    steps.add("step, folded, compiled, channels_last", _ours(place, *FASTEST, FAST[1]), baseline=PEFT)
    steps.add("step, PEFT, compiled", _ours(place, "model.compile=true"), baseline=PEFT)
    checkpointing = "train.gradient_checkpointing=true"
    steps.add("step, PEFT, eager, gradient checkpointing", _ours(place, checkpointing), baseline=PEFT)


def step_graphs(place: Place) -> None:
    """CUDA graphs of the folded student."""

    def make() -> Step:
        trainer = open_trainer(place, "train.fold_adapters=true")
        if place.size.compiles:
            trainer.student.unet.compile(mode="reduce-overhead", dynamic=False)
        step = in_memory(trainer)

        def marked() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            step()

        return marked

    Steps(place, "step-graphs").add("step, folded, CUDA graphs", make, baseline=PEFT)


def shards(place: Place) -> None:
    """The fastest step from shards, against the same on one batch in memory; rows of steps, as in training."""
    steps, held = Steps(place, "shards"), list[Trainer]()

    def trainer() -> Trainer:
        if not held:
            held.append(open_trainer(place, *FASTEST))
        return held[0]

    memory = "step, one batch in memory"
    steps.add(memory, lambda: in_memory(trainer()), stream=True, keep=True)
    for workers in (1, 4) if place.size is FULL else (0,):
        case = f"step, from shards, {workers} workers"
        step = partial(from_shards, trainer(), workers)
        steps.add(case, step, stream=True, baseline=memory, keep=True)


def online(place: Place) -> None:
    """A step with the teacher in the process: as diffusers' LCM script has it, and with every improvement."""
    steps, config = Steps(place, "online"), place.config()
    inputs = render_inputs(config, place.annotations, place.size.batch)
    scale = config.precompute.guidance_scale

    def today() -> Step:
        return online_step(plain_peft(place), Teacher.load(config), inputs, scale, together=False)

    def best() -> Step:
        fast = place.config(*FAST)
        teacher = Teacher.load(fast)
        prepare_networks(fast.model, teacher.denoiser.unet, teacher.denoiser.writenet)
        return online_step(ours(open_trainer(place, *FASTEST)), teacher, inputs, scale, together=True)

    note = "teacher, VAE, CLIP and recognizer included"
    steps.add("step, online teacher, eager", today, samples=len(inputs), note=note)
    steps.add("step, online teacher, every improvement", best, samples=len(inputs), note=note)


CARDS = {
    24: ("train.batch_size=8", "train.gradient_accumulation=2"),
    16: ("train.batch_size=16", "train.gradient_checkpointing=true"),
}
"""A card's GiB, and the settings that fit it with an effective batch of 16."""
CONTEXT_GIB = 1.0
"""What CUDA itself takes of a card, about."""


def cards(place: Place) -> None:
    """Settings for smaller cards, PyTorch given no more memory than they have."""
    steps = Steps(place, "cards")
    for gib, settings in CARDS.items():
        asked = settings if place.size is FULL else settings[1:]
        for name, more in (("eager", ()), ("compiled", ("model.compile=true",))):
            _limit(gib)
            case = f"step, {gib} GB card, {name}"
            steps.add(case, _ours(place, *asked, *more), samples=_samples(place, asked), note=" ".join(settings))
    _limit(None)


def _samples(place: Place, settings: tuple[str, ...]) -> int:
    train = place.config(*settings).train
    return train.batch_size * train.gradient_accumulation


def _limit(gib: float | None) -> None:
    """Let PyTorch have what a card of so many GiB leaves to it; None for all there is."""
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, (gib - CONTEXT_GIB) / whole))


def deterministic(place: Place) -> None:
    """`train.deterministic`: whether a run that was stopped ends with the same bits, and what it costs."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which CUDA reads when it starts: before anything else
    steps, on = Steps(place, "deterministic"), "train.deterministic=true"
    free_running = "step, folded, eager, any algorithms"
    folded = "train.fold_adapters=true"
    steps.add(free_running, _ours(place, folded))
    steps.add("step, folded, eager, deterministic", _ours(place, folded, on), baseline=free_running)
    few = ("train.max_steps=4", "train.checkpoint_every=2", "train.trackers=[]", "train.num_workers=0", on, folded)
    config = place.config(*few)
    whole, parted = place.out / "whole-run", place.out / "parted-run"
    for run in (whole, parted):
        shutil.rmtree(run, ignore_errors=True)
    train(config, shards=place.shards, run=whole)
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "checkpoints" / "step-00000004")
    resumed = train(config, shards=place.shards, run=parted, resume="auto")
    assert resumed.resumed_from == 2
    equal = _weights(whole) == _weights(parted)
    steps.compare(
        "weights of a resumed run against an unbroken one's, 1 if any bit differs", float(not equal), 0.0
    )


def _weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-00000004" / "lora" / "unet" / "adapter_model.safetensors").read_bytes()


def profile(place: Place) -> None:
    """Where the time of a step and of stage one's UNet call goes: kernel by kernel, into the output folder."""
    cases: dict[str, Callable[[], Step]] = {
        "step, ours, eager": _ours(place),
        "step, folded and compiled": _ours(place, *FASTEST),
        "UNet, channels_last and compiled": lambda: _unet_call(place),
    }
    for case, make in cases.items():
        try:
            note = _profile(place, case, make())
        except Exception as error:
            note = describe_failure(error)
        write_row(place.out, Row(part="profile", case=f"profile of {case}", note=note))
        free()


def _unet_call(place: Place) -> Step:
    config = place.config(*FAST)
    teacher = Teacher.load(config)
    prepare_networks(config.model, teacher.denoiser.unet, teacher.denoiser.writenet)
    return Calls(teacher, encode(place, config, teacher, place.size.rows[1] // 2)).unet


def _profile(place: Place, case: str, step: Step) -> str:
    """Write the table of a step's kernels, the longest first; returns a line about it."""
    on_gpu = torch.cuda.is_available()
    step()  # compiles
    with alone(place.out):
        step()
        finish()
        before = time.perf_counter()
        step()
        finish()
        whole = 1000 * (time.perf_counter() - before)
        kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profiler.profile(activities=[kind]) as found:
            step()
            finish()
    averages, column = found.key_averages(), "cuda" if on_gpu else "cpu"
    path = place.out / f"profile-{case.replace(', ', '-').replace(' ', '-')}.txt"
    path.write_text(averages.table(sort_by=f"self_{column}_time_total", row_limit=80, max_name_column_width=120))
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    busy = sum(getattr(each, own) for each in averages if not each.is_user_annotation) / 1000  # these hold kernels
    return f"{busy:.1f} ms of {'kernels' if on_gpu else 'operators'} in {whole:.1f} ms: {path.name}"
