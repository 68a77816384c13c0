"""Phases of a rollout, whether an objective can be trained on them, and which are drawn in an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UsageError
from common.schedule import trailing_timesteps
from common.sections import TrainConfig
from common.seeding import rng
from common.tensors import Tensors
from stage2_student.student.shard_facts import ShardFacts

PREDICTION_OBJECTIVES = ("lcm", "x0")
"""They read the teacher's recorded one-step predictions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """S called states cut into M phases of equal length; state S is the end of the solve."""

    num_states: int
    """S: stored states at which the teacher was called."""
    num_phases: int
    """M: the student's steps. Divides S, so that every phase starts and ends at a stored state."""

    def __post_init__(self) -> None:
        if self.num_phases < 1 or self.num_states % self.num_phases:
            divisors = [str(m) for m in range(1, self.num_states + 1) if self.num_states % m == 0]
            raise UsageError(
                f"train.num_phases: received {self.num_phases}, but the shards hold {self.num_states} states"
                f" of each solve and phases must start and end at stored states; expected {', '.join(divisors)}"
            )

    @property
    def states_per_phase(self) -> int:
        """Called states in a phase, S / M."""
        return self.num_states // self.num_phases

    def start(self, phase: int) -> int:
        """Return the index of a phase's first state."""
        return phase * self.states_per_phase

    def end(self, state: Tensor) -> Tensor:
        """Return, for indices of called states, the index of the state that ends their phase (int64)."""
        return (state // self.states_per_phase + 1) * self.states_per_phase

    def student_timesteps(self, rollout_timesteps: Tensor) -> Tensor:
        """Return the t at which an M-step student is called: the phases' starts.

        Args:
            rollout_timesteps: t of the called states, (S,) int64.

        Returns:
            (M,) int64, descending.
        """
        return rollout_timesteps[:: self.states_per_phase]


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
    return train.objective in ("phased", "x0") and train.states != "all"


def plan_phases(train: TrainConfig, facts: ShardFacts) -> tuple[Phases, Tensor]:
    """Check that the objective can be trained on the set, and cut its rollouts into phases.

    Returns:
        The phases, and t at which the student will be called in sampling, (M,) int64.

    Raises:
        UsageError: objective, number of phases and shards do not fit each other.
    """
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
        return Phases(num_states=len(facts.timesteps), num_phases=1), trailing_timesteps(train.num_phases)
    phases = Phases(num_states=len(facts.timesteps), num_phases=train.num_phases)
    if train.objective in ("phased", "pcm"):
        require_distance(facts.record_every * (phases.states_per_phase if trains_at_starts(train) else 1))
    return phases, phases.student_timesteps(torch.tensor(facts.timesteps))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draws(Tensors):
    """Which part of each sample's record is trained on; keyed by (seed, epoch, sample index) alone."""

    rollout: Tensor
    """Which of the record's R rollouts, (B,) int64."""
    state: Tensor
    """Which called state, (B,) int64 in [0, S)."""
    position: Tensor
    """Where in a phase, (B,) float32 in [0, 1); for states between the stored ones."""


def draw(
    samples: Sequence[tuple[int, int]], *, seed: int, num_rollouts: int, phases: Phases, starts_only: bool
) -> Draws:
    """Draw rollout, state and position for each sample.

    Args:
        samples: (epoch, index in the set) of each, B of them.
        seed: train.seed.
        num_rollouts: R of the records.
        phases: the phases of a solve.
        starts_only: draw among the M phase starts; else among all S called states.
    """
    rollouts, states, positions = [], [], []
    for epoch, index in samples:
        random = rng(seed, epoch, index, "training draw")
        rollouts.append(random.randrange(num_rollouts))
        if starts_only:
            states.append(phases.start(random.randrange(phases.num_phases)))
        else:
            states.append(random.randrange(phases.num_states))
        positions.append(random.random())
    return Draws(rollout=torch.tensor(rollouts), state=torch.tensor(states), position=torch.tensor(positions))
