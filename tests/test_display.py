"""What a person sees while a run goes."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tiny import make_config, make_corpus
from tst_ray import display
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
