"""When faults happen and to whom, and signals to processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos import (
    Fault,
    Faults,
    Injector,
)
from cluster.processes import descendants, is_running, signal_older_process, signal_ray_worker
from cluster.targets import Driver, Gcs, Impossible, NotNow, Target, TrainWorker
from tests.chaos import (
    PATIENCE_S,
    problem,
    reach,
    save_checkpoint,
    sleeper,
    small_filesystem,
    start_attempt,
    start_run,
    wait_until,
)
from tst_ray.storage import Storage


class FakeTarget(Target):
    """Four workers on three nodes, of which the head is no victim; writes down what it is told."""

    can_add_nodes = True

    def __init__(self) -> None:
        self.there = [TrainWorker(node, 100 + i) for i, node in enumerate(("b", "head", "a", "a"))]
        self.told: list[tuple[Any, ...]] = []

    def workers(self, driver: Driver | None) -> list[TrainWorker]:
        assert driver is not None and driver.pid == 4321
        return list(self.there)

    def losable_nodes(self) -> list[str]:
        return ["a", "b", "idle"]

    def signal_worker(self, worker: TrainWorker, signum: int) -> None:
        self.told.append((signal.Signals(signum).name, worker.pid))

    def signal_driver(self, driver: Driver, signum: int) -> None:
        self.told.append((signal.Signals(signum).name, driver.pid))

    def kill_node(self, node_id: str) -> None:
        self.told.append(("kill_node", node_id))

    def drain_node(self, node_id: str, deadline_s: float) -> None:
        self.told.append(("drain_node", node_id, deadline_s))

    def add_node(self) -> str:
        self.told.append(("add_node",))
        return "c"

    def close(self) -> None:
        pass


@pytest.fixture
def trained(tmp_path: Path) -> Storage:
    """A run that has not taken a step."""
    return start_run(Storage(str(tmp_path / "run")))


def test_a_fault_waits_for_its_step_and_happens_once(trained: Storage) -> None:
    target = FakeTarget()
    injector = Injector(trained, Faults().add_node_at(step=5).kill_driver_at(step=9), target)
    for step, told in ((4, []), (6, [("add_node",)]), (3, [("add_node",)]), (8, [("add_node",)])):
        reach(trained, step)
        injector.poll()
        assert target.told == told
    reach(trained, 30)
    (record,) = injector.poll()
    assert target.told == [("add_node",), ("SIGKILL", 4321)]
    assert injector.poll() == [] and injector.finished
    assert (record["kind"], record["step"], record["at"]) == ("kill_driver", 9, 30)
    assert "4321" in record["victim"] and abs(record["time"] - time.time()) < 60
    assert [each["outcome"] for each in injector.done] == ["done", "done"]
    assert injector.done[0]["node"] == "c"


def test_ranks_are_those_of_the_last_attempt(trained: Storage) -> None:
    """Rank 0 on the head, 1 and 2 on node a in the order of their start, 3 on node b."""
    start_attempt(trained, "a", "a", "b", "head")
    start_attempt(trained, "head", "a", "a", "b")
    reach(trained, 9)
    target = FakeTarget()
    faults = Faults().fail_at(1, rank=0).fail_at(2, rank=1).fail_at(3, rank=2).fail_at(4, rank=3)
    injector = Injector(trained, faults, target)
    assert [record["rank"] for record in injector.poll()] == [0, 1, 2, 3]
    assert [pid for _, pid in target.told] == [101, 102, 103, 100]


def test_a_rank_is_not_guessed_while_a_group_starts(trained: Storage) -> None:
    start_attempt(trained, "a", "b")
    reach(trained, 9)
    target = FakeTarget()
    injector = Injector(trained, Faults().fail_at(1, rank=1).fail_at(1, rank=7), target)
    assert injector.poll() == [] and target.told == []
    start_attempt(trained, "head", "a", "a", "b")
    injector.poll()
    assert target.told == [("SIGKILL", 102)]
    assert [fault.rank for fault in injector.pending] == [7]


def test_choice_picks_the_victim_and_none_is_struck_twice(trained: Storage) -> None:
    reach(trained, 9)
    target = FakeTarget()
    faults = [Fault("kill_worker", 1, choice=0.6), *[Fault("kill_worker", 2, choice=0.99)] * 4]
    injector = Injector(trained, faults, target)
    injector.poll()
    assert [pid for _, pid in target.told] == [102, 103, 101, 100]
    assert len(injector.pending) == 1


def test_a_lost_node_has_workers_and_is_not_the_head(trained: Storage) -> None:
    start_attempt(trained, "head", "a", "a", "b")
    reach(trained, 9)
    target = FakeTarget()
    faults = [
        Fault("drain", 1, seconds=0.0, rank=3),
        Fault("kill_node", 2, choice=0.99),
        Fault("kill_node", 3, choice=0.5),
        Fault("kill_node", 4, rank=0),
    ]
    injector = Injector(trained, faults, target)
    injector.poll()
    assert target.told == [("drain_node", "b", 0.0), ("kill_node", "a")]
    assert "2 train workers" in injector.done[1]["victim"]
    assert injector.pending == faults[2:]


def test_a_frozen_worker_goes_on_after_its_seconds_or_at_the_end(trained: Storage) -> None:
    reach(trained, 9)
    target = FakeTarget()
    with Injector(trained, [Fault("freeze", 1, seconds=0.0)], target) as injector:
        injector.poll()
        assert target.told == [("SIGSTOP", 100)] and not injector.finished
        injector.poll()
        assert target.told == [("SIGSTOP", 100), ("SIGCONT", 100)] and injector.finished
    faults = [Fault("freeze", 1, seconds=900.0), Fault("freeze", 1)]
    target.told.clear()
    with Injector(trained, faults, target) as injector:
        assert not injector.run(timeout_s=0.0)
    assert target.told == [("SIGSTOP", 100), ("SIGSTOP", 101), ("SIGCONT", 100)]


def test_what_is_not_possible_is_skipped_and_what_fails_does_not_stop_the_rest(
    trained: Storage,
) -> None:
    reach(trained, 9)
    target = FakeTarget()
    target.can_add_nodes = False

    def break_down(node_id: str) -> None:
        raise OSError("no such luck")

    target.kill_node = break_down  # type: ignore[method-assign]
    faults = Faults().add_node_at(1).kill_node_at(2).fail_at(3)
    injector = Injector(trained, faults, target)
    assert injector.run(timeout_s=0.0)
    assert [record["outcome"] for record in injector.done] == ["skipped", "failed", "done"]
    assert "autoscaler" in injector.done[0]["reason"]
    assert injector.done[1]["reason"] == "no such luck"


def test_damage_waits_for_a_committed_checkpoint_and_takes_the_newest(trained: Storage) -> None:
    reach(trained, 9)
    injector = Injector(trained, Faults().damage_checkpoint_at(5, "remove"), Target())
    assert injector.poll() == []
    older, newer = save_checkpoint(trained, 4), save_checkpoint(trained, 8)
    (record,) = injector.poll()
    assert problem(older) is None and problem(newer) is not None
    assert newer.url in record["victim"] and "removed" in record["damage"]


class OneJob:
    """Ray's tables of a cluster of one node, and a job on it with one train worker."""

    def node_table(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeManagerAddress": "10.0.0.7", "NodeManagerHostname": "here"}]

    def job_table(self) -> list[dict[str, Any]]:
        at = {"DriverPid": 301, "DriverIPAddress": "10.0.0.7"}
        return [{"JobID": "01", "IsDead": False, **at}]

    def actor_table(self, *which: Any) -> dict[str, Any]:
        at = {"Address": {"NodeID": "a"}, "Pid": 400, "StartTime": 1}
        return {"b2": {"JobID": "01", "ActorClassName": "RayTrainWorker", **at}}


def test_a_job_elsewhere_whose_driver_has_the_same_number_is_left_alone() -> None:
    """That of a run whose own driver's machine is gone, say."""
    gcs = Gcs.__new__(Gcs)
    gcs._state = OneJob()  # type: ignore[assignment,unused-ignore]
    assert gcs.train_workers(Driver("here", 301, 0.0)) == [TrainWorker("a", 400)]
    assert gcs.train_workers(Driver("gone", 301, 0.0)) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_filesystem(tmp_path / "small", 4) as folder:
        yield folder


def test_a_full_disk_has_space_again_after_its_seconds(small_disk: Path) -> None:
    run = start_run(Storage(str(small_disk / "run")), step=9)
    with Injector(run, Faults().fill_disk_at(5, seconds=0.5), Target()) as injector:
        (record,) = injector.poll()
        assert os.statvfs(small_disk).f_bfree == 0
        assert record["bytes"] > 3 << 20 and str(small_disk) in record["victim"]
        assert injector.run(timeout_s=PATIENCE_S)
        assert os.statvfs(small_disk).f_bfree > 0
    with Injector(run, Faults().fill_disk_at(5, seconds=900), Target()) as injector:
        injector.poll()
        assert os.statvfs(small_disk).f_bfree == 0
    assert os.statvfs(small_disk).f_bfree > 0


def test_the_driver_is_killed_but_not_who_has_its_number_now(trained: Storage) -> None:
    driver, later = sleeper(), sleeper()
    try:
        start_run(trained, 9, pid=later.pid, since=time.time() - 3600)
        injector = Injector(trained, Faults().kill_driver_at(5), Target())
        assert injector.poll() == []
        start_run(trained, 9, pid=driver.pid, host="elsewhere")
        with pytest.raises(Impossible, match="elsewhere"):
            injector.aim(injector.pending[0]).strike()
        start_run(trained, 9, pid=driver.pid, pids="pid:[1]")  # a container's, on this host's name
        with pytest.raises(NotNow, match="another than its container's"):
            injector.aim(injector.pending[0]).strike()
        start_run(trained, 9, pid=driver.pid, pids=os.readlink("/proc/self/ns/pid"))
        injector.poll()
        assert driver.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        assert later.poll() is None
        trained.remove("driver.lock")
        with pytest.raises(NotNow, match="nobody drives"):
            injector.aim(Fault("kill_driver", 5))
    finally:
        for process in (driver, later):
            process.kill()
            process.wait()


def test_a_process_id_is_no_ticket_to_a_signal() -> None:
    stranger = sleeper()
    try:
        with pytest.raises(ProcessLookupError, match="no worker of raylet 1"):
            signal_ray_worker(stranger.pid, signal.SIGKILL, raylet_pid=1)
        with pytest.raises(ProcessLookupError, match="has ended"):
            signal_older_process(stranger.pid, signal.SIGKILL, time.time() - 3600)
        assert stranger.poll() is None
        assert stranger.pid in descendants(os.getpid())
        stranger.kill()
        wait_until(lambda: not is_running(stranger.pid), "the end of a process")  # a zombie now
        with pytest.raises(ProcessLookupError):
            signal_older_process(stranger.pid, signal.SIGKILL, time.time())
    finally:
        stranger.kill()
        stranger.wait()
