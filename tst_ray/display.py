"""What a person sees while a run goes: a line for each stage, a bar for each phase, a summary.

Everything Ray and its workers print goes to a file instead (`Terminal.quiet`). On a terminal the
bars are live; elsewhere (a job's log) a line comes every few seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tst_ray.metrics import METRICS
from tst_ray.plan import Phase, Plan
from tst_ray.storage import Storage

_POLL_S = 0.5
_LINE_EVERY_S = 15.0
_TAIL_BYTES = 64 << 10
_TABLE_WIDTH = 110
_BARS_WIDTH = 120  # of a terminal that has room for bars beside the numbers
# The second: an interrupt has a line to say while one waits for a terminal that stands still.
_NOT_TAKEN = (OSError, RuntimeError)
_FIELDS = ("step", "phase", "loss", "lr", "tokens_per_s", "world_size", "step_time_s")


def plain_console(**options: Any) -> Console:
    """A console that shows text as it is: a path may have what rich takes for markup."""
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)


def wide_console() -> Console:
    """Standard output, wide enough for a table whatever it is piped into."""
    console = plain_console()
    console.width = max(console.width, _TABLE_WIDTH)
    return console


class _Out(io.TextIOWrapper):
    """Standard output, which a run can do without: a terminal may go, a pipe's reader end, a disk
    fill up. What it does not take is not shown."""

    def write(self, text: str) -> int:
        with contextlib.suppress(*_NOT_TAKEN):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*_NOT_TAKEN):
            super().flush()


class Terminal:
    """The user's terminal, which stays ours while descriptors 1 and 2 point to a log file."""

    def __init__(self) -> None:
        _flush()
        # errors: not every locale has our dashes
        out = _Out(os.fdopen(os.dup(1), "wb"), errors="replace", line_buffering=True)
        self.console = plain_console(file=out, force_terminal=os.isatty(1) or None)

    def say(self, text: str) -> None:
        """One line on what is being done."""
        self.console.print(text)

    @contextlib.contextmanager
    def quiet(self, log_path: str) -> Iterator[None]:
        """Send all other output of this process and its children to a file."""
        saved = os.dup(1), os.dup(2)
        _flush()
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        try:
            yield
        finally:
            _flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def _flush() -> None:
    """Have what was printed so far go where it was meant to, as far as that takes it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the disk of a log may be full
            stream.flush()


@contextlib.contextmanager
def watch(run: Storage, plan: Plan, terminal: Terminal) -> Iterator[None]:
    """Show the run's progress, read from its metrics, while the block runs."""
    stop = threading.Event()
    live = terminal.console.is_terminal and not terminal.console.is_dumb_terminal
    target = _show_bars if live else _show_lines
    thread = threading.Thread(target=target, args=(run, plan, terminal, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def last_records(run: Storage) -> list[dict[str, Any]]:
    """The newest records of metrics.jsonl, oldest first; empty before the first step."""
    return run.tail_records(METRICS, _TAIL_BYTES, _FIELDS)


def describe_phase(phase: Phase, num_phases: int) -> str:
    """A phase in a few words: "phase 1/2 · bags of 4"."""
    what = f"bags of {phase.bag_size}" if phase.bag_size > 1 else "next token"
    return f"phase {phase.index + 1}/{num_phases} · {what}"


class _Latest:
    """The newest record, with the newest validation loss."""

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._val_loss: float | None = None

    def read(self) -> dict[str, Any] | None:
        """The record; None before the first step, and where storage does not answer now."""
        try:
            records = last_records(self._run)
        except OSError:  # the run may go on, and be shown at the next look
            return None
        for record in records:
            self._val_loss = record.get("val_loss", self._val_loss)
        return {**records[-1], "val_loss": self._val_loss} if records else None


def _fields(record: dict[str, Any], narrow: bool = False) -> str:
    """loss 2.913  val 2.871  lr 2.0e-03  312k tok/s  2 workers; without lr and workers if narrow"""
    lr, count = f"lr {record['lr']:.1e}", record["world_size"]
    workers = f"{count} worker{'s' if count != 1 else ''}"
    parts = [
        f"loss {show_loss(record['loss'])}",
        f"val {show_loss(record['val_loss'])}",
        *([] if narrow else [lr]),
        f"{short_number(record['tokens_per_s'])} tok/s",
        *([] if narrow else [workers]),
    ]
    return "  ".join(parts)


def show_loss(loss: float | None) -> str:
    """A loss to three digits; a dash where there is none, or none that is finite."""
    return "–" if loss is None else f"{loss:.3f}"


def _show_bars(run: Storage, plan: Plan, terminal: Terminal, stop: threading.Event) -> None:
    latest, narrow = _Latest(run), terminal.console.width < _BARS_WIDTH
    columns = (
        TextColumn("{task.description}"),
        *([] if narrow else [BarColumn(bar_width=24)]),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(
        *columns,
        console=terminal.console,
        refresh_per_second=4,
        # Output of this process goes above the bars if it goes to a terminal. Under `quiet` it
        # goes to the log, from where rich must not take it back.
        redirect_stdout=os.isatty(1),
        redirect_stderr=os.isatty(2),
    )
    with progress:
        tasks = [
            progress.add_task(
                describe_phase(phase, len(plan.phases)), total=phase.steps, start=False, status=""
            )
            for phase in plan.phases
        ]
        while True:
            finishing = stop.wait(_POLL_S)
            record = latest.read()
            if record:
                _advance_bars(progress, tasks, plan, {**record, "status": _fields(record, narrow)})
            if finishing:
                return


def _advance_bars(progress: Progress, tasks: list[Any], plan: Plan, record: dict[str, Any]) -> None:
    for phase, task in zip(plan.phases, tasks, strict=True):
        done = min(max(record["step"] - phase.first_step, 0), phase.steps)
        if done and not progress.tasks[task].started:
            progress.start_task(task)
        progress.update(task, completed=done)
        if phase.index == record["phase"]:
            progress.update(task, status=record["status"])


def _show_lines(run: Storage, plan: Plan, terminal: Terminal, stop: threading.Event) -> None:
    latest, shown, shown_at = _Latest(run), 0, 0.0
    while True:
        finishing = stop.wait(_POLL_S)
        due = finishing or time.monotonic() - shown_at > _LINE_EVERY_S
        record = latest.read() if due else None
        if record and record["step"] != shown:
            shown, shown_at = record["step"], time.monotonic()
            left_s = (plan.total_steps - shown) * record["step_time_s"]
            phase = describe_phase(plan.phases[record["phase"]], len(plan.phases))
            terminal.say(
                f"{phase}  step {shown:,}/{plan.total_steps:,}  {_fields(record)}  "
                f"{duration(left_s)} left"
            )
        if finishing:
            return


def short_number(value: float) -> str:
    """1,234,567 as 1.23M."""
    for bound, unit in (
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "B"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= bound:
            return f"{value / bound:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 4:05 or 2:10:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    """A share as 12.3 %."""
    return f"{share * 100:.1f} %"
