"""What a person sees while a run goes."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tiny import make_config, make_corpus
from tst_ray import display
from tst_ray.cli import main
from tst_ray.errors import RunError
from tst_ray.plan import build_plan
from tst_ray.storage import Storage


class Page:
    """A terminal's `say` and console, kept as text."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        self.console = Console(file=self.text, width=200)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


def test_storage_that_fails_for_a_while_does_not_end_the_display(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = build_plan(make_config(tmp_path, make_corpus(tmp_path / "corpus")))
    run, page = Storage(str(tmp_path / "run")), Page()
    record = {
        "step": 3, "phase": 0, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1e4, "world_size": 2,
        "step_time_s": 0.1,
    }  # fmt: skip
    run.write("metrics.jsonl", json.dumps(record) + "\n")
    monkeypatch.setattr(display, "_POLL_S", 0.01)
    monkeypatch.setattr(display, "_LINE_EVERY_S", 0.0)
    read, failures, seen = display.last_records, [OSError("503")] * 3, threading.Event()

    def flaky(run: Storage) -> list[dict[str, Any]]:
        if failures:
            raise failures.pop()
        seen.set()
        return read(run)

    monkeypatch.setattr(display, "last_records", flaky)
    with display.watch(run, plan, page):  # type: ignore[arg-type]
        assert seen.wait(60.0)
    assert "step 3/8" in page.text.getvalue()


def terminal_on(out: int) -> display.Terminal:
    """A terminal whose lines go to this descriptor, which it keeps to itself."""
    kept = os.dup(1)
    os.dup2(out, 1)
    os.close(out)
    try:
        return display.Terminal()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.fixture(params=["a full disk", "a closed pipe", "a terminal that is gone"])
def gone(request: pytest.FixtureRequest) -> Iterator[display.Terminal]:
    """A terminal that takes no more, whatever it was."""
    if request.param == "a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe() if request.param == "a closed pipe" else os.openpty()
    terminal = terminal_on(out)
    if request.param != "a full disk":
        os.close(reader)
    yield terminal


def test_a_run_goes_on_where_nobody_can_be_told_of_it(
    gone: display.Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of stages, the progress, and the summary; a pipe's end would exit the process."""
    plan = build_plan(make_config(tmp_path, make_corpus(tmp_path / "corpus")))
    monkeypatch.setattr(display, "_POLL_S", 0.01)
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    before = os.fstat(1)
    for _ in range(3):
        gone.say("a line" * 3000)
        gone.console.print("a line")
        with display.watch(Storage(str(tmp_path / "run")), plan, gone):
            gone.say("a line")
    assert not failed
    assert os.path.samestat(os.fstat(1), before), "standard output is left as it was"


def test_an_interrupt_is_heard_while_a_line_waits_for_the_terminal() -> None:
    """One that stands still (Ctrl-S) takes no more, and an interrupt has a line to say, too."""
    reader, out = os.pipe()
    terminal = terminal_on(out)
    heard: list[bytes] = []

    def stop(*args: Any) -> None:
        terminal.say("stopping")
        heard.append(os.read(reader, 1 << 20))  # now it goes on

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        terminal.say("x" * 100_000)  # more than a pipe holds
        assert len(heard) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        os.close(reader)


def test_text_is_prepared_where_nobody_can_be_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("No space left on device")

    def prepare_only(config: Any, say: Any, quiet: Any) -> None:
        say("a line")
        raise RunError("and the error, too")

    monkeypatch.setattr("tst_ray.coordinator.prepare_only", prepare_only)
    monkeypatch.setattr("sys.stderr", Full())
    assert main(["prepare", "--train.steps=100"]) == 1
