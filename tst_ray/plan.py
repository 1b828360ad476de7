"""The run as arithmetic: phases, steps, tokens, learning rate.

    Config → build_plan → Plan → phases → steps → batch_split

Everything here is exact integer arithmetic in O(phases) time and O(1) memory, whatever the number
of steps. A step is named by the number of steps finished before it: 0 is the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from pipelines.order import rank_slots
from tst_ray.settings import Config, PhaseConfig


@dataclass(frozen=True)
class Phase:
    """A stretch of steps of one kind.

    Attributes:
        index: 0 is the first phase.
        bag_size: s, tokens in a bag; 1 is ordinary next-token training.
        steps: how many there are.
        first_step: steps of all phases before.
        min_workers, max_workers: the allowed world sizes.
        num_sequences: sequences of a step over all workers.
        latent_length: positions of a sequence that the model sees.
        input_bag: tokens averaged into one input position.
        target_bag: tokens of a position's target bag, all of which it predicts unless the mode is
            input_only.
    """

    index: int
    name: str
    bag_size: int
    steps: int
    first_step: int
    min_workers: int
    max_workers: int
    weighting: str
    loss: Literal["mce", "mce_alt"]
    mode: str
    fold: str
    num_sequences: int
    latent_length: int
    input_bag: int
    target_bag: int

    @property
    def last_step(self) -> int:
        """Steps finished when the phase is."""
        return self.first_step + self.steps

    @property
    def data_length(self) -> int:
        """Tokens of a sequence that are trained on."""
        return self.latent_length * self.input_bag

    @property
    def lookahead(self) -> int:
        """Tokens read past `data_length`, so that the last position has all its targets."""
        return self.target_bag

    @property
    def data_tokens_per_step(self) -> int:
        """Tokens of text that a step trains on."""
        return self.num_sequences * self.data_length

    @property
    def latent_tokens_per_step(self) -> int:
        """Positions that the model computes in a step."""
        return self.num_sequences * self.latent_length

    @property
    def data_tokens(self) -> int:
        """Tokens of text that the phase trains on."""
        return self.steps * self.data_tokens_per_step

    @property
    def latent_tokens(self) -> int:
        """Positions that the model computes in the phase."""
        return self.steps * self.latent_tokens_per_step


@dataclass(frozen=True)
class Plan:
    """What a run does, from the first step to the last.

    Attributes:
        sequence_length: L, latent positions of a sequence of ordinary training.
        warmup_steps: the learning rate rises over the first steps …
        decay_steps: … and falls over the last, to `final_lr_ratio` of the peak.
    """

    phases: tuple[Phase, ...]
    sequence_length: int
    warmup_steps: int
    decay_steps: int
    final_lr_ratio: float

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.phases[-1].last_step

    @property
    def total_data_tokens(self) -> int:
        """Tokens of text that the run trains on.

        N·B·L·(r·s + 1 − r), for N steps of B sequences of L positions, a share r in bags of s.
        """
        return sum(phase.data_tokens for phase in self.phases)

    @property
    def total_latent_tokens(self) -> int:
        """Positions that the model computes in the run."""
        return sum(phase.latent_tokens for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase of the step after `step` finished ones.

        Raises:
            IndexError: no such step.
        """
        for phase in self.phases:
            if phase.first_step <= step < phase.last_step:
                return phase
        raise IndexError(f"step {step} lies outside the plan's {self.total_steps} steps")

    def tokens_after(self, step: int) -> tuple[int, int]:
        """(data tokens, latent tokens) trained on once `step` steps are finished."""
        data = latent = 0
        for phase in self.phases:
            done = min(max(step - phase.first_step, 0), phase.steps)
            data += done * phase.data_tokens_per_step
            latent += done * phase.latent_tokens_per_step
        return data, latent

    def lr_multiplier(self, step: int) -> float:
        """The learning rate of the step after `step` finished ones, relative to the peak.

        Warmup-Stable-Decay over the whole run (arXiv 2404.06395), linear at both ends, blind to
        phases. No step is wasted on a rate of 0: the first has 1/warmup_steps, and the last is
        1/decay_steps of the way above the end, which is reached when the run is.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.total_steps - step
        if left < self.decay_steps:
            return self.final_lr_ratio + (1 - self.final_lr_ratio) * max(left, 0) / self.decay_steps
        return 1.0

    def stages(self) -> tuple[tuple[Phase, ...], ...]:
        """Consecutive phases with the same allowed world sizes; each stage is one worker group."""
        groups = groupby(self.phases, lambda phase: (phase.min_workers, phase.max_workers))
        return tuple(tuple(phases) for _, phases in groups)


def build_plan(config: Config) -> Plan:
    """The plan of a checked configuration."""
    phases: list[Phase] = []
    for settings in config.phase_settings():
        phases.append(_phase(config, settings, phases))
    train = config.train
    return Plan(
        phases=tuple(phases),
        sequence_length=train.sequence_length,
        warmup_steps=train.steps_of(train.warmup),
        decay_steps=train.steps_of(train.decay),
        final_lr_ratio=train.final_lr_ratio,
    )


def _phase(config: Config, settings: PhaseConfig, before: list[Phase]) -> Phase:
    num_sequences, latent_length = settings.folded(
        config.train.batch_size, config.train.sequence_length
    )
    bags_before = any(phase.bag_size > 1 for phase in before)
    plain = "recovery" if bags_before else "plain"
    min_workers, max_workers = config.workers_of(settings)
    return Phase(
        index=len(before),
        name=settings.name or ("superposition" if settings.bag_size > 1 else plain),
        bag_size=settings.bag_size,
        steps=settings.steps,
        first_step=before[-1].last_step if before else 0,
        min_workers=min_workers,
        max_workers=max_workers,
        weighting=settings.weighting,
        loss=settings.loss,
        mode=settings.mode,
        fold=settings.fold,
        num_sequences=num_sequences,
        latent_length=latent_length,
        input_bag=1 if settings.mode == "output_only" else settings.bag_size,
        target_bag=settings.bag_size,
    )


def batch_split(num_sequences: int, world_size: int) -> tuple[int, ...]:
    """Sequences of each rank: contiguous shares of the batch, larger ones first, within one."""
    slots = (rank_slots(num_sequences, world_size, rank) for rank in range(world_size))
    return tuple(share.stop - share.start for share in slots)
