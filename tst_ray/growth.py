"""Whether a group that trains should end for a larger one, by what was measured of it.

    run.json, metrics.jsonl ──> Growing.worth ──> Growth, or None: train on
                                    │  ▲ begun, stopped, resized: what starting a group costs
                                    └──> Room.ask: an autoscaler, for the workers that pay

What pays is decided in elastic.py, on these numbers alone; the stage tells of it, and acts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from tst_ray.elastic import Growth, growth_pays
from tst_ray.job import Job
from tst_ray.journal import read_state
from tst_ray.metrics import EVENT_FIELDS, EVENTS, METRICS
from tst_ray.room import Room
from tst_ray.storage import Storage

_UNMEASURED_START_S = 20.0
_TAIL_BYTES = 64 << 10
_FIELDS = ("step", "attempt", "world_size", "step_time_s")
_FEWEST_STEPS = 3  # that say how long one takes


@dataclass(frozen=True)
class _Measured:
    """Seconds that a step took, in which phase, and on which nodes."""

    step_s: float
    phase: int
    nodes: set[str]


class Growing:
    """What one stage knows of growing.

    Args:
        job: what its workers are told.
        room: the room there is for them.

    Attributes:
        start_s: seconds from the start of a group to the end of its first step, as last measured.
    """

    def __init__(self, job: Job, room: Room) -> None:
        self._job, self._room, self._run = job, room, Storage(job.run_url)
        self.start_s = _UNMEASURED_START_S
        self._restart_s: float | None = None  # of a group that was asked to stop, as measured
        self._began_at = 0.0  # when the group at work had finished a step
        self._resized_at = time.monotonic()
        self._measured: dict[int, _Measured] = {}  # by world size

    def begun(self, started: float) -> None:
        """The group that was started then (`time.monotonic`) has finished its first step."""
        self._began_at = time.monotonic()
        self.start_s = self._began_at - started

    def stopped(self, asked: float) -> None:
        """The group that was asked to stop then has ended."""
        self._restart_s = time.monotonic() - asked + self.start_s

    def resized(self) -> None:
        """The next group has another number of workers."""
        self._resized_at = time.monotonic()

    def worth(self, world_size: int, at_work: set[str]) -> Growth | None:
        """What growing would give, where more workers would fit and stopping for them pays.

        An autoscaler is asked for as many as would pay, whether or not they fit yet; for those at
        work, where more would not.

        Args:
            world_size, at_work: the workers of the group at work, and their nodes.
        """
        records = self._records_now(world_size) if world_size < self._room.most else []
        if len(records) < _FEWEST_STEPS:
            self._room.ask(at_work=world_size)
            return None
        growth = self._growth(world_size, at_work, records)
        cluster = self._job.config.cluster
        most = replace(growth, possible=self._room.most)
        more_would_pay = growth_pays(most, gain=cluster.growth_gain)
        self._room.ask(self._room.most if more_would_pay else world_size, at_work=world_size)
        pays = growth_pays(growth, gain=cluster.growth_gain, settle_s=cluster.settle_s)
        # a healthy group does not end while nothing could be saved of it
        return growth if pays and not self._saves_fail() else None

    def _growth(self, world_size: int, at_work: set[str], records: list[dict[str, Any]]) -> Growth:
        possible = self._room.possible(world_size)
        step_s = sorted(record["step_time_s"] for record in records)[len(records) // 2]
        step = records[-1]["step"]
        phase, nodes = self._job.plan.phase_at(step - 1), self._room.nodes()
        self._measured[world_size] = _Measured(step_s, phase.index, at_work)
        return Growth(
            world_size=world_size,
            possible=possible,
            num_sequences=phase.num_sequences,
            step_s=step_s,
            measured={
                size: seen.step_s
                for size, seen in self._measured.items()
                if seen.phase == phase.index and seen.nodes <= nodes  # a slow one may be gone
            },
            steps_left=self._job.last_step - step,
            restart_s=self._restart_s or self.start_s,
            since_resize_s=time.monotonic() - max(self._resized_at, self._began_at),
        )

    def _saves_fail(self) -> bool:
        """Whether storage did not take the last checkpoint that was tried."""
        events = self._run.tail_records(EVENTS, _TAIL_BYTES, EVENT_FIELDS)
        kinds = [event["event"] for event in events if not event.get("memory")]
        tries = [kind for kind in kinds if kind in ("checkpoint", "checkpoint_failed")]
        return tries[-1:] == ["checkpoint_failed"]

    def _records_now(self, world_size: int) -> list[dict[str, Any]]:
        """The newest lines of metrics.jsonl that the group at work wrote."""
        records = self._run.tail_records(METRICS, _TAIL_BYTES, _FIELDS)
        attempt = read_state(self._run).get("attempt")
        return [r for r in records if r["attempt"] == attempt and r["world_size"] == world_size]
