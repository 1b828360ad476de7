"""What a worker group leaves in the run directory while it trains, and what it is told there.

    run.json            where the run stands, and its account of time; replaced as a whole
    metrics.jsonl       a line a step (metrics.py)
    events.jsonl        a line for each thing that happened
    control.json        a wish of the driver: stop after the step you are at
    passed_over.json    steps whose data was found offending, and is not trained on

Every rank holds a `Journal`; rank 0's writes, the others' only know the attempt. A group that was
overtaken by a newer attempt (workers can outlive a driver that was killed) must not write any more,
and finds that out here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tst_ray.background import Background
from tst_ray.errors import RunError
from tst_ray.goodput import Account
from tst_ray.metrics import METRICS, MetricsLog, drop_after, recent_records, try_event
from tst_ray.plan import Plan
from tst_ray.storage import Storage, patiently
from tst_ray.timeouts import STOP_POLL_S

STATE, CONTROL, PASSED_OVER = "run.json", "control.json", "passed_over.json"
_STATE_EVERY_S = 1.0
_REMOTE_STATE_EVERY_S = 10.0  # an object store takes a tenth of a second

log = logging.getLogger(__name__)


# -- small files -----------------------------------------------------------------------------------


def read_state(run: Storage) -> dict[str, Any]:
    """run.json; empty for a run that has not started."""
    return run.read_json(STATE) or {}


def update_state(run: Storage, **changes: Any) -> None:
    """Change fields of run.json, keeping the others."""
    run.write_json(STATE, {**read_state(run), **changes, "updated": round(time.time(), 3)})


def charge(run: Storage, part: str) -> None:
    """Charge the time since the run's account was last written to a part (goodput.py)."""
    try:
        now = time.time()
        account = Account.from_dict(read_state(run).get("time"), now)
        account.charge(part, now)
        update_state(run, time=account.to_dict())
    except OSError as error:  # what follows is charged with it
        log.warning("the account of time is late: %s", error)


def request_stop(run: Storage, reason: str) -> None:
    """Ask the group that trains to save a checkpoint and end after its step."""
    run.write_json(CONTROL, {"stop": reason, "time": round(time.time(), 3)})


def clear_stop(run: Storage) -> None:
    """Forget a request to stop: the next group starts without one."""
    run.remove(CONTROL)


def read_passed_over(run: Storage) -> list[dict[str, Any]]:
    """The roll-backs of a run: `first_step`, `last_step` (both passed over), `why`, `back_to`."""
    return list(run.read_json(PASSED_OVER) or [])


class StopRequest:
    """Watches for `control.json`, away from the loop."""

    def __init__(self, run: Storage) -> None:
        self.reason: str | None = None
        self._run, self._done = run, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-request", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(STOP_POLL_S):
            try:
                wish = self._run.read_json(CONTROL)
            except Exception as error:  # storage that fails now may answer at the next look
                log.warning("%s cannot be read: %s", CONTROL, error)
                continue
            if wish:
                self.reason = str(wish["stop"])
                return

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        self._thread.join()


# -- the journal -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """Who writes: which rank of how many, and on which nodes they all are."""

    rank: int
    world_size: int
    nodes: tuple[str, ...] = ()


class Journal:
    """One attempt's part of the run directory.

    Args:
        run: the run directory.
        plan: the run's.
        writer: this worker.
    """

    def __init__(self, run: Storage, plan: Plan, writer: Writer) -> None:
        self.run, self._plan, self._writer = run, plan, writer
        self.attempt = int(patiently(lambda: read_state(run)).get("attempt", 0)) + 1
        self.account = Account(time.time())
        self._metrics: MetricsLog | None = None
        self._background = Background("journal")
        self._stop: StopRequest | None = None
        self._state_at = 0.0
        self._eval_s = self._stall_s = 0.0
        self._started_at = 0

    @property
    def writes(self) -> bool:
        """Whether this is rank 0's."""
        return self._writer.rank == 0

    def begin(self, step: int, tensorboard_every: int, config_text: str, **facts: Any) -> None:
        """Open the logs behind `step` finished steps; what was logged after them is dropped.

        Args:
            facts: what the event "attempt" says besides.
        """
        if not self.writes:
            return
        state = patiently(lambda: read_state(self.run))
        self.account = Account.from_dict(state.get("time"), time.time())
        dropped = drop_after(self.run, step)
        self.account.repeat(
            sum(record["step_time_s"] - record.get("data_wait_s", 0.0) for record in dropped)
        )
        # Where lines go to an object store now and then, the last steps may have none.
        repeated = max(len(dropped), int(state.get("step", 0)) - step)
        self._metrics = MetricsLog(self.run, step, tensorboard_every, config_text)
        self._stop = StopRequest(self.run)
        self._started_at = step
        # Where the reading of data begins; it may not be missing, or be of the attempt before.
        patiently(lambda: self._write_state(self._state(step)))
        details = {"nodes": list(self._writer.nodes)} if self._writer.nodes else {}
        self.event(
            "attempt",
            step=step,
            attempt=self.attempt,
            world_size=self._writer.world_size,
            repeated_steps=repeated,
            **details,
            **facts,
        )

    def step_began(self) -> None:
        """A phase's first batch is asked for: what came before was starting, or saving."""
        if self.writes:
            fresh = self.attempt == 1 and self._started_at == 0
            self._charge("startup" if fresh else "restart", time.time())

    def timing(self, *, eval_s: float = 0.0, stall_s: float = 0.0) -> None:
        """Seconds since the last step was logged that were not spent on stepping."""
        self._eval_s += eval_s
        self._stall_s += stall_s

    def log(self, record: dict[str, Any]) -> None:
        """Write a step's record, and now and then where the run stands."""
        if self._metrics is None:
            return
        now = time.time()
        self._charge("stepping", now, data_wait=record["data_wait_s"])
        told = {name: value for name, value in record.items() if value is not None}
        told |= {"loss": record["loss"], "time": round(now, 3)}
        told["goodput"] = round(self.account.goodput, 4)
        times = {f"time_{part}_s": seconds for part, seconds in self.account.parts.items()}
        self._metrics.write(told, times)
        every_s = _STATE_EVERY_S if self.run.is_local else _REMOTE_STATE_EVERY_S
        state_is_due = time.monotonic() - self._state_at > every_s
        if state_is_due or self._metrics.is_due():
            state = self._state(record["step"]) if state_is_due else None
            if self._background.start(lambda: self._publish(state)) and state_is_due:
                self._state_at = time.monotonic()

    def _charge(self, part: str, now: float, **within: float) -> None:
        """Charge the time since the last charge to a part, less what else was told of it."""
        told = {"evaluation": self._eval_s, "checkpoint_stall": self._stall_s}
        self.account.charge(part, now, **within, **told)
        self._eval_s = self._stall_s = 0.0

    def _publish(self, state: dict[str, Any] | None) -> None:
        """Beside the loop: make the lines stand, and replace run.json where there is a new one."""
        if self._metrics is not None:
            self._metrics.publish()
        if state is not None:
            self._try_state(state)

    def recent(self, count: int) -> list[dict[str, Any]]:
        """The last records logged; empty on ranks other than 0."""
        return recent_records(self.run, count) if self.writes else []

    def flush(self) -> None:
        """Make all lines so far stand: a committed step is not trained again. From any thread.

        Raises:
            OSError: storage does not take them.
        """
        if self._metrics is not None:
            self._background.run(self._metrics.flush)
            self.run.sync(METRICS)

    def stop_reason(self) -> str | None:
        """Why the driver wants the group to stop; None where it does not (or on other ranks)."""
        return self._stop.reason if self._stop else None

    def event(self, kind: str, **details: Any) -> None:
        """Add an event; rank 0 only. An event that storage does not take is a warning."""
        if self.writes:
            try_event(self.run, kind, **details)

    def write_state(self, step: int) -> None:
        """Replace run.json; where storage takes none, the old one stands.

        Raises:
            RunError: another attempt has taken over; this one must not write any more.
        """
        state = self._state(step)
        self._background.run(lambda: self._try_state(state))

    def _try_state(self, state: dict[str, Any]) -> None:
        try:
            self._write_state(state)
        except OSError as error:
            log.warning("%s stays as it was: %s", STATE, error)

    def _write_state(self, state: dict[str, Any]) -> None:
        before = read_state(self.run)
        self.check_current(before)
        self.run.write_json(STATE, {**state, "ray_address": before.get("ray_address")})

    def _state(self, step: int) -> dict[str, Any]:
        """What run.json says after `step` steps."""
        done = step >= self._plan.total_steps
        return {
            "status": "running",
            "phase": self._plan.phases[-1].index if done else self._plan.phase_at(step).index,
            "step": step,
            "total_steps": self._plan.total_steps,
            "world_size": self._writer.world_size,
            "attempt": self.attempt,
            "attempt_from": self._started_at,
            "nodes": list(self._writer.nodes),
            "updated": round(time.time(), 3),
            "time": self.account.to_dict(),
        }

    def is_current(self) -> bool:
        """Whether no newer attempt has started."""
        return self._is_current(read_state(self.run))

    def check_current(self, state: dict[str, Any] | None = None) -> None:
        """Raises RunError where a newer attempt has started.

        Args:
            state: run.json, where it was read just now.
        """
        if not self._is_current(read_state(self.run) if state is None else state):
            raise RunError("another attempt of this run has taken over; this one ends")

    def _is_current(self, state: dict[str, Any]) -> bool:
        return int(state.get("attempt", 0)) <= self.attempt

    def pass_over(self, facts: dict[str, Any]) -> None:
        """Add a roll-back to the run's list; what it names is not trained on from now on."""
        self.run.write_json(PASSED_OVER, [*read_passed_over(self.run), facts])

    def finish(self, step: int) -> None:
        """Say where the run stands at the end of this attempt."""
        if self._metrics is not None:
            self._background.run(self._metrics.publish)
            self.account.charge("checkpoint_stall", time.time())
            self.write_state(step)

    def close(self) -> None:
        """Close the logs, however the attempt ended; no write may follow."""
        if self._stop is not None:
            self._stop.close()
        self._background.close()
        if self._metrics is not None:
            self._metrics.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def steps_passed_over(rollbacks: list[dict[str, Any]]) -> Callable[[int], bool]:
    """Whether a step (by the steps finished before it) is one whose data is passed over."""
    ranges = [(int(facts["first_step"]), int(facts["last_step"])) for facts in rollbacks]
    return lambda step: any(first <= step <= last for first, last in ranges)
