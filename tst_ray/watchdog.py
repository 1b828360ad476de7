"""A process beside each worker that ends it when it hangs, and says where it hung.

    worker ──beat: kind, seconds allowed──> pipe ──> watchdog process
                                                        │ the next beat is late
                                                        ▼
                       every thread's stack → stacks/…; an event; SIGABRT, then SIGKILL

A thread of the worker could not do it: a stopped process (SIGSTOP), a call that never gives the
interpreter's lock back, or a dead filesystem would stop the thread too. The pipe is all they share:
when the worker ends, however it does, the pipe closes and the watchdog ends too.

The stacks are written by `faulthandler`, in C, by the worker itself on SIGABRT: so a process that
cannot run a line of Python still says where it stands. A stopped one is let go on (SIGCONT) with
that signal waiting for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tst_ray.timeouts import ABORT_GRACE_S, Bounds

STACKS = "stacks"
_LINE_BYTES = 512  # a beat is shorter, so a write of one is atomic (PIPE_BUF)


class Unwatched:
    """In place of a watchdog where nobody watches (`fault.hang_s: null`)."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def expect(self, kind: str, step: int) -> None:
        """The last beat is over; the next is of this `kind`, for the step after `step`."""

    def close(self) -> None:
        """End the watch: what comes next may take any time."""


class Watchdog(Unwatched):
    """The worker's side: starts the process and tells it what comes next.

    Args:
        run_url: the run directory, for the event and the stacks.
        bounds: how long each kind of beat may take.
        attempt, rank: whose watchdog it is.
    """

    def __init__(self, run_url: str, bounds: Bounds, attempt: int, rank: int) -> None:
        super().__init__(bounds)
        self._kind, self._since = "", time.monotonic()
        # Without a name, so that nothing is left of it however the two processes end.
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 — kept until close
        faulthandler.enable(self._stacks, all_threads=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGABRT must not write all memory out
        facts = {
            "run": run_url,
            "pid": os.getpid(),
            "rank": rank,
            "attempt": attempt,
            "stacks": self._stacks.fileno(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tst_ray.watchdog", json.dumps(facts)],
            stdin=subprocess.PIPE,
            pass_fds=[self._stacks.fileno()],
            start_new_session=True,  # what stops or ends the worker's group must not end this
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def expect(self, kind: str, step: int) -> None:
        now = time.monotonic()
        if self._kind:
            self.bounds.saw(self._kind, now - self._since)
        self._kind, self._since = kind, now
        beat = {"kind": kind, "step": step, "allow_s": round(self.bounds.bound_s(kind), 3)}
        # A watchdog that is gone, or too busy to read, must not stop the worker.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._pipe, json.dumps(beat).encode()[: _LINE_BYTES - 1] + b"\n")

    def close(self) -> None:
        faulthandler.disable()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._stacks.close()


def main(facts: dict[str, Any], pipe: int) -> None:
    """The process's side: wait for beats until the pipe closes or one is late."""
    beat: dict[str, Any] = {}
    buffer = b""
    deadline = None
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready, _, _ = select.select([pipe], [], [], left)
        if not ready:
            _end(facts, beat)
            return
        data = os.read(pipe, 1 << 16)
        if not data:  # the worker is gone, or wants no watchdog any more
            return
        *lines, buffer = (buffer + data).split(b"\n")
        if lines:
            beat = json.loads(lines[-1])
            deadline = time.monotonic() + beat["allow_s"]


def _end(facts: dict[str, Any], beat: dict[str, Any]) -> None:
    """End the hung worker, keep its stacks, and tell."""
    pid = facts["pid"]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGABRT)
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + ABORT_GRACE_S
        while time.monotonic() < deadline and _runs(pid):
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    # The event comes last: storage may be what hangs.
    from tst_ray.metrics import add_event
    from tst_ray.storage import Storage

    run = Storage(facts["run"])
    name = f"{STACKS}/attempt-{facts['attempt']:04d}-rank-{facts['rank']:05d}.txt"
    with contextlib.suppress(OSError), open(facts["stacks"], "rb") as stacks:
        stacks.seek(0)  # the worker's own end of it stands behind what it wrote
        run.write(name, stacks.read())
    add_event(
        run,
        "hang",
        rank=facts["rank"],
        attempt=facts["attempt"],
        step=beat["step"],
        during=beat["kind"],
        allowed_s=beat["allow_s"],
        stacks=name,
    )


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    main(json.loads(sys.argv[1]), sys.stdin.fileno())
