"""What goes wrong in a run, and when: pure data, made from a seed or spelled out.

    schedule(seed=7, num_faults=20, first_step=50, last_step=2000)     anything, at any step
    Faults().fail_at(rank=1, step=7).kill_node_at(step=12).drain_at(step=20, deadline_s=5)

`chaos.py` carries them out. A fault's kind is one of

    kill_worker         SIGKILL for the process of one train worker
    freeze              SIGSTOP for it: it is there, and does nothing (for `seconds`, or for good)
    kill_node           a node with train workers is lost without a word
    drain               one is reclaimed: a notice, and after `seconds` it is lost
    add_node            a node joins (where a program can order one)
    damage_checkpoint   the newest committed checkpoint is cut, altered, or loses a file
    fill_disk           the filesystem of the run directory is full, for `seconds`
    kill_driver         SIGKILL for the process that drives the run
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tst_ray.errors import ConfigError

KINDS = (
    "kill_worker",
    "freeze",
    "kill_node",
    "drain",
    "add_node",
    "damage_checkpoint",
    "fill_disk",
    "kill_driver",
)
# These strike nothing but the run and the nodes under it, and the same command recovers by itself.
OWN_KINDS = ("kill_worker", "freeze", "kill_node", "drain", "damage_checkpoint")
CLUSTER_KINDS = ("kill_worker", "freeze", "kill_node", "drain", "add_node")
DAMAGES = ("cut", "flip", "remove", "unmark")

# How long a fault of a schedule lasts, in seconds: at the least, at the most.
_DURATIONS_S = {"drain": (5.0, 30.0), "fill_disk": (5.0, 20.0)}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: one of KINDS.
        at_step: it happens once metrics.jsonl has this step.
        choice: in [0, 1): picks the victim among those that are there by then.
        seconds: how long it lasts, or how long the notice is; None where that has no meaning, and
            for a freeze that does not end.
        rank: the victim is this rank, or its node; None leaves it to `choice`.
        how: the damage to a checkpoint, one of DAMAGES; None leaves it to `choice`.
    """

    kind: str
    at_step: int
    choice: float = 0.0
    seconds: float | None = None
    rank: int | None = None
    how: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"fault kind {self.kind!r}: use one of {', '.join(KINDS)}")
        if self.how is not None and self.how not in DAMAGES:
            raise ConfigError(f"damage {self.how!r}: use one of {', '.join(DAMAGES)}")
        if self.kind in _DURATIONS_S and self.seconds is None:
            raise ConfigError(f"fault kind {self.kind} needs `seconds`: how long it lasts")


def pick(choice: float, count: int) -> tuple[int, float]:
    """One of `count` things by a number in [0, 1), and another such number for a next pick."""
    index = int(choice * count)
    return index, choice * count - index


def schedule(
    seed: int, num_faults: int, first_step: int, last_step: int, kinds: Sequence[str] = OWN_KINDS
) -> tuple[Fault, ...]:
    """Faults from a seed, in the order of their steps: one in each equal stretch of the steps.

    No two are at one step, each kind comes as often as any other (or once more), and the same
    arguments give the same faults anywhere.

    Raises:
        ConfigError: there are fewer steps than faults; or no kinds, or an unknown one.
    """
    num_steps = last_step - first_step + 1
    if num_faults < 0:
        raise ConfigError(f"{num_faults} faults: give a number that is not negative")
    if num_faults > num_steps:
        raise ConfigError(
            f"{num_faults} faults need as many steps, and from {first_step} to {last_step} there "
            f"are {max(num_steps, 0)}; ask for fewer, or for more steps"
        )
    if not kinds:
        raise ConfigError(f"no kinds of faults; give some of {', '.join(KINDS)}")
    # Of Python's generators only `random()` promises to give the same numbers in every version.
    numbers = _numbers(seed)
    faults = []
    deck: list[str] = []
    for index in range(num_faults):
        low = index * num_steps // num_faults
        high = (index + 1) * num_steps // num_faults
        deck = deck or list(kinds)
        kind = deck.pop(pick(next(numbers), len(deck))[0])
        faults.append(
            Fault(
                kind,
                at_step=first_step + low + pick(next(numbers), high - low)[0],
                choice=next(numbers),
                seconds=_duration_s(kind, next(numbers)),
            )
        )
    return tuple(faults)


def _numbers(seed: int) -> Iterator[float]:
    generator = random.Random(seed)
    while True:
        yield generator.random()


def _duration_s(kind: str, number: float) -> float | None:
    if kind not in _DURATIONS_S:
        return None
    least, most = _DURATIONS_S[kind]
    return round(least + number * (most - least), 1)


class Faults(tuple[Fault, ...]):
    """Faults one by one, each call giving a longer tuple: by step, then in the order of the calls.

    Where no rank is given, the victim is the first of those that are there.
    """

    def fail_at(self, step: int, rank: int | None = None) -> Faults:
        """The process of a worker is killed."""
        return self._with(Fault("kill_worker", step, rank=rank))

    def freeze_at(self, step: int, rank: int | None = None, seconds: float | None = None) -> Faults:
        """The process of a worker stops; goes on after `seconds`, if given."""
        return self._with(Fault("freeze", step, rank=rank, seconds=seconds))

    def kill_node_at(self, step: int, rank: int | None = None) -> Faults:
        """A node is lost: the one of that rank, if given."""
        return self._with(Fault("kill_node", step, rank=rank))

    def drain_at(self, step: int, deadline_s: float, rank: int | None = None) -> Faults:
        """A node is reclaimed, with notice."""
        return self._with(Fault("drain", step, rank=rank, seconds=deadline_s))

    def add_node_at(self, step: int) -> Faults:
        """A node joins."""
        return self._with(Fault("add_node", step))

    def damage_checkpoint_at(self, step: int, how: str) -> Faults:
        """The newest committed checkpoint is damaged: one of DAMAGES."""
        return self._with(Fault("damage_checkpoint", step, how=how))

    def fill_disk_at(self, step: int, seconds: float) -> Faults:
        """The run's filesystem is full for so long."""
        return self._with(Fault("fill_disk", step, seconds=seconds))

    def kill_driver_at(self, step: int) -> Faults:
        """The driver's process is killed."""
        return self._with(Fault("kill_driver", step))

    def _with(self, fault: Fault) -> Faults:
        return Faults(sorted([*self, fault], key=lambda each: each.at_step))
