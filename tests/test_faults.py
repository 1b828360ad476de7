"""Faults in the loop itself, in one process: numbers, storage, requests to stop.

What happens to processes and nodes is in test_recovery.py.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.manifest import Manifest
from tests.faults import Faults
from tests.test_worker import final_weights, same
from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray.checkpoint import MARKER, committed
from tst_ray.errors import RunError
from tst_ray.job import FAILED_SAVES, INTERRUPT, ROLLBACK, Ended, Job, Place
from tst_ray.journal import read_passed_over, read_state, request_stop, update_state
from tst_ray.metrics import MetricsLog
from tst_ray.storage import Storage
from tst_ray.worker import train

STEPS = 40
PATIENCE_S = 60.0
CALM = {"train__steps": STEPS, "tst__ratio": 0.25, "metrics__val_every": 100,
        "checkpoint__every": 2, "checkpoint__keep": 30}  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, manifest: Manifest
) -> tuple[Storage, list[Any]]:
    """The undisturbed run."""
    job = make_job(make_config(tmp_path_factory.mktemp("whole"), manifest, **CALM), manifest)
    return Storage(job.run_url), run_inline(job)


def tiny_job(folder: Path, manifest: Manifest, **changes: Any) -> Job:
    return make_job(make_config(folder, manifest, **CALM | changes), manifest)


def train_on(job: Job, before: Callable[[int], object] = lambda step: None) -> Ended:
    """Train; `before` is called before each batch, with the steps finished by then."""
    from pipelines.ingest import read_inline

    def batches(phase: Any, step: int) -> Any:
        for number, batch in enumerate(read_inline(job.feeds[phase.index], step), start=step):
            before(number)
            yield batch

    return train(job, Place(), batches)


def stop_at_15(job: Job, step: int) -> None:
    """Ask for a stop, and let that step wait until the request is seen."""
    if step == 15:
        (watching,) = (t for t in threading.enumerate() if t.name == "stop-request")
        request_stop(Storage(job.run_url), INTERRUPT)
        watching.join(PATIENCE_S)


def records_of(job: Job) -> list[dict[str, Any]]:
    return Storage(job.run_url).read_lines("metrics.jsonl")


def events_of(job: Job, kind: str) -> list[dict[str, Any]]:
    return [e for e in Storage(job.run_url).read_lines("events.jsonl") if e["event"] == kind]


def column(records: list[dict[str, Any]], name: str) -> list[Any]:
    return [record[name] for record in records]


def test_a_step_that_is_not_finite_changes_no_weight(tmp_path: Path, manifest: Manifest) -> None:
    """The update is skipped, the optimizer's state too; the steps after go on as if it were not."""
    job = tiny_job(tmp_path, manifest, train__steps=4, checkpoint__every=1)
    with Faults().not_finite_at(3).injected():
        assert train_on(job) == Ended(4, "done")
    records = records_of(job)
    assert column(records, "loss")[2] is None
    assert records[2]["mark"] == "not_finite"
    assert "mark" not in records[3]
    assert "NaN" not in Storage(job.run_url).read("metrics.jsonl").decode()
    # No checkpoint is taken of a state that the guard mistrusts.
    assert [info.step for info in committed(Storage(job.run_url) / "checkpoints")] == [4, 2, 1]
    weights = final_weights(Storage(job.run_url))
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())


def test_a_skipped_update_leaves_the_state_bit_for_bit(tmp_path: Path, manifest: Manifest) -> None:
    """The last step of a stage is saved in any case: its state must be that of the step before."""
    struck = tiny_job(tmp_path / "a", manifest, train__steps=8, checkpoint__every=1)
    with Faults().not_finite_at(8).injected():
        train_on(struck)
    folders = {info.step: info for info in committed(Storage(struck.run_url) / "checkpoints")}
    from tst_ray.sharded import read_full

    states = []
    for step in (7, 8):
        state = {
            name: torch.empty_like(t) for name, t in final_weights(Storage(struck.run_url)).items()
        }
        read_full(folders[step].folder, state)
        states.append(state)
    assert same(*states)


def test_too_many_in_a_row_go_back_and_pass_over_the_data(
    tmp_path: Path, manifest: Manifest, whole: tuple[Storage, list[Any]]
) -> None:
    job = tiny_job(tmp_path, manifest, fault__max_skipped=3)
    with Faults().not_finite_at(15, 16, 17).injected() as faults:
        assert train_on(job) == Ended(17, ROLLBACK)
        assert committed(Storage(job.run_url) / "checkpoints")[0].step == 14
        assert train_on(job) == Ended(STEPS, "done")
    assert len(faults.happened) == 3  # their data was not trained on again
    records = records_of(job)
    assert column(records, "step") == list(range(1, STEPS + 1))
    assert column(records, "data_digest") == column(whole[1], "data_digest")
    passed = [r["step"] for r in records if r.get("mark") == "passed_over"]
    assert passed == [15, 16, 17]
    assert all(r["loss"] is None for r in records if r["step"] in passed)
    (event,) = events_of(job, "rollback")
    assert (event["first_step"], event["last_step"], event["back_to"]) == (14, 16, 14)
    assert {row[0] for row in event["spans"]} == {15, 16, 17}
    assert len(event["spans"]) == 3 * 5
    feed = job.feeds[0]
    spans = feed.order.spans(15)
    assert [16, "first", int(spans.epoch[0]), int(spans.offset[0]), spans.length] in [
        [row[0], "first", *row[2:]] for row in event["spans"]
    ]


def test_a_run_with_steps_passed_over_is_resumed_bit_for_bit(
    tmp_path: Path, manifest: Manifest
) -> None:
    """Stopped after the roll-back, anywhere, the rest is the same."""
    results = []
    for stop in (None, 20):
        job = tiny_job(tmp_path / str(stop), manifest, fault__max_skipped=3)
        with Faults().not_finite_at(15, 16, 17).fail_at(*([stop] if stop else [])).injected():
            train_on(job)
            if stop:
                with pytest.raises(RuntimeError, match="injected at step 20"):
                    train_on(job)
            train_on(job)
        results.append((records_of(job), final_weights(Storage(job.run_url))))
    (records, weights), (resumed, resumed_weights) = results
    assert column(records, "loss") == column(resumed, "loss")
    assert same(weights, resumed_weights)


def test_stopped_amid_bad_steps_a_run_goes_back_no_further_than_it_must(
    tmp_path: Path, manifest: Manifest
) -> None:
    """A request to stop saves whatever the guard thinks; what it counted goes on after."""
    job = tiny_job(tmp_path, manifest, fault__max_skipped=3, checkpoint__async="false")

    with Faults().not_finite_at(15, 16, 17).injected():
        assert train_on(job, lambda step: stop_at_15(job, step)) == Ended(16, INTERRUPT)
        Storage(job.run_url).remove("control.json")
        assert train_on(job) == Ended(17, ROLLBACK)
    (event,) = events_of(job, "rollback")
    assert (event["first_step"], event["last_step"], event["back_to"]) == (14, 16, 14)


def test_a_lasting_spike_goes_back_and_a_run_gives_up_in_the_end(
    tmp_path: Path, manifest: Manifest
) -> None:
    changes = {"fault__spike_window": 8, "fault__spike_steps": 3, "fault__max_rollbacks": 1}
    job = tiny_job(tmp_path, manifest, **changes)
    with Faults().spike_at(25, 26, 27, 33, 34, 35, nats=9.0).injected():
        assert train_on(job) == Ended(27, ROLLBACK)
        (event,) = events_of(job, "rollback")
        assert "after a median of" in event["why"]
        assert (event["first_step"], event["last_step"]) == (24, 26)
        with pytest.raises(RunError, match=r"after 1 roll-backs \(fault.max_rollbacks\)"):
            train_on(job)
    assert read_passed_over(Storage(job.run_url))[0]["first_step"] == 24


def test_without_a_checkpoint_before_it_the_way_back_to_step_0_is_told(
    tmp_path: Path, manifest: Manifest
) -> None:
    job = tiny_job(tmp_path, manifest, fault__max_skipped=2, checkpoint__every=100)
    with Faults().not_finite_at(3, 4).injected():
        train_on(job)
        train_on(job)
    assert events_of(job, "rollback")[0]["back_to"] == 0
    assert column(records_of(job), "step") == list(range(1, STEPS + 1))


def test_a_request_to_stop_ends_the_group_with_a_checkpoint_and_no_step_lost(
    tmp_path: Path, manifest: Manifest, whole: tuple[Storage, list[Any]]
) -> None:
    job = tiny_job(tmp_path, manifest, checkpoint__every=1000)
    run = Storage(job.run_url)
    request_stop(run, INTERRUPT)
    ended = train_on_slowly(job)
    assert ended.reason == INTERRUPT
    assert ended.step < STEPS
    assert [info.step for info in committed(run / "checkpoints")] == [ended.step]
    assert events_of(job, "stop")[0]["step"] == ended.step
    run.remove("control.json")
    train_on(job)
    assert events_of(job, "attempt")[1]["repeated_steps"] == 0
    assert column(records_of(job), "loss") == column(whole[1], "loss")
    assert same(final_weights(run), final_weights(whole[0]))


def train_on_slowly(job: Job) -> Ended:
    """As slowly as it takes to see a request: batches come when the journal has looked."""
    return train_on(job, lambda step: time.sleep(0.1))


class FullDisk:
    """Storage's writes fail while `full`, those of the named files only."""

    def __init__(self, patch: pytest.MonkeyPatch, *names: str) -> None:
        self.full, self.refused = False, 0
        for method in ("write", "append"):
            patch.setattr(Storage, method, self._refusing(getattr(Storage, method), names))

    def _refusing(self, original: Any, names: tuple[str, ...]) -> Any:
        def method(storage: Storage, name: str, content: Any) -> None:
            if self.full and any(part in f"{storage.url}/{name}" for part in names):
                self.refused += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            original(storage, name, content)

        return method


def test_saves_that_fail_are_told_and_the_next_one_works(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, "/checkpoints/")
    job = tiny_job(tmp_path, manifest, train__steps=12, checkpoint__async="false")

    def fill(step: int) -> None:
        disk.full = 3 <= step < 7

    assert train_on(job, fill) == Ended(12, "done")
    assert [e["step"] for e in events_of(job, "checkpoint_failed")] == [4, 6]
    assert [info.step for info in committed(Storage(job.run_url) / "checkpoints")] == [12, 10, 8, 2]


def test_too_many_failed_saves_stop_the_run_with_its_last_checkpoint_intact(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, "/checkpoints/")
    job = tiny_job(tmp_path, manifest, fault__max_failed_saves=3, checkpoint__async="false")

    def fill(step: int) -> None:
        disk.full = step >= 5

    ended = train_on(job, fill)
    assert ended.reason == FAILED_SAVES
    assert len(events_of(job, "checkpoint_failed")) == 3
    newest = committed(Storage(job.run_url) / "checkpoints")[0]
    assert newest.step == 4
    disk.full = False
    assert train_on(job) == Ended(STEPS, "done")


def test_a_disk_that_fills_up_under_dcp_is_a_failed_save(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DCP writes its files itself, and raises what no `except Exception` catches."""
    import resource

    job = tiny_job(tmp_path, manifest, train__steps=6, checkpoint__async="false")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    from pipelines.ingest import read_inline

    def batches(phase: Any, step: int) -> Any:
        for number, batch in enumerate(read_inline(job.feeds[phase.index], step), start=step):
            most = 16_000 if number == 3 else limit[0]  # bytes of a file: less than a checkpoint's
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
            yield batch

    try:
        assert train(job, Place(), batches) == Ended(6, "done")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [e["step"] for e in events_of(job, "checkpoint_failed")] == [4]
    assert [info.step for info in committed(Storage(job.run_url) / "checkpoints")] == [6, 2]


def test_metrics_wait_for_a_full_disk_and_miss_no_step(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, "metrics.jsonl", "run.json", "events.jsonl")
    job = tiny_job(tmp_path, manifest, train__steps=12)

    def fill(step: int) -> None:
        disk.full = 3 <= step < 7

    assert train_on(job, fill) == Ended(12, "done")
    assert disk.refused > 0
    assert column(records_of(job), "step") == list(range(1, 13))


def test_the_loop_does_not_wait_for_lines_and_state_to_be_written(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage takes them only once the last step is under way."""
    nearly_done = threading.Event()
    for method in ("write", "append"):
        monkeypatch.setattr(Storage, method, after(nearly_done, getattr(Storage, method)))
    job = tiny_job(tmp_path, manifest, train__steps=12, checkpoint__every=1000)

    def note(step: int) -> None:
        if step == 11:
            nearly_done.set()

    assert train_on(job, note) == Ended(12, "done")
    assert column(records_of(job), "step") == list(range(1, 13))


def after(event: threading.Event, original: Any) -> Any:
    def method(storage: Storage, name: str, content: Any) -> None:
        if name in ("metrics.jsonl", "run.json") and read_state(storage).get("attempt"):
            assert event.wait(60.0), "somebody waits for this"
        original(storage, name, content)

    return method


def test_a_loop_that_is_overtaken_does_not_go_on(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the journal meets beside the loop ends the loop, at one of the next steps."""
    monkeypatch.setattr("tst_ray.journal._STATE_EVERY_S", 0.0)
    job = tiny_job(tmp_path, manifest, checkpoint__every=1000)
    begun: list[int] = []

    def overtake(step: int) -> None:
        begun.append(step)
        if step >= 5:  # one alone might be replaced by what is just being written
            update_state(Storage(job.run_url), attempt=99)

    with pytest.raises(RunError, match="another attempt of this run has taken over"):
        train_on(job, overtake)
    assert 5 < begun[-1] < STEPS - 1


def test_the_lines_of_a_committed_step_stand(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not trained again; on an object store lines wait for each other else."""
    monkeypatch.setattr(MetricsLog, "is_due", lambda log: False)
    job = tiny_job(tmp_path, manifest, train__steps=6)
    original, there = Storage.write, {}

    def write(storage: Storage, name: str, content: Any) -> None:
        if name == MARKER:
            there[storage.path[-1]] = column(records_of(job), "step")
        original(storage, name, content)

    monkeypatch.setattr(Storage, "write", write)
    assert train_on(job) == Ended(6, "done")
    assert sorted(there) == ["2", "4", "6"]
    assert all(steps[: int(step)] == list(range(1, int(step) + 1)) for step, steps in there.items())


def test_the_lines_of_a_committed_checkpoint_outlast_a_power_cut(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, manifest, train__steps=6)
    synced, fsync = [], os.fsync

    def watched(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    assert train_on(job) == Ended(6, "done")
    names = [name.removeprefix(".").rpartition(".")[0] or name for name in synced]
    assert names.index("metrics") < names.index("COMMITTED")


def test_a_checkpoint_is_not_waited_for_until_the_watchdog_ends_the_worker(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny_job(tmp_path, manifest, train__steps=6, fault__start_s=100)
    waited: list[float] = []

    def ask(action: Callable[[], Any], patience_s: float) -> Any:
        waited.append(patience_s)
        return action()

    with Faults().fail_at(5).injected(), pytest.raises(RuntimeError, match="injected"):
        train_on(job)
    monkeypatch.setattr("tst_ray.checkpoint.patiently", ask)
    assert train_on(job) == Ended(6, "done")
    assert waited == [50.0]


def test_the_account_of_a_run_that_failed_adds_up(tmp_path: Path, manifest: Manifest) -> None:
    job = tiny_job(tmp_path, manifest, checkpoint__async="false")
    with Faults().fail_at(25).injected():
        with pytest.raises(RuntimeError, match="injected"):
            train_on(job)
        first = read_state(Storage(job.run_url))["time"]
        train_on(job)
    state = read_state(Storage(job.run_url))
    assert events_of(job, "attempt")[1]["repeated_steps"] == 0  # 24 was saved, 25 never logged
    assert state["time"]["at"] > first["at"]
    wall_s = state["time"]["at"] - events_of(job, "attempt")[0]["time"]
    assert sum(state["time"]["parts"].values()) == pytest.approx(wall_s, abs=2.0)
    assert state["time"]["parts"]["restart"] > 0
    assert json.dumps(state)


def test_waits_of_repeated_steps_are_not_taken_from_those_that_count(
    tmp_path: Path, manifest: Manifest
) -> None:
    """They were never charged as stepping."""
    job = tiny_job(tmp_path, manifest, checkpoint__async="false", checkpoint__every=10)
    with Faults().fail_at(18).injected():
        with pytest.raises(RuntimeError, match="injected"):
            train_on_slowly(job)
        train_on(job)
    assert events_of(job, "attempt")[1]["repeated_steps"] == 7
    parts = read_state(Storage(job.run_url))["time"]["parts"]
    steps_s = sum(r["step_time_s"] - r["data_wait_s"] for r in records_of(job))
    assert parts["stepping"] > 0.7 * steps_s


def test_saving_between_two_phases_is_charged_as_saving(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = tiny_job(tmp_path, manifest).plan.phases[0].last_step
    job = tiny_job(tmp_path, manifest, checkpoint__async="false", checkpoint__every=switch)
    write = Storage.write

    def slowly(storage: Storage, name: str, content: Any) -> None:
        if name == MARKER and storage.url.endswith(f"{switch:08d}"):
            time.sleep(3.0)  # much longer than all else, on a busy machine too
        write(storage, name, content)

    monkeypatch.setattr(Storage, "write", slowly)
    train_on(job)
    parts = read_state(Storage(job.run_url))["time"]["parts"]
    assert parts["startup"] + parts["restart"] < 3.0 < parts["checkpoint_stall"]


def test_steps_whose_lines_had_not_been_written_count_as_repeated(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store, lines go out every ten seconds."""
    job = tiny_job(tmp_path, manifest, checkpoint__async="false", checkpoint__every=10)
    with monkeypatch.context() as patch, Faults().fail_at(18).injected():
        patch.setattr("tst_ray.metrics.MetricsLog.publish", lambda log: None)
        patch.setattr("tst_ray.metrics.MetricsLog.close", lambda log: None)
        patch.setattr("tst_ray.journal._STATE_EVERY_S", 0.0)
        with pytest.raises(RuntimeError, match="injected"):
            train_on_slowly(job)
    assert len(records_of(job)) == 10
    train_on(job)
    assert events_of(job, "attempt")[1]["repeated_steps"] in (6, 7)  # the last one as it failed


def test_a_last_checkpoint_that_failed_is_tried_again(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No next one would make up for it, and its steps would be trained again."""
    disk = FullDisk(monkeypatch, "/checkpoints/")
    job = tiny_job(tmp_path, manifest, train__steps=12)

    def fill(step: int) -> None:
        disk.full = step == 11

    def room_is_made(patience_s: float) -> Iterator[float]:
        yield from [0.01] * 4  # more tries than `fault.max_failed_saves`
        disk.full = False
        yield 0.01

    monkeypatch.setattr("tst_ray.saving.pauses", room_is_made)
    assert train_on(job, fill) == Ended(12, "done")
    assert committed(Storage(job.run_url) / "checkpoints")[0].step == 12
    failed = [event["step"] for event in events_of(job, "checkpoint_failed")]
    assert failed.count(12) == 5  # that of step 10 may be under way when the disk is full


def test_a_last_checkpoint_is_not_tried_for_ever(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, "/checkpoints/")
    job = tiny_job(tmp_path, manifest, train__steps=4, checkpoint__every=100)
    disk.full = True
    monkeypatch.setattr("tst_ray.saving.STORAGE_S", 1.0)  # 0.5 s, and once more
    assert train_on(job) == Ended(4, "done")
    assert [e["step"] for e in events_of(job, "checkpoint_failed")] == [4] * 3


def test_no_checkpoint_is_taken_of_steps_whose_lines_are_not_written(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on from it would never have them."""
    disk = FullDisk(monkeypatch, "metrics.jsonl")
    job = tiny_job(tmp_path, manifest, train__steps=8, checkpoint__async="false")

    def fill(step: int) -> None:
        disk.full = 2 <= step < 5

    assert train_on(job, fill) == Ended(8, "done")
    assert [e["step"] for e in events_of(job, "checkpoint_failed")] == [4]
    assert [info.step for info in committed(Storage(job.run_url) / "checkpoints")] == [8, 6, 2]
    assert column(records_of(job), "step") == list(range(1, 9))


def test_a_state_that_the_guard_mistrusts_never_replaces_a_good_one(
    tmp_path: Path, manifest: Manifest
) -> None:
    """Stopped amid bad steps with `checkpoint.keep` 1, and gone on: back to the good one."""
    job = tiny_job(
        tmp_path, manifest, fault__max_skipped=3, checkpoint__async="false", checkpoint__keep=1
    )

    with Faults().not_finite_at(15, 16, 17).injected():
        assert train_on(job, lambda step: stop_at_15(job, step)) == Ended(16, INTERRUPT)
        Storage(job.run_url).remove("control.json")
        assert train_on(job) == Ended(17, ROLLBACK)
    assert events_of(job, "rollback")[0]["back_to"] == 14


def test_an_attempt_does_not_begin_before_it_has_said_where(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data reads from the step in run.json: one of the attempt before would be wrong."""
    disk = FullDisk(monkeypatch, "run.json")
    job = tiny_job(tmp_path, manifest, train__steps=4)
    disk.full = True
    waited: list[float] = []

    def room_is_made(seconds: float) -> None:
        waited.append(seconds)
        disk.full = len(waited) < 3

    monkeypatch.setattr("tst_ray.storage.time.sleep", room_is_made)
    seen: list[int] = []

    from pipelines.ingest import read_inline

    def batches(phase: Any, step: int) -> Any:
        seen.append(read_state(Storage(job.run_url))["step"])
        yield from read_inline(job.feeds[phase.index], step)

    assert train(job, Place(), batches) == Ended(4, "done")
    assert (len(waited), seen[0]) == (3, 0)


def test_a_checkpoint_that_was_passed_by_does_not_come_back(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of the steps up to it were dropped: a run that jumped to it would miss them."""
    job = tiny_job(tmp_path, manifest, train__steps=12, checkpoint__async="false")
    original = Storage.sha256

    def sha256(self: Storage, name: str) -> str:
        if self.url.endswith("step-00000008"):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, name)

    with Faults().fail_at(9, 7).injected():
        with pytest.raises(RuntimeError, match="injected at step 7"):
            train_on(job)
        with pytest.raises(RuntimeError, match="injected at step 9"):
            train_on(job)
    with monkeypatch.context() as trouble, Faults().fail_at(7).injected():
        trouble.setattr(Storage, "sha256", sha256)
        trouble.setattr("tst_ray.saving.STORAGE_S", 0.0)
        with pytest.raises(RuntimeError, match="injected at step 7"):
            train_on(job)
    assert train_on(job) == Ended(12, "done")
    assert column(records_of(job), "step") == list(range(1, 13))
    assert [e["step"] for e in events_of(job, "attempt")] == [0, 6, 6, 6]
