"""How many workers a stage may have now: what the nodes hold, and what others leave of it.

    Room ── now ──> as many as fit ── lacked ──> fewer for a while, where nobody gave them a place
         ├─ possible ──> instead of those that train
         └─ leave_out ──> not on the nodes that end one attempt after another

What nodes have says nothing of what others use of it: that only shows when workers are not given a
place. The cluster is asked through the head node, which may be away for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pipelines.errors import one_line
from tst_ray import autoscaler
from tst_ray.errors import RunError, UserError
from tst_ray.nodes import (
    address_of,
    ask_autoscaler,
    free_room,
    living_nodes,
    nodes_for_workers,
    room_for,
)
from tst_ray.settings import Config
from tst_ray.sight import Sight
from tst_ray.storage import patiently
from tst_ray.suspects import Events, left_out, to_leave_out
from tst_ray.timeouts import NO_ROOM_S

Value = TypeVar("Value")

_LONGEST_BAR_S = 3600.0


def steadily(look: Callable[[], Value]) -> Value:
    """What a question to the cluster gives; it is asked again while the head node is away.

    Raises:
        RunError: it stays away.
    """
    from ray.exceptions import RayError

    def answer() -> tuple[Value | None, UserError | None]:
        try:
            return look(), None
        except UserError as error:  # what is told to the user; a RunError is a RuntimeError, too
            return None, error

    try:
        value, told = patiently(answer, also=(RayError, RuntimeError))
    except (RayError, RuntimeError) as error:
        raise RunError(
            f"the head node does not answer ({one_line(error)}); the same command resumes"
        ) from error
    if told is not None:
        raise told
    return cast(Value, value)


def _living() -> set[str]:
    return {node.node_id for node in living_nodes()}


class Room:
    """The room for one stage's workers.

    Args:
        config: the run's.
        least, most: how many workers the stage may have.
        sight: which nodes see what the run needs.

    Attributes:
        lacked_for: how many workers were last not given a place; None where none ever.
        left: how many are tried instead, for a while.
    """

    def __init__(self, config: Config, least: int, most: int, sight: Sight) -> None:
        self._config, self.least, self.most, self.sight = config, least, most, sight
        self.lacked_for: int | None = None
        self.left = 0
        self._left_out: frozenset[str] = frozenset()
        self._needed: frozenset[str] = frozenset()  # left out once, and then missed
        self._failed_tries = 0  # to have more, one after another
        self._until = 0.0  # when more are tried again, …
        self._then = 0  # … or once nodes have room for more than they had then
        self._asked = most  # how many workers an autoscaler is asked for
        self._ran: int | None = None  # how many workers the last group had that started

    @property
    def without(self) -> frozenset[str]:
        """The nodes that are left out, and those that do not see the run."""
        return self._left_out | self.sight.unseen()

    def now(self) -> int:
        """How many workers to start, of those allowed; fewer than `least`: wait for nodes."""
        self.sight.look()
        room = self.nodes_hold(self._left_out)
        barred = time.monotonic() < self._until and room <= self._then
        return min(room, max(self.left, self.least)) if barred else room

    def possible(self, world_size: int) -> int:
        """How many workers there could be instead of those that train.

        Of GPUs, those that nobody uses count; CPUs are Ray Data's one moment, and free the next.
        """
        room = self.now()
        if self._config.cluster.gpus_per_worker and room > world_size:
            room = min(room, world_size + free_room(self._config, room, self.without))
        return room

    def nodes_hold(self, without: frozenset[str]) -> int:
        """How many workers the nodes that see the run have room for, all but some of them, others'
        use not counted."""
        return room_for(self._config, self.most, without | self.sight.unseen())

    def nodes(self) -> set[str]:
        """The nodes that could have workers, whoever uses them."""
        return {node.node_id for node in nodes_for_workers(self._config, self.without)}

    def leave_out(self, events: Events) -> dict[str, Any] | None:
        """Leave out the nodes that a run's events tell of, and one more where it should go.

        Where too few workers are left, none is: better such nodes than none.

        Returns:
            what to tell of the one more; None where there is none.
        """
        most, now = self._config.fault.max_node_failures, time.time()
        without = left_out(events, now) - self._needed
        if most is None or (without and self.nodes_hold(without) < self.least):
            self._left_out = frozenset()
            return None
        suspect = to_leave_out(events, now, most, self.least, _living, self.nodes_hold)
        self._left_out = without | {suspect["node"]} if suspect else without
        return {**suspect, "address": address_of(suspect["node"])} if suspect else None

    def ran(self, world_size: int) -> None:
        """Note that so many workers were given a place."""
        self._ran = world_size
        if self.lacked_for is not None and world_size >= self.lacked_for:
            self._failed_tries, self._until = 0, 0.0

    def lacked(self, world_size: int) -> bool:
        """Note that so many were not: others use the nodes. Whether that was not known.

        Nodes that were left out are taken back: what others leave was no room without them.

        As many as ran before are tried next, where those were fewer; else as many as nobody uses
        the places of.
        """
        self._needed, self._left_out = self._needed | self._left_out, frozenset()
        bar_s = NO_ROOM_S
        if self._ran is not None and self._ran < world_size:
            self.left = self._ran
            # A group that trained was ended for it: beside others who stay, that becomes rare.
            bar_s = min(NO_ROOM_S * 2.0**self._failed_tries, _LONGEST_BAR_S)
            self._failed_tries += 1
        else:
            free = steadily(lambda: free_room(self._config, self.most, self.without))
            self.left = min(free, world_size - 1)
        self._until = time.monotonic() + bar_s
        self._then = steadily(lambda: self.nodes_hold(self._left_out))
        is_news, self.lacked_for = world_size != self.lacked_for, world_size
        return is_news

    def ask(self, workers: int | None = None, at_work: int = 0) -> None:
        """Ask an autoscaler for room for so many workers; again and again, since a request expires.

        A node that is looked at for the first time is room: another in its place would be too many.

        Args:
            workers: how many from now on; None: as many as before.
            at_work: how many train; where Ray Train asks for those itself, both would add up.
        """
        self._asked = self._asked if workers is None else workers
        if self._asked <= at_work and not autoscaler.is_coordinated():
            return
        without = self._left_out | self.sight.blind()
        ask_autoscaler(self._config, self._asked, without)
