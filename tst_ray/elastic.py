"""How many workers a stage should have now: pure decisions on numbers that others measured.

    Node → places → workers_that_fit → growth_pays?

Fewer nodes: the next attempt simply starts on what is left, down to the phase's minimum. More
nodes: a running group is only stopped for them when that pays, because starting a group anew costs
seconds in which nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A node that may run workers: its Ray resources, such as {"CPU": 8.0, "GPU": 1.0}."""

    node_id: str
    resources: Mapping[str, float]

    def places(self, per_worker: Mapping[str, float]) -> int:
        """How many workers it has room for."""
        return min(
            int(self.resources.get(name, 0.0) / amount + 1e-9)
            for name, amount in per_worker.items()
            if amount
        )


def workers_that_fit(
    nodes: Sequence[Node], per_worker: Mapping[str, float], data_cpus: float, most: int
) -> int:
    """How many of `most` workers the nodes hold, leaving Ray Data its CPUs; 0 where none fits.

    Ray Train's own elastic policy knows nothing of Ray Data, and would take every CPU.
    """
    places = sum(node.places(per_worker) for node in nodes)
    cpus = per_worker.get("CPU", 0.0)
    if not cpus:
        return max(min(most, places), 0)
    spare = sum(node.resources.get("CPU", 0.0) for node in nodes) - data_cpus
    return max(min(most, places, int(spare / cpus + 1e-9)), 0)


@dataclass(frozen=True)
class Growth:
    """What is known when more workers would fit than there are.

    Attributes:
        world_size, possible: workers now, and then.
        num_sequences: of a step, over all workers.
        step_s: seconds a step takes now.
        measured: seconds a step took at other world sizes of this phase, where that was seen.
        steps_left: of the stage.
        restart_s: seconds from the last step of a group to the first of the next, as measured.
        since_resize_s: seconds since the workers last changed.
    """

    world_size: int
    possible: int
    num_sequences: int
    step_s: float
    measured: Mapping[int, float]
    steps_left: int
    restart_s: float
    since_resize_s: float

    @property
    def expected_step_s(self) -> float:
        """Seconds a step should take then: as seen before, else in proportion to the fullest rank.

        No gain is expected where the fullest rank would have as many sequences as now.
        """
        seen = self.measured.get(self.possible)
        if seen is not None:
            return seen
        rows_now = math.ceil(self.num_sequences / self.world_size)
        rows_then = math.ceil(self.num_sequences / self.possible)
        return self.step_s * rows_then / rows_now

    @property
    def saved_s(self) -> float:
        """Seconds that the rest of the stage would be shorter, the restart not counted."""
        return self.steps_left * (self.step_s - self.expected_step_s)


def growth_pays(growth: Growth, *, gain: float, settle_s: float = 0.0) -> bool:
    """Whether to stop the group, with a checkpoint, and start a larger one.

    Args:
        gain: how many times the restart's cost must be saved; the margin for what was estimated. 0
            takes in all that fits, whether it pays or not.
        settle_s: seconds since the last resize before the next: nodes that come and go must not
            make a run restart each time.
    """
    if growth.possible <= growth.world_size or growth.since_resize_s < settle_s:
        return False
    return gain == 0 or growth.saved_s > gain * growth.restart_s
