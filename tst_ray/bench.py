"""Measurements of what a run costs on this machine: `tst-ray bench NAME`.

    recovery     SIGKILL of one of two workers → the first new step: where each second goes
    checkpoint   what the loop waits for a save in the background, against one in the foreground

Each returns plain facts; `print_facts` makes a table of them. They run the demo's model.
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tst_ray.errors import RunError
from tst_ray.journal import read_state
from tst_ray.metrics import EVENTS, METRICS
from tst_ray.storage import Storage

_PATIENCE_S = 300.0
_TAIL_BYTES = 1 << 16
_STEPS_BETWEEN = 150


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import ray
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cores": os.cpu_count(),
        "gpu": cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


# -- recovery ---


def recovery(kills: int = 3) -> dict[str, Any]:
    """Kill one of two workers, some times over, and follow what happens until training goes on.

    Returns:
        for each kill, seconds of each part, and from the kill to the end of the first new step.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Storage(f"{folder}/recovery")
        driver = _start_demo(folder)
        try:
            found = [_kill_and_follow(run, driver) for _ in range(kills)]
        finally:
            driver.send_signal(signal.SIGINT)
            driver.wait()
    parts = {name: statistics.median(one[name] for one in found) for name in found[0]}
    return {"kills": found, "median_s": parts, **machine()}


def _start_demo(folder: str) -> subprocess.Popen[bytes]:
    settings = {
        "run.name": "recovery",
        "run.storage": folder,
        "data.cache": os.path.abspath("runs/shards"),  # the demo's, where it has run here
        "tst.workers": 2,
        "train.steps": 1_000_000,
        "checkpoint.every": 100,
        "checkpoint.memory_every": 20,
    }
    command = [sys.executable, "-m", "tst_ray.run"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)


def _kill_and_follow(run: Storage, driver: subprocess.Popen[bytes]) -> dict[str, float]:
    attempt = int(read_state(run).get("attempt", 0)) or 1
    first = _first_step(run, attempt, driver)
    # Long enough for checkpoints.
    _wait(driver, lambda: _last(run)["step"] > first["step"] + _STEPS_BETWEEN, "some steps")
    victim = max(_train_workers(driver.pid))
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    new = _first_step(run, attempt + 1, driver)
    events = run.read_lines(EVENTS)
    failure = next(e for e in reversed(events) if e["event"] == "failure")
    began = next(e for e in reversed(events) if e["event"] == "attempt")
    times = began["times"]
    return {
        "noticed": failure["time"] - killed,
        "new group": times["entered"] - failure["time"],
        "model built": times["built"] - times["entered"],
        "checkpoint loaded": times["loaded"] - times["built"],
        "first batch": new["time"] - new["step_time_s"] + new["data_wait_s"] - times["loaded"],
        "first step": new["step_time_s"] - new["data_wait_s"],
        "in all": new["time"] - killed,
    }


def _first_step(run: Storage, attempt: int, driver: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The first line of metrics.jsonl that an attempt wrote, once it has."""
    found: list[dict[str, Any]] = []

    def written() -> bool:
        records = run.tail_records(METRICS, _TAIL_BYTES)
        found[:] = [record for record in records if record["attempt"] == attempt][:1]
        return bool(found)

    _wait(driver, written, f"the first step of attempt {attempt}")
    return found[0]


def _last(run: Storage) -> dict[str, Any]:
    return run.tail_records(METRICS, _TAIL_BYTES)[-1]


def _wait(driver: subprocess.Popen[bytes], condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if driver.poll() is not None:
            raise RunError(f"the measured run ended by itself (exit status {driver.returncode})")
        if time.monotonic() > deadline:
            raise RunError(f"waited {_PATIENCE_S:.0f} s in vain for {what}")
        time.sleep(0.01)


def _train_workers(driver_pid: int) -> list[int]:
    """The processes of Ray Train's workers that a driver's own Ray started."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat[1])
    found = []
    for pid, title in titles.items():
        if b"RayTrainWorker" not in title:
            continue
        above = pid
        while above > 1 and above != driver_pid:
            above = parents.get(above, 0)
        if above == driver_pid:
            found.append(pid)
    return found


# -- checkpoint ---


def checkpoint(saves: int = 10) -> dict[str, Any]:
    """Save the demo's model and optimizer, one process, in the foreground and in the background."""
    import torch

    from tst_ray.architecture import hf_config
    from tst_ray.checkpoint import Checkpointer
    from tst_ray.config import load_config
    from tst_ray.model import build_model
    from tst_ray.optim import build_optimizer
    from tst_ray.worker import full_state

    config = load_config(None, [])
    model = build_model(
        hf_config(config.model, vocab_size=config.data.vocab_size, eot_token=0), seed=0
    )
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = full_state(model, optimizer)
    seconds: dict[str, list[float]] = {"foreground": [], "background": []}
    with tempfile.TemporaryDirectory() as folder:
        for kind, waits in seconds.items():
            saver = Checkpointer(
                Storage(f"{folder}/{kind}"),
                keep=2,
                background=kind == "background",
                on_event=lambda name, **details: None,
            )
            for step in range(1, saves + 1):
                started = time.perf_counter()
                saver.save(step, state, {})
                waits.append(time.perf_counter() - started)
                saver.wait()
    medians = {f"{kind}_s": statistics.median(waits) for kind, waits in seconds.items()}
    share = medians["background_s"] / medians["foreground_s"]
    return {"median_s": {**medians, "background/foreground": share}, **machine()}


BENCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "recovery": recovery,
    "checkpoint": checkpoint,
}


def print_facts(name: str, facts: dict[str, Any]) -> None:
    """The medians as a table, and what they were measured on."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(name)
    table.add_column("seconds (median)", justify="right")
    for part, seconds in facts["median_s"].items():
        table.add_row(part, f"{seconds:.4f}" if seconds < 0.1 else f"{seconds:.2f}")
    console.print(table)
    told = ", ".join(f"{key} {value}" for key, value in facts.items() if key in machine() and value)
    console.print(told)
