"""Whether the driver of a run still lives, as far as can be seen from this machine.

driver.lock (hold.py: host, pid, pid namespace, since) + /proc ──> "running", "gone", None
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from tst_ray.errors import RunError
from tst_ray.hold import LOCK, pid_namespace
from tst_ray.storage import Storage

_CLOCK_SLACK_S = 10.0  # between the kernel's times of start and the clock of `since`


def driver_state(run: Storage, proc: Path = Path("/proc")) -> str | None:
    """Whether the process that drives a run is `running` or `gone`.

    None if that cannot be seen from here: it is on another machine or in another container, or no
    driver has left its name.
    """
    try:
        owner = run.read_json(LOCK) or {}
    except (RunError, OSError):
        return None
    seen_here = (owner.get("host"), owner.get("pids")) == (socket.gethostname(), pid_namespace())
    if not seen_here or not owner.get("pids") or "pid" not in owner:
        return None
    return "running" if _is_owner(owner, proc) else "gone"


def _is_owner(owner: dict[str, Any], proc: Path) -> bool:
    """Whether the process of that number is alive, and not a later one that got the number."""
    try:
        # the fields after the name, which is in brackets and may hold any character
        fields = (proc / str(owner["pid"]) / "stat").read_text().rpartition(")")[2].split()
        boot = next(
            line for line in (proc / "stat").read_text().splitlines() if line.startswith("btime")
        )
    except (OSError, StopIteration):
        return False
    state, ticks = fields[0], int(fields[19])
    started = int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return state not in "ZX" and started <= owner.get("since", 0.0) + _CLOCK_SLACK_S
