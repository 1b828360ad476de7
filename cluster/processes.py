"""Processes on the machine where this runs, as /proc has them, and signals to them.

Ray tasks carry these functions to the nodes of a cluster, where this package need not be installed:
so they use nothing but the standard library, and nothing of this package.

A process id alone is not enough to send a signal to: its process may have ended, and the number may
be another's by now, of another cluster even. Each function checks whose it is first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_CLOCK_SLACK_S = 2.0  # the boot time in /proc/stat is rounded to seconds


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    fields = _stat(pid)  # once: it may end any moment
    return bool(fields) and fields[0] != "Z"


def descendants(pid: int) -> list[int]:
    """The processes that a process started, those that they started, and so on."""
    children: dict[int, list[int]] = {}
    for other in _all_pids():
        if fields := _stat(other):
            children.setdefault(int(fields[1]), []).append(other)
    found = [pid]
    for parent in found:  # grows while it is walked
        found += children.get(parent, [])
    return found[1:]


def end_tree(pid: int) -> list[int]:
    """SIGKILL a process and all its descendants, as when their machine goes; the ids of all."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # it must start nothing new between the listing and the end
    tree = [pid, *descendants(pid)]
    for each in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return tree


def signal_ray_worker(pid: int, signum: int, raylet_pid: int | None = None) -> None:
    """Send a signal to a worker of one raylet.

    Args:
        raylet_pid: that raylet; the one that runs this task, unless given.

    Raises:
        ProcessLookupError: no worker of that raylet has this process id (any more).
    """
    ours = raylet_pid or int(os.environ["RAY_RAYLET_PID"])
    if not is_running(pid) or not _is_worker_of(pid, ours):
        raise ProcessLookupError(f"process {pid} is no worker of raylet {ours} (any more)")
    os.kill(pid, signum)


def signal_older_process(pid: int, signum: int, started_before: float, pids: str = "") -> None:
    """Send a signal to a process, if it started before a time (Unix seconds).

    Args:
        pids: the namespace of its number; empty for any.

    Raises:
        ProcessLookupError: it has ended; one that started later is another, and so is one of that
            number outside of its container.
    """
    if not is_running(pid) or _started(pid) > started_before + _CLOCK_SLACK_S:
        raise ProcessLookupError(f"process {pid} has ended")
    if pids and os.readlink(f"/proc/{pid}/ns/pid") != pids:
        raise ProcessLookupError(f"process {pid} is another than its container's")
    os.kill(pid, signum)


def end_this_node(at: float) -> Iterator[str]:
    """As a Ray task: end the raylet that runs it, with all that it started, and so the task itself.

    Args:
        at: when (Unix seconds).

    Yields:
        this machine's name, once the task runs.
    """
    yield os.uname().nodename
    time.sleep(max(at - time.time(), 0.0))
    end_tree(int(os.environ["RAY_RAYLET_PID"]))


def _is_worker_of(pid: int, raylet: int) -> bool:
    named = _environment(pid).get("RAY_RAYLET_PID")
    if named is not None:
        return named == str(raylet)
    # Forked by servers of a driver that started the raylet too.
    server = _parent(pid)
    while b"tst_ray.forkserver" in _command(_parent(server)):
        server = _parent(server)
    forked = b"tst_ray.forkserver" in _command(server)
    return forked and 1 < _parent(server) == _parent(raylet)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    """The process that started another; 0 where that is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _environment(pid: int) -> dict[str, str]:
    """A process's environment as it was when it started."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.partition("=")[::2] for line in content.split("\0") if "=" in line)


def _started(pid: int) -> float:
    """When a process started (Unix seconds)."""
    ticks = int(_stat(pid)[19])
    lines = Path("/proc/stat").read_text().splitlines()
    booted = next(int(line.split()[1]) for line in lines if line.startswith("btime "))
    return booted + ticks / os.sysconf("SC_CLK_TCK")
