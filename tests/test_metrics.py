"""Metrics: each step once, curves that go on, settings beside the final loss."""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tst_ray.curves import TENSORBOARD, curves_folder
from tst_ray.metrics import (
    METRICS,
    MetricsLog,
    add_event,
    drop_after,
    flatten,
    one_line_a_step,
    recent_records,
    write_hparams,
)
from tst_ray.storage import Storage


def record(step: int, loss: float, **more: Any) -> dict[str, Any]:
    told = {"step": step, "phase": 0, "loss": loss, "lr": 1e-3, "world_size": 1, "attempt": 1}
    return {**told, "step_time_s": 0.1, **more}


def write_steps(run: Storage, start: int, stop: int, loss: float, every: int = 1) -> None:
    drop_after(run, start)
    log = MetricsLog(run, start, every, "run:\n  name: test\n")
    for step in range(start + 1, stop + 1):
        log.write(record(step, loss))
    log.close()


def curve(run: Storage, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(curves_folder(run).path, size_guidance={"scalars": 0})
    board.Reload()
    return [(point.step, point.value) for point in board.Scalars(tag)]


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "run"))
    storage.make()
    return storage


def test_after_a_restart_each_step_stands_once(run: Storage) -> None:
    write_steps(run, 0, 7, loss=1.0)
    write_steps(run, 4, 9, loss=2.0)
    records = run.read_lines(METRICS)
    assert [r["step"] for r in records] == list(range(1, 10))
    assert [r["loss"] for r in records] == [1.0] * 4 + [2.0] * 5


def test_lines_of_an_attempt_that_was_overtaken_do_not_stand(run: Storage) -> None:
    told = [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (5, 2)]
    text = [json.dumps(record(step, 1.0, attempt=attempt)) + "\n" for step, attempt in told]
    run.write(METRICS, "".join(text))
    last = one_line_a_step(run)
    kept = run.read_lines(METRICS)
    assert [(r["step"], r["attempt"]) for r in kept] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert last == one_line_a_step(run) == {0: kept[-1]}


def test_a_long_file_is_looked_through_in_pieces_and_left_as_it_is(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of months has gigabytes of it, and its driver little memory."""
    monkeypatch.setattr("tst_ray.storage._PIECE_BYTES", 10_000)
    phases = [0] * 3000 + [1] * 2000
    told = [record(n + 1, 1.0, attempt=1, phase=phase) for n, phase in enumerate(phases)]
    run.write(METRICS, "".join(json.dumps(line) + "\n" for line in told) + '{"step": 5001, "pha')
    monkeypatch.setattr(Storage, "write", Mock(side_effect=AssertionError("written")))
    tracemalloc.start()
    last = one_line_a_step(run)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last == {0: told[2999], 1: told[4999]}
    assert peak < 200_000 < run.size(METRICS)


@pytest.mark.parametrize("back_to", [0, 1, 2, 4999, 5000])
def test_dropping_reads_from_the_end_and_keeps_the_rest_to_the_byte(
    run: Storage, back_to: int
) -> None:
    """Longer than what is read at once."""
    text = [json.dumps(record(step, 1.0, more="x" * 400)) + "\n" for step in range(1, 5001)]
    run.write(METRICS, "".join(text) + '{"step": 50')
    dropped = drop_after(run, back_to)
    assert [r["step"] for r in dropped] == list(range(back_to + 1, 5001))
    assert run.read(METRICS).decode() == "".join(text[:back_to])


def test_the_curve_goes_on_where_it_was(run: Storage) -> None:
    write_steps(run, 0, 7, loss=1.0)
    write_steps(run, 4, 9, loss=2.0)
    assert curve(run, "loss/train") == [(s, 1.0) for s in range(1, 5)] + [
        (s, 2.0) for s in range(5, 10)
    ]


def test_event_files_are_read_in_the_order_they_were_opened(run: Storage) -> None:
    """Their names hold whole seconds, and a number that sorts as text: 10 before 9."""
    for attempt in range(3):
        write_steps(run, 0, 2, loss=float(attempt))
    names = curves_folder(run).names()
    assert len({name.split(".")[3] for name in names}) == len(names)
    assert curve(run, "loss/train") == [(1, 2.0), (2, 2.0)]


def test_a_torn_line_is_dropped_before_more_is_added(run: Storage) -> None:
    run.write(METRICS, json.dumps(record(1, 1.0)) + '\n{"step": 2, "lo')
    drop_after(run, 1)
    assert run.read(METRICS).endswith(b"}\n")
    assert [r["step"] for r in run.read_lines(METRICS)] == [1]


def test_a_damaged_line_keeps_no_run_from_going_on(run: Storage) -> None:
    """A bit that flips makes it no text, no JSON, or the name of a field another one."""
    lines = [json.dumps(record(step, 1.0, attempt=1)).encode() + b"\n" for step in range(1, 9)]
    lines[2] = lines[2].replace(b'"step"', b'"st\xe5p"')
    lines[3] = lines[3].replace(b"{", b"z")
    lines[4] = lines[4].replace(b'"step"', b'"sdep"')
    lines[6] = lines[6].replace(b'"step"', b'"sdep"')
    run.write(METRICS, b"".join(lines))
    assert one_line_a_step(run)[0]["step"] == 8
    run.append(METRICS, json.dumps(record(2, 2.0, attempt=2)) + "\n")
    one_line_a_step(run)
    kept = [1, 2, 6, 8]
    assert [(r["step"], r["loss"]) for r in run.read_lines(METRICS)] == [
        (step, 2.0 if step == 2 else 1.0) for step in kept
    ]
    run.write(METRICS, b"".join(lines))
    assert [r["step"] for r in recent_records(run, 2)] == [6, 8]
    assert [r["step"] for r in drop_after(run, 6)] == [8]
    assert run.read(METRICS) == b"".join(lines[:6])
    assert [r["step"] for r in drop_after(run, 5)] == [6]
    assert run.read(METRICS) == b"".join(lines[:2])


def test_curves_are_thinned_but_evaluations_are_not(run: Storage) -> None:
    log = MetricsLog(run, 0, 5, "")
    for step in range(1, 11):
        log.write(record(step, 1.0, **({"val_loss": 3.0} if step == 7 else {})))
    log.close()
    assert [step for step, _ in curve(run, "loss/train")] == [5, 7, 10]
    assert curve(run, "loss/validation") == [(7, 3.0)]
    assert len(run.read_lines(METRICS)) == 10


@pytest.mark.parametrize("again_s, files", [(0.0, 3), (60.0, 1)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_points_that_storage_does_not_take_are_drawn_later(
    run: Storage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    again_s: float,
    files: int,
) -> None:
    """TensorBoard's own writer has ended then, and its file may end in half a point."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    class ServiceError(Exception):
        """Not every error of storage is an OSError."""

    write, fails = RecordWriter.write, False

    def write_or_fail(writer: RecordWriter, data: bytes) -> None:
        if fails:
            writer._writer.write(data[: len(data) // 2])
            raise ServiceError("503")
        write(writer, data)

    monkeypatch.setattr(RecordWriter, "write", write_or_fail)
    monkeypatch.setattr("tst_ray.curves._AGAIN_S", again_s)
    log = MetricsLog(run, 0, 1, "")
    for step in range(1, 13):
        fails = 4 <= step <= 6
        log.write(record(step, float(step)))
        log.publish()
        if step == 6:
            assert len(curves_folder(run).names()) == files
    log.close()
    assert "503" in caplog.text
    assert curve(run, "loss/train") == [(step, float(step)) for step in range(1, 13)]


def test_the_loop_does_not_wait_for_the_curves(run: Storage) -> None:
    """They are drawn when they are published, beside it."""
    log = MetricsLog(run, 0, 1, "")
    for step in range(1, 201):  # many more than TensorBoard's own queue holds
        log.write(record(step, 1.0))
    assert not (run / TENSORBOARD).exists()
    log.publish()
    assert len(curve(run, "loss/train")) == 200
    log.close()


def test_on_an_object_store_the_curves_are_put_there_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for every point, it would take a request for each; some cannot append at all."""
    opened = MemoryFileSystem._open

    def without_appending(fs: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        assert mode in ("rb", "wb"), "appends"
        return opened(fs, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", without_appending)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    far, near = Storage("memory://curves/run"), Storage(str(tmp_path / "near"))
    for attempt, start in enumerate((0, 4)):
        log = MetricsLog(far, start, 1, "")
        for step in range(start + 1, start + 8):
            log.write(record(step, float(attempt)))
            if step == start + 3:
                log.publish()
        log.close()
    write_hparams(far, {"seed": 1}, {"val_loss": 2.5}, step=11)
    names = curves_folder(far).names()
    assert len(names) == 3
    for name in names:
        curves_folder(near).write(name, curves_folder(far).read(name))
    expected = [(s, 0.0) for s in range(1, 5)] + [(s, 1.0) for s in range(5, 12)]
    assert curve(near, "loss/train") == expected
    assert not list(tmp_path.glob("tst_ray-curves-*"))


def test_the_config_is_readable_in_tensorboard(run: Storage) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(run, 0, 1, loss=1.0)
    write_hparams(run, {"train": {"steps": 5, "betas": [0.9, 0.95]}}, {"val_loss": 2.5}, step=5)
    board = EventAccumulator(curves_folder(run).path)
    board.Reload()
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "name: test" in text
    assert "_hparams_/session_start_info" in board.summary_metadata


def tensorboard_on(folder: str) -> Callable[..., Any]:
    """Start TensorBoard's server on a folder; what it answers to a path."""
    from tensorboard.program import TensorBoard

    board = TensorBoard()
    board.configure(argv=[None, "--logdir", folder, "--port", "0", "--load_fast=false"])
    url = board.launch()

    def ask(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url}data/{path}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    return ask


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_the_runs_name_and_its_curves_first(run: Storage) -> None:
    """What its web page asks for: runs, cards (which it sorts by tag), and the HParams table."""
    log = MetricsLog(run, 0, 1, "")
    for step in range(1, 6):
        log.write(record(step, 1.0 / step, val_loss=3.0 / step))
    log.close()
    write_hparams(run, {"train": {"steps": 5}}, {"loss": 0.2, "val_loss": 0.6}, step=5)
    ask = tensorboard_on((run / TENSORBOARD).path)
    deadline = time.monotonic() + 60
    while not ask("runs"):  # it reads the files in a thread of its own
        assert time.monotonic() < deadline
    assert ask("runs") == ["run"]
    tags = sorted(ask("plugin/scalars/tags")["run"])
    assert tags[:2] == ["loss/train", "loss/validation"]
    for tag in tags[:2]:
        points = ask(f"plugin/scalars/scalars?run=run&tag={tag}")
        assert [step for _, step, _ in points] == [1, 2, 3, 4, 5]
    asked = {
        "experimentName": "", "startIndex": 0, "sliceSize": 10,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"hparam": "train.steps"}],
    }  # fmt: skip
    (group,) = ask("plugin/hparams/session_groups", asked)["sessionGroups"]
    assert group["hparams"] == {"train.steps": 5.0}
    shown = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert shown == {"loss/train": pytest.approx(0.2), "loss/validation": pytest.approx(0.6)}


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_keeps_the_folder_of_its_curves(tmp_path: Path, renamed: bool) -> None:
    """Whether its directory was renamed, or an older version drew beside where we do."""
    run = Storage(str(tmp_path / "run"))
    write_steps(run, 0, 4, loss=1.0)
    assert [path.parent.name for path in tmp_path.rglob("events.out.*")] == ["run"]
    if renamed:
        (tmp_path / "run").rename(tmp_path / "new")
        run = Storage(str(tmp_path / "new"))
    else:
        for file in (tmp_path / "run/tensorboard/run").iterdir():
            file.rename(tmp_path / "run/tensorboard" / file.name)
        (tmp_path / "run/tensorboard/run").rmdir()
    write_steps(run, 2, 6, loss=2.0)
    assert len({path.parent for path in tmp_path.rglob("events.out.*")}) == 1
    assert curve(run, "loss/train") == [(1, 1.0), (2, 1.0), *((s, 2.0) for s in range(3, 7))]


def test_events_carry_their_time(run: Storage) -> None:
    add_event(run, "switch", step=5)
    (event,) = run.read_lines("events.jsonl")
    assert event["event"] == "switch"
    assert event["step"] == 5
    assert event["time"] > 1.7e9


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
