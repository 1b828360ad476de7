"""The watchdog and its bounds, on processes of their own: stopped, stuck, and well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tst_ray import timeouts
from tst_ray.storage import Storage
from tst_ray.timeouts import Bounds

PATIENCE_S = 60.0

WORKER = """
import sys, threading, time
from tst_ray.timeouts import Bounds
from tst_ray.watchdog import Watchdog
dog = Watchdog({run!r}, Bounds({least}, {least}), attempt=3, rank=1)
dog.expect("step", 7)
def where_it_stands():
    print("ready", flush=True)
    {body}
where_it_stands()
dog.close()
print("done", flush=True)
"""


def start(run: Storage, body: str, least: float) -> subprocess.Popen[str]:
    code = WORKER.format(run=run.url, body=body, least=least)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def watchdogs(run: Storage) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"tst_ray.watchdog" in command and run.url.encode() in command:
                found.append(int(folder.name))
    return found


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "run"))
    storage.make()
    return storage


@pytest.mark.parametrize(
    "body",
    ["time.sleep(1000)", "import re; re.match(r'(a+)+$', 'a' * 60 + 'b')"],
    ids=["sleeps", "keeps the interpreter's lock"],
)
def test_a_worker_that_hangs_is_ended_and_says_where(run: Storage, body: str) -> None:
    process = start(run, body, least=0.5)
    assert process.wait(timeout=PATIENCE_S) < 0
    wait_for(lambda: run.read_lines("events.jsonl"), "the event")
    (event,) = run.read_lines("events.jsonl")
    assert (event["event"], event["rank"], event["attempt"]) == ("hang", 1, 3)
    assert (event["step"], event["during"], event["allowed_s"]) == (7, "step", 0.5)
    assert "where_it_stands" in run.read(event["stacks"]).decode()
    wait_for(lambda: not watchdogs(run), "the watchdog ends")


def test_a_stopped_worker_is_ended_too(run: Storage) -> None:
    process = start(run, "[None for _ in iter(lambda: dog.expect('step', 8), 1)]", least=1.5)
    os.kill(process.pid, signal.SIGSTOP)
    assert process.wait(timeout=PATIENCE_S) < 0
    wait_for(lambda: run.read_lines("events.jsonl"), "the event")
    (event,) = run.read_lines("events.jsonl")
    assert event["step"] in (7, 8)
    assert "where_it_stands" in run.read(event["stacks"]).decode()


def test_a_worker_that_beats_lives_and_its_watchdog_ends_with_it(run: Storage) -> None:
    body = "[(dog.expect('step', n), time.sleep(0.1)) for n in range(20)]"
    process = start(run, body, least=1.5)
    assert process.wait(timeout=PATIENCE_S) == 0
    assert run.read_lines("events.jsonl") == []
    wait_for(lambda: not watchdogs(run), "the watchdog ends")


def test_a_killed_workers_watchdog_ends_and_tells_no_hang(run: Storage) -> None:
    process = start(run, "time.sleep(1000)", least=1000)
    wait_for(lambda: watchdogs(run), "the watchdog starts")
    process.kill()
    process.wait()
    wait_for(lambda: not watchdogs(run), "the watchdog ends")
    assert run.read_lines("events.jsonl") == []


def test_nothing_is_left_of_a_worker_and_a_watchdog_that_are_both_killed(
    run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process = start(run, "time.sleep(1000)", least=1000)
    wait_for(lambda: watchdogs(run), "the watchdog starts")
    for pid in [*watchdogs(run), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not watchdogs(run), "the watchdog ends")
    assert list(scratch.iterdir()) == []


def test_bounds_follow_the_runs_own_times() -> None:
    bounds = Bounds(least_s=60.0, unknown_s=600.0)
    assert bounds.bound_s("step") == 600.0
    for seconds in (1.0, 2.0, 30.0):
        bounds.saw("step", seconds)
    assert bounds.bound_s("step") == 300.0
    assert bounds.bound_s("save") == 600.0
    for _ in range(200):
        bounds.saw("step", 0.03)
    assert bounds.bound_s("step") == 60.0


def test_storage_that_is_slow_is_no_hang() -> None:
    """The copy of a state takes a second, its way to storage minutes: one says nothing of both."""
    bounds = Bounds(least_s=60.0, unknown_s=600.0)
    for _ in range(10):
        bounds.saw("save", 1.0)
        bounds.saw(timeouts.COMMIT, 0.5)
    assert bounds.bound_s("save") == 60.0
    assert bounds.bound_s(timeouts.COMMIT) == 600.0
    bounds.saw(timeouts.COMMIT, 120.0)
    assert bounds.bound_s(timeouts.COMMIT) == 1200.0
    bounds.saw(timeouts.COMMIT, 1200.0)
    assert bounds.bound_s(timeouts.COMMIT) == timeouts.COLLECTIVE_S


def test_what_is_forgotten_is_unknown_again() -> None:
    """A phase's first step may compile; how long those of the one before took says nothing."""
    bounds = Bounds(least_s=60.0, unknown_s=600.0)
    for _ in range(10):
        bounds.saw("step", 1.0)
        bounds.saw("evaluation", 1.0)
    bounds.forget("step", "data")
    assert (bounds.bound_s("step"), bounds.bound_s("evaluation")) == (600.0, 60.0)


def test_each_time_out_fits_into_the_next() -> None:
    from tst_ray.settings import FaultConfig

    fault = FaultConfig()
    assert fault.hang_s is not None
    assert fault.hang_s > timeouts.STOP_POLL_S
    assert timeouts.GROUP_POLL_S < timeouts.ABORT_GRACE_S < fault.hang_s
    assert fault.start_s > timeouts.STORAGE_S
    assert fault.hang_s < fault.start_s < timeouts.COLLECTIVE_S < timeouts.WORKER_ANSWER_S
