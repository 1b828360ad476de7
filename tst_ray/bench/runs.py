"""What Ray and safety cost a run: runs of the demo's model, started as people start them.

startup    the command → the first optimizer step, its shards prepared
step       steps under Ray Train and Ray Data, against a bare PyTorch loop
switch     the last step of phase one → the first of phase two
recovery   SIGKILL of one of two workers → the first new step: where each second goes
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tst_ray.bench.measure import Figure
from tst_ray.config import load_config
from tst_ray.errors import RunError
from tst_ray.journal import read_state
from tst_ray.metrics import EVENTS, METRICS
from tst_ray.plan import Phase, build_plan
from tst_ray.storage import Storage

_PATIENCE_S = 300.0
_TAIL_BYTES = 1 << 16
_STEPS_BETWEEN = 150  # long enough for checkpoints
_WARM_STEPS = 20

Settings = dict[str, Any]
Records = list[dict[str, Any]]


# -- runs -----------------------------------------------------------------------------------------


class _Run:
    """A run of the demo's corpus and model, its driver a process of its own."""

    def __init__(self, folder: str, name: str, settings: Settings) -> None:
        self.storage = Storage(f"{folder}/{name}")
        settings = {"run.name": name, "run.storage": folder, "data.cache": _shards()} | settings
        command = [sys.executable, "-m", "tst_ray.run"]
        command += [f"--{key}={value}" for key, value in settings.items()]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.started = time.time()
        self.driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so; the run must not end before."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            if self.driver.poll() is not None:
                raise RunError(f"the measured run ended (exit status {self.driver.returncode})")
            if time.monotonic() > deadline:
                raise RunError(f"waited {_PATIENCE_S:.0f} s in vain for {what}")
            time.sleep(0.01)

    def finish(self) -> Records:
        """Wait for its end; its steps."""
        if self.driver.wait() != 0:
            raise RunError(f"the measured run failed (exit status {self.driver.returncode})")
        return self.storage.read_lines(METRICS)

    def records(self) -> Records:
        """The newest lines of metrics.jsonl."""
        return self.storage.tail_records(METRICS, _TAIL_BYTES)

    def first_of(self, attempt: int) -> dict[str, Any]:
        """The first step that an attempt finished, once it has."""
        found: Records = []

        def written() -> bool:
            found[:] = [r for r in self.records() if r["attempt"] == attempt][:1]
            return bool(found)

        self.wait(written, f"the first step of attempt {attempt}")
        return found[0]


@contextlib.contextmanager
def _running(name: str, **settings: Any) -> Iterator[_Run]:
    """A run, stopped and removed at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(folder, name, {key.replace("__", "."): v for key, v in settings.items()})
        try:
            yield run
        finally:
            run.driver.send_signal(signal.SIGINT)
            run.driver.wait()


def _shards() -> str:
    """The demo's shards, where it has run here."""
    return os.path.abspath("runs/shards")


def prepared_demo() -> None:
    """Have the demo's shards."""
    from tst_ray.coordinator import prepare_only

    config = load_config(None, [f"--data.cache={_shards()}", "--cluster.backend=inline"])
    prepare_only(config, lambda text: None)


# -- startup --------------------------------------------------------------------------------------


def startup(times: int = 3) -> list[Figure]:
    """Seconds from the command to the end of the first step, and of `tst-ray --help`."""
    prepared_demo()
    seconds = []
    for _ in range(times):
        with _running("startup", train__steps=1_000_000) as run:
            seconds.append(run.first_of(1)["time"] - run.started)
    helps = []
    for _ in range(times):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "tst_ray.cli", "--help"], stdout=subprocess.DEVNULL, check=True
        )
        helps.append(time.perf_counter() - started)
    return [
        Figure("the command to the first step", statistics.median(seconds), "s", 12.0),
        Figure("tst-ray --help", statistics.median(helps), "s", 0.5),
    ]


# -- step -----------------------------------------------------------------------------------------

_SIZES = {  # so that a step takes about 30 ms, or more than 100, on one core of 2026
    "demo": (16, 0.90),
    "8 x the batch": (128, 0.97),
}


def step() -> list[Figure]:
    """Steps under Ray on one worker against a bare loop in one process, and phase against phase.

    Both on the GPU where there is one.
    """
    import torch

    prepared_demo()
    figures = []
    for name, (batch_size, at_least) in _SIZES.items():
        steps = 300 if batch_size == 16 else 100
        for bag_size, most in ((4, 1.05), (16, 1.10)):
            settings = {
                "train.batch_size": batch_size,
                "train.steps": steps,
                "train.threads": 1,
                "tst.bag_size": bag_size,
                "tst.ratio": 0.5,
                "cluster.workers": 1,
                "cluster.gpus_per_worker": int(torch.cuda.is_available()),
                "metrics.val_sequences": 1,
            }
            bare = _bare_loop(settings, 40 if batch_size == 16 else 15)
            records = _trained(settings)
            again = _bare_loop(settings, 40 if batch_size == 16 else 15)
            bare = [statistics.mean(pair) for pair in zip(bare, again, strict=True)]
            under_ray = [_step_s([r for r in records if r["phase"] == phase]) for phase in (0, 1)]
            for phase, kind in enumerate((f"bags of {bag_size}", "next token")):
                if phase == 1 and bag_size == 16:
                    continue  # measured with bags of 4
                figures += [
                    Figure(f"{name}, {kind}: bare loop", bare[phase], "s"),
                    Figure(
                        f"{name}, {kind}: speed under Ray against it",
                        bare[phase] / under_ray[phase], "x", at_least=at_least,
                    ),
                ]  # fmt: skip
            figures.append(
                Figure(
                    f"{name}: a step in bags of {bag_size} against one of next tokens",
                    under_ray[0] / under_ray[1], "x", most,
                )
            )  # fmt: skip
    return figures


def _trained(settings: Settings) -> Records:
    with tempfile.TemporaryDirectory() as folder:
        return _Run(folder, "step", settings).finish()


def _step_s(records: Records) -> float:
    """Seconds a step, all between two steps included; the median, so without the odd save."""
    times = [record["time"] for record in records[_WARM_STEPS:]]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def _bare_loop(settings: Settings, steps: int) -> list[float]:
    """Median seconds of a step of each phase in a loop over tensors already in memory.

    In a process of its own, as a worker is.
    """
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    code = f"from tst_ray.bench.runs import bare_steps; bare_steps({overrides!r}, {steps})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [float(value) for value in done.stdout.split()]


def bare_steps(overrides: list[str], steps: int) -> None:
    """Print the median seconds of a step of each phase: what `_bare_loop` runs."""
    import torch

    from tst_ray.model import build_model
    from tst_ray.model_config import hf_config
    from tst_ray.optim import build_optimizer, clip_grad_norm

    config = load_config(None, overrides)
    torch.set_num_threads(config.train.threads or 1)
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    model = build_model(
        hf_config(config.model, vocab_size=config.data.vocab_size, eot_token=0),
        seed=0,
        device=device,
    )
    optimizer = build_optimizer(model, config.train)

    def train(phase: Phase) -> float:
        rows = (phase.num_sequences, phase.latent_length + 1)
        shape = rows if phase.bag_size == 1 else (*rows, phase.bag_size)
        tokens = torch.randint(config.data.vocab_size, shape, device=device)
        started = time.perf_counter()
        model(tokens, phase).objective.backward()
        float(clip_grad_norm(model, config.train.clip_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    for phase in build_plan(config).phases:
        seconds = [train(phase) for _ in range(steps)]
        print(statistics.median(seconds[5:]))


# -- switch ---------------------------------------------------------------------------------------


def switch() -> list[Figure]:
    """The pause between the phases: in one worker group, and from one worker to two."""
    prepared_demo()
    # No checkpoint falls on the step between.
    settings = {"train.steps": 300, "tst.ratio": 0.5, "metrics.val_sequences": 1}
    inside = _trained({**settings, "cluster.workers": 1, "tst.workers": 1})
    steps = _step_s([record for record in inside if record["phase"] == 1])
    across = _pause(_trained({**settings, "cluster.workers": 2, "tst.workers": 1}))
    restart = recovery(kills=1)[-1].value
    return [
        Figure("same workers: last step to first step", _pause(inside), "s"),
        Figure("the same, in steps", _pause(inside) / steps, "x", 2.0),
        Figure("other workers: last step to first step", across, "s"),
        Figure("the same, against a restart after a kill", across / restart, "x", 1.3),
    ]


def _pause(records: Records) -> float:
    """Seconds from the end of phase one's last step to the end of phase two's first."""
    last = max(record["time"] for record in records if record["phase"] == 0)
    return min(record["time"] for record in records if record["phase"] == 1) - last


# -- recovery -------------------------------------------------------------------------------------


def recovery(kills: int = 3) -> list[Figure]:
    """Kill one of two workers, some times over, and follow what happens until training goes on."""
    prepared_demo()
    with _running(
        "recovery", tst__workers=2, train__steps=1_000_000, checkpoint__every=100,
        checkpoint__memory_every=20,
    ) as run:  # fmt: skip
        found = [_kill_and_follow(run) for _ in range(kills)]
    figures = [
        Figure(name, statistics.median(one[name] for one in found), "s") for name in found[0]
    ]
    every = ", ".join(f"{one['in all']:.1f}" for one in found)
    in_all = figures[-1]
    return [*figures[:-1], Figure(f"in all, median of {every}", in_all.value, "s", 10.0)]


def _kill_and_follow(run: _Run) -> dict[str, float]:
    attempt = int(read_state(run.storage).get("attempt", 0)) or 1
    first = run.first_of(attempt)
    run.wait(lambda: run.records()[-1]["step"] > first["step"] + _STEPS_BETWEEN, "some steps")
    victim = max(_train_workers(run.driver.pid))
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    new = run.first_of(attempt + 1)
    events = run.storage.read_lines(EVENTS)
    failure = next(e for e in reversed(events) if e["event"] == "failure")
    times = next(e for e in reversed(events) if e["event"] == "attempt")["times"]
    return {
        "noticed": failure["time"] - killed,
        "new group": times["entered"] - failure["time"],
        "checkpoint found": times["verified"] - times["entered"],
        "model built": times["built"] - times["verified"],
        "checkpoint loaded": times["loaded"] - times["built"],
        "first batch": new["time"] - new["step_time_s"] + new["data_wait_s"] - times["loaded"],
        "first step": new["step_time_s"] - new["data_wait_s"],
        "in all": new["time"] - killed,
    }


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
