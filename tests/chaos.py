"""What the tests of fault injection share: a run directory as a driver leaves it, and waiting."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tst_ray.checkpoint import CheckpointInfo, folder_name, step_of, verify
from tst_ray.storage import Storage

ROOT = Path(__file__).parent.parent
PATIENCE_S = 180.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def start_run(run: Storage, step: int = 0, **owner: Any) -> Storage:
    """What a driver leaves in its run directory; 4321 drives it unless said otherwise."""
    run.make()
    host = {"host": socket.gethostname(), "pid": 4321, "since": time.time()}
    run.write_json("driver.lock", host | owner)
    run.write("config.yaml", "run: {}\n")
    run.write_json("plan.json", {"phases": [{"first_step": 0, "steps": 40}]})
    reach(run, step)
    return run


def reach(run: Storage, step: int) -> None:
    run.write("metrics.jsonl", "".join(f'{{"step": {k}}}\n' for k in range(1, step + 1)))


def start_attempt(run: Storage, *nodes: str) -> None:
    run.append("events.jsonl", json.dumps({"event": "attempt", "nodes": nodes}) + "\n")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def save_checkpoint(run: Storage, step: int) -> Storage:
    """A committed checkpoint of two small files."""
    import torch

    from tst_ray.checkpointer import Checkpointer

    saver = Checkpointer(
        run / "checkpoints", keep=3, background=False, on_event=lambda kind, **details: None
    )
    saver.save(step, {"w": torch.zeros(20)}, {})
    return run / "checkpoints" / folder_name(step)


def problem(folder: Storage) -> str | None:
    step = step_of(folder.url.rpartition("/")[2])
    assert step is not None
    return verify(CheckpointInfo(step, folder, {}))


@contextlib.contextmanager
def small_filesystem(folder: Path, megabytes: int) -> Iterator[Path]:
    """A filesystem of so many MiB at a new folder; skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
