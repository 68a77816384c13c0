"""Phases of a rollout, whether an objective can be trained on them, and which are drawn in an epoch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.errors import UsageError
from common.schedule import trailing_timesteps, upstream_timesteps
from common.sections import TrainConfig
from common.seeding import rng
from common.tensors import Tensors
from stage2_student.student.shard_facts import ShardFacts

PREDICTION_OBJECTIVES = ("lcm", "x0")
"""They read the teacher's recorded one-step predictions."""
BELOW_ONE = 1 - 2**-24
"""Largest position, in float32 too, to which positions are rounded."""
NEAR = 5
"""Timesteps between a label and the state that bears it, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """S called states of a rollout, cut into phases that start and end at stored states; state S is the end."""

    boundaries: tuple[int, ...]
    """The state at which each phase starts, ascending from 0, and S."""
    labels: tuple[int, ...] | None = None
    """t at which the student meets each boundary; None if as recorded."""
    stride: int = 1
    """1; 2 if only every other boundary starts a phase, the others ending them: a student's own states."""

    @property
    def num_states(self) -> int:
        """S."""
        return self.boundaries[-1]

    @property
    def num_phases(self) -> int:
        """Crossings that are trained."""
        return len(self.starts)

    @property
    def shortest(self) -> int:
        """Stored states that the shortest phase is long."""
        return min(end - start for start, end in pairwise(self.boundaries))

    @property
    def starts(self) -> tuple[int, ...]:
        """The phases' first states."""
        return self.boundaries[: -1 : self.stride]

    def end(self, state: Tensor) -> Tensor:
        """Return, for indices of called states, the index of the state that ends their phase (int64)."""
        boundaries = placed(self.boundaries, state.device)
        return boundaries[torch.bucketize(state, boundaries, right=True)]


@functools.lru_cache(maxsize=64)
def placed(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers as an int64 tensor, copied once: a copy waits for what the device has still to do."""
    return torch.tensor(values, device=device)


def even_phases(num_states: int, num_phases: int) -> Phases:
    """Cut a rollout into phases of equal length, called where it was recorded.

    Args:
        num_states: S, stored states at which the teacher was called.
        num_phases: M, the student's steps. Divides S.

    Raises:
        UsageError: it does not.
    """
    if num_phases < 1 or num_states % num_phases:
        divisors = [str(m) for m in range(1, num_states + 1) if num_states % m == 0]
        raise UsageError(
            f"train.num_phases: received {num_phases}, but the shards hold {num_states} states"
            f" of each solve and phases must start and end at stored states; expected {', '.join(divisors)}"
        )
    return Phases(boundaries=tuple(range(0, num_states + 1, num_states // num_phases)))


def upstream_phases(num_phases: int, recorded: Sequence[int]) -> Phases:
    """Cut a rollout so that a student learns to be called on AnyText2's own grid.

    That grid starts below the noisiest timestep and ends with a call at t = 1, which hardly moves anything. So the
    noise bears its first label, each later label is met at the nearest stored state, and x0 ends the crossing to
    t = 1: M calls are M - 1 crossings.

    Args:
        num_phases: M, the student's steps.
        recorded: t of the stored called states, descending.

    Raises:
        UsageError: the shards hold no states near enough.
    """
    first, *inner, last = upstream_timesteps(num_phases).tolist()
    nearest = [min((abs(t - label), state) for state, t in enumerate(recorded))[1] for label in inner]
    off = [label for label, state in zip(inner, nearest, strict=True) if abs(recorded[state] - label) > NEAR]
    if off:
        raise UsageError(
            f'train.grid "upstream" with {num_phases} phases needs stored states within {NEAR} of t ='
            f" {', '.join(map(str, off))}, but the shards hold t = {', '.join(map(str, recorded))}; precompute"
            " with the 8 states that 40 solver steps keep, or train fewer phases"
        )
    return Phases(boundaries=(0, *nearest, len(recorded)), labels=(first, *inner, last))


def student_phases(train: TrainConfig, facts: ShardFacts) -> Phases:
    """Return the phases of records of source "student": each state that starts one stands before its end.

    Raises:
        UsageError: the objective needs the teacher's own states, or the student's phases were other ones.
    """
    recorded = (len(facts.timesteps) + 1) // 2
    wrong = {
        "train.objective": (train.objective, "phased"),
        "train.grid": (train.grid, "trailing"),
        "train.num_phases": (train.num_phases, recorded),
    }
    for key, (received, expected) in wrong.items():
        if received != expected:
            raise UsageError(
                f"{key}: received {received}, but these shards hold the states of a student of {recorded} phases;"
                f" expected {expected}, or shards of the teacher's own solves"
            )
    if train.states == "all":
        raise UsageError(
            'train.states: received all, but these shards hold the states of a student, expected "starts" or'
            ' "interpolated"'
        )
    return Phases(boundaries=tuple(range(len(facts.timesteps) + 1)), stride=2)


def require_distance(solver_steps: int) -> None:
    """Refuse targets between adjacent solver steps.

    Their states differ so little that float16 rounding of the record moves the target by 3 % (rms), 8 times more
    than between states that are 5 steps apart.

    Args:
        solver_steps: that the shortest crossing of a target takes.

    Raises:
        UsageError: the objective has targets between adjacent steps.
    """
    if solver_steps < 2:
        raise UsageError(
            "this objective on these shards has targets between adjacent solver steps, which float16 rounding"
            " spoils; precompute with precompute.record_every of 2 or more, train at phase starts with fewer"
            " phases, or train objective x0"
        )


def trains_at_starts(train: TrainConfig) -> bool:
    """Whether only the phases' first states are drawn; consistency objectives need every state."""
    return train.objective in ("phased", "unrolled", "x0") and train.states != "all"


def plan_phases(train: TrainConfig, facts: ShardFacts) -> tuple[Phases, Tensor]:
    """Check that the objective can be trained on the set, and cut its rollouts into phases.

    Returns:
        The phases, and t at which the student will be called in sampling, (M,) int64.

    Raises:
        UsageError: objective, number of phases and shards do not fit each other.
    """
    if facts.source == "student":
        return student_phases(train, facts), torch.tensor(facts.timesteps[::2])
    wanted = "noised" if train.objective == "lcm" else "rollout"
    if facts.source != wanted:
        raise UsageError(
            f'train.objective "{train.objective}" trains on shards of source "{wanted}", received'
            f' "{facts.source}"; precompute with precompute.source = "{wanted}", or choose another objective'
        )
    if train.objective in PREDICTION_OBJECTIVES and not facts.has_predictions:
        raise UsageError(
            f'train.objective "{train.objective}" needs the teacher\'s one-step predictions, which these shards do'
            " not hold; precompute with precompute.store_predictions = true"
        )
    if train.objective == "lcm":
        return even_phases(len(facts.timesteps), 1), trailing_timesteps(train.num_phases)
    if train.grid == "upstream":
        phases, timesteps = (
            upstream_phases(train.num_phases, facts.timesteps),
            upstream_timesteps(train.num_phases),
        )
    else:
        phases = even_phases(len(facts.timesteps), train.num_phases)
        timesteps = torch.tensor(facts.timesteps)[list(phases.boundaries[:-1])]
    if train.objective in ("phased", "unrolled", "pcm"):
        require_distance(facts.record_every * (phases.shortest if trains_at_starts(train) else 1))
    return phases, timesteps


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws(Tensors):
    """Which parts of each sample's record are trained on, n of them; keyed by (seed, epoch, index, number) alone.

    A sample's draws follow each other: B n rows.
    """

    rollout: Tensor
    """Which of the record's R rollouts, (B n,) int64."""
    state: Tensor
    """Which called state, (B n,) int64 in [0, S)."""
    position: Tensor
    """Where in a phase, (B n,) float32 in [0, 1); for states between the stored ones."""


def draw(
    samples: Sequence[tuple[int, int]],
    *,
    seed: int,
    num_rollouts: int,
    phases: Phases,
    starts_only: bool,
    per_sample: int = 1,
) -> Draws:
    """Draw rollout, state and position for each sample.

    A sample's draws meet different phases (states) as long as there are any left, then all of them again. The
    first draw is the same however many follow.

    Args:
        samples: (epoch, index in the set) of each, B of them.
        seed: train.seed.
        num_rollouts: R of the records.
        phases: the phases of a solve.
        starts_only: draw among the phase starts; else among all S called states.
        per_sample: n, draws of each sample.
    """
    choices: Sequence[int] = phases.starts if starts_only else range(phases.num_states)
    rollouts, states, positions = [], [], []
    for epoch, index in samples:
        left: Sequence[int] = ()
        for number in range(per_sample):
            random = rng(seed, epoch, index, "training draw", *((number,) if number else ()))
            rollouts.append(random.randrange(num_rollouts))
            left = left or choices
            states.append(random.choice(left))
            left = [state for state in left if state != states[-1]]
            positions.append(min(random.random(), BELOW_ONE))
    return Draws(rollout=torch.tensor(rollouts), state=torch.tensor(states), position=torch.tensor(positions))
