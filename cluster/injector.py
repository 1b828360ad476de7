"""Watches a run and puts faults into it, each once its step is reached.

    metrics.jsonl ──last step──> faults that are due ──aim──> victim ──strike──> record
                                                       │ none yet: at the next look
                                                       └─ what lasts `seconds` is ended later

`aim` only looks, so a dry run is an aim without a strike.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from cluster.damage import Ballast, damage, free_bytes, newest_checkpoint
from cluster.faults import Fault, pick
from cluster.targets import Driver, Impossible, NotNow, Target, TrainWorker
from tst_ray.errors import last_line
from tst_ray.hold import LOCK
from tst_ray.metrics import EVENTS, METRICS
from tst_ray.storage import Storage

_TAIL_BYTES = 1 << 16
_EVENTS_BYTES = 1 << 20
_POLL_S, _REMOTE_POLL_S = 0.2, 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Aim:
    """A fault with its victim, before anything is done.

    Attributes:
        victim: in words.
        strike: does it; returns more details for the record.
        details: what a program wants to know of the victim.
    """

    victim: str
    strike: Callable[[], dict[str, Any] | None]
    details: dict[str, Any] = field(default_factory=dict)


class Injector:
    """Watches a run directory and strikes at a target; a context manager that ends what it began.

    A fault whose victim is not there yet waits for it. No victim is struck twice.

    Args:
        run: the run directory.
        faults: what to do, each once metrics.jsonl has its step.
        target: the cluster.
        say: told each record; logs it in one line, unless given.

    Attributes:
        done: a record of each fault that is over with: kind, step, victim, time, outcome ("done",
            "skipped" or "failed"), and details such as rank, pid and node.
        pending: the faults that are not.
    """

    def __init__(
        self,
        run: Storage,
        faults: Iterable[Fault],
        target: Target,
        say: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.done: list[dict[str, Any]] = []
        self.pending = sorted(faults, key=lambda fault: fault.at_step)
        self._storage, self._target = run, target
        self._say = say or (lambda record: log.info(told(record)))
        self._struck: set[TrainWorker | str] = set()
        # What ends by itself: when (monotonic), and how.
        self._endings: list[tuple[float, Callable[[], None]]] = []
        self._aims = {
            "kill_worker": self._aim_kill,
            "freeze": self._aim_freeze,
            "kill_node": self._aim_kill_node,
            "drain": self._aim_drain,
            "add_node": self._aim_add_node,
            "damage_checkpoint": self._aim_damage,
            "fill_disk": self._aim_fill,
            "kill_driver": self._aim_driver,
        }

    def __enter__(self) -> Injector:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether every fault is over, with what it began."""
        return not self.pending and not self.ongoing

    @property
    def ongoing(self) -> bool:
        """Whether a notice, a full disk or a frozen worker has yet to end."""
        return bool(self._endings)

    def run(self, until: Callable[[], bool] | None = None, timeout_s: float | None = None) -> bool:
        """Watch and strike until a condition holds, or, without one, until all is over.

        Returns:
            whether that came about within `timeout_s`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self.poll()
            if until() if until else self.finished:
                return True
            if deadline is not None and time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S if self._storage.is_local else _REMOTE_POLL_S)

    def poll(self) -> list[dict[str, Any]]:
        """Look once: do what is due, end what is over; the records of what was done."""
        self._end([each for each in self._endings if each[0] <= time.monotonic()])
        step = last_step(self._storage)
        before = len(self.done)
        for fault in [fault for fault in self.pending if fault.at_step <= step]:
            self._carry_out(fault, step)
        return self.done[before:]

    def aim(self, fault: Fault) -> Aim:
        """What a fault would strike now; does nothing.

        Raises:
            NotNow: nothing, but it may find something later.
            Impossible: nothing ever.
        """
        return self._aims[fault.kind](fault)

    def close(self) -> None:
        """End what was begun: frozen workers go on, a full disk has space again."""
        self._end(list(self._endings))

    def _carry_out(self, fault: Fault, step: int) -> None:
        record: dict[str, Any] = {"kind": fault.kind, "step": fault.at_step, "at": step}
        try:
            aim = self.aim(fault)
            record |= {"victim": aim.victim, "outcome": "done", **aim.details}
            record |= aim.strike() or {}
        except NotNow as reason:
            log.debug("%s at step %d waits: %s", fault.kind, fault.at_step, reason)
            return
        except Impossible as reason:
            record |= {"victim": None, "outcome": "skipped", "reason": str(reason)}
        except Exception as error:  # one fault that cannot be done must not stop the others
            record |= {"outcome": "failed", "reason": last_line(error)}
        self.pending.remove(fault)
        record["time"] = round(time.time(), 3)
        self.done.append(record)
        self._say(record)

    def _end(self, endings: list[tuple[float, Callable[[], None]]]) -> None:
        for ending in endings:
            self._endings.remove(ending)
            try:
                ending[1]()
            except (NotNow, Impossible) as reason:
                log.debug("nothing to end: %s", reason)

    def _end_later(self, seconds: float, end: Callable[[], None]) -> None:
        self._endings.append((time.monotonic() + seconds, end))

    # -- workers -----------------------------------------------------------------------------------

    def _aim_kill(self, fault: Fault) -> Aim:
        rank, worker = self._worker(fault)
        return self._at_worker(rank, worker, partial(self._signal, worker, signal.SIGKILL))

    def _aim_freeze(self, fault: Fault) -> Aim:
        rank, worker = self._worker(fault)

        def go_on() -> None:
            self._struck.discard(worker)
            self._target.signal_worker(worker, signal.SIGCONT)

        def strike() -> dict[str, Any]:
            self._signal(worker, signal.SIGSTOP)
            if fault.seconds is not None:
                self._end_later(fault.seconds, go_on)
            return {"seconds": fault.seconds}

        return self._at_worker(rank, worker, strike)

    def _at_worker(
        self, rank: int | None, worker: TrainWorker, strike: Callable[[], dict[str, Any] | None]
    ) -> Aim:
        name = "a train worker" if rank is None else f"rank {rank}"
        return Aim(
            f"{name} (process {worker.pid} on node {worker.node_id})",
            strike,
            {"rank": rank, "pid": worker.pid, "node": worker.node_id},
        )

    def _signal(self, worker: TrainWorker, signum: int) -> None:
        self._target.signal_worker(worker, signum)
        self._struck.add(worker)

    def _worker(self, fault: Fault) -> tuple[int | None, TrainWorker]:
        """The worker that a fault strikes, and its rank where that is known."""
        found = [pair for pair in self._ranked() if pair[1] not in self._struck]
        if fault.rank is not None:
            found = [pair for pair in found if pair[0] == fault.rank]
        if not found:
            who = "train worker" if fault.rank is None else f"rank {fault.rank}"
            raise NotNow(f"there is no {who} that was not struck already")
        return found[pick(fault.choice, len(found))[0]]

    def _ranked(self) -> list[tuple[int | None, TrainWorker]]:
        """The run's workers in the order of their ranks; ranks are None while a group starts.

        On a node with several, the order of their start stands for that of their ranks.
        """
        workers = self._target.workers(self._driver())
        attempts = [
            event
            for event in self._storage.tail_records(EVENTS, _EVENTS_BYTES)
            if event.get("event") == "attempt"
        ]
        nodes = attempts[-1].get("nodes", []) if attempts else []
        if sorted(nodes) != sorted(worker.node_id for worker in workers):
            return [(None, worker) for worker in workers]
        return [
            (rank, workers.pop([worker.node_id for worker in workers].index(node)))
            for rank, node in enumerate(nodes)
        ]

    # -- nodes -------------------------------------------------------------------------------------

    def _aim_kill_node(self, fault: Fault) -> Aim:
        node_id, count = self._node(fault)

        def strike() -> None:
            self._target.kill_node(node_id)
            self._struck.add(node_id)

        return Aim(f"node {node_id} ({count} train workers)", strike, {"node": node_id})

    def _aim_drain(self, fault: Fault) -> Aim:
        node_id, count = self._node(fault)
        seconds = fault.seconds or 0.0

        def strike() -> dict[str, Any]:
            self._target.drain_node(node_id, seconds)
            self._struck.add(node_id)
            self._end_later(seconds, lambda: None)  # the target takes it then; it isn't over before
            return {"seconds": seconds}

        return Aim(f"node {node_id} ({count} train workers)", strike, {"node": node_id})

    def _node(self, fault: Fault) -> tuple[str, int]:
        """The node that a fault strikes: one with workers of the run; and with how many."""
        losable = set(self._target.losable_nodes()) - self._struck
        ranked = self._ranked()
        nodes = list(
            dict.fromkeys(
                worker.node_id
                for rank, worker in ranked
                if worker.node_id in losable and fault.rank in (None, rank)
            )
        )
        if not nodes:
            where = "train workers" if fault.rank is None else f"rank {fault.rank}"
            raise NotNow(f"there is no node with {where}, besides the head, that stays")
        node_id = nodes[pick(fault.choice, len(nodes))[0]]
        return node_id, sum(worker.node_id == node_id for _, worker in ranked)

    def _aim_add_node(self, fault: Fault) -> Aim:
        if not self._target.can_add_nodes:
            raise Impossible("no program can order a node here: an autoscaler or administrator can")
        return Aim("a new node", lambda: {"node": self._target.add_node()})

    # -- files and driver --------------------------------------------------------------------------

    def _aim_damage(self, fault: Fault) -> Aim:
        folder = newest_checkpoint(self._storage)
        if folder is None:
            raise NotNow("there is no committed checkpoint")

        def strike() -> dict[str, Any]:
            try:
                return {"damage": damage(folder, fault.how, fault.choice)}
            except FileNotFoundError as error:  # older than the last ones that are kept, by now
                raise NotNow(str(error)) from error

        return Aim(f"checkpoint {folder.url}", strike)

    def _aim_fill(self, fault: Fault) -> Aim:
        num_free = free_bytes(self._storage)
        if num_free is None:
            raise Impossible(f"{self._storage.url} is on no disk of this machine")

        def strike() -> dict[str, Any]:
            ballast = Ballast(self._storage.path)
            self._end_later(fault.seconds or 0.0, ballast.release)
            return {"bytes": ballast.num_bytes, "seconds": fault.seconds}

        return Aim(f"the filesystem of {self._storage.path} ({num_free:,} bytes free)", strike)

    def _aim_driver(self, fault: Fault) -> Aim:
        driver = self._driver()
        return Aim(
            f"the driver (process {driver.pid} on {driver.host})",
            partial(self._target.signal_driver, driver, signal.SIGKILL),
            {"pid": driver.pid},
        )

    def _driver(self) -> Driver:
        try:
            owner = self._storage.read_json(LOCK)
            return Driver(
                host=str(owner["host"]),
                pid=int(owner["pid"]),
                since=float(owner["since"]),
                pids=str(owner.get("pids", "")),
            )
        except (TypeError, KeyError, ValueError) as error:
            raise NotNow(f"nobody drives {self._storage.url}") from error


def last_step(run: Storage) -> int:
    """The last step that metrics.jsonl has; 0 where it has none."""
    records = run.tail_records(METRICS, _TAIL_BYTES)
    return int(records[-1]["step"]) if records else 0


def told(record: dict[str, Any]) -> str:
    """A record in one line."""
    line = f"step {record['step']:>8}  {record['kind']:<17}  {record.get('victim') or '-'}"
    more = [
        f"{name} {record[name]}"
        for name in ("seconds", "bytes", "damage")
        if record.get(name) is not None
    ]
    if "reason" in record:
        more.append(f"{record['outcome']}: {record['reason']}")
    return "; ".join([line, *more])
