"""Fault injection: schedules, what is done to files, and to a cluster of real nodes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos import (
    DAMAGES,
    KINDS,
    Ballast,
    Fault,
    Faults,
    Injector,
    LocalTarget,
    damage,
    main,
    schedule,
)
from cluster.local import LocalCluster
from cluster.processes import descendants, is_running, signal_older_process, signal_ray_worker
from cluster.targets import Driver, Gcs, Impossible, NoCluster, NotNow, TrainWorker
from tst_ray.checkpoint import MARKER, META, CheckpointInfo, committed, folder_name, verify
from tst_ray.errors import ConfigError
from tst_ray.storage import Storage

ROOT = Path(__file__).parent.parent
PATIENCE_S = 180.0
GOLDEN = [("freeze", 2), ("drain", 14), ("kill_worker", 25), ("kill_node", 39)]
GOLDEN_CHOICE = 0.6509344730398537


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


# -- schedules -------------------------------------------------------------------------------------


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert schedule(7, 20, 50, 2000) == schedule(7, 20, 50, 2000)
    assert len({schedule(seed, 20, 50, 2000) for seed in range(50)}) == 50


def test_a_schedule_of_today_is_a_schedule_of_tomorrow() -> None:
    """Reports name seeds: another Python or another release must give the same faults."""
    assert [(fault.kind, fault.at_step) for fault in schedule(7, 4, 1, 40)] == GOLDEN
    assert schedule(7, 4, 1, 40)[0].choice == pytest.approx(GOLDEN_CHOICE, abs=1e-12)


@pytest.mark.parametrize(("num_faults", "first", "last"), [(1, 3, 3), (20, 5, 24), (20, 5, 2000)])
def test_each_fault_has_a_step_of_its_own_within_bounds(
    num_faults: int, first: int, last: int
) -> None:
    for seed in range(30):
        steps = [fault.at_step for fault in schedule(seed, num_faults, first, last)]
        assert steps == sorted(set(steps))
        assert len(steps) == num_faults
        assert first <= steps[0] and steps[-1] <= last


def test_steps_are_spread() -> None:
    for seed in range(30):
        steps = [fault.at_step for fault in schedule(seed, 10, 1, 1000)]
        assert [(step - 1) // 100 for step in steps] == list(range(10))


def test_every_kind_comes_equally_often() -> None:
    kinds = [fault.kind for fault in schedule(3, 2 * len(KINDS), 1, 1000, KINDS)]
    assert sorted(kinds) == sorted(2 * KINDS)
    assert kinds[: len(KINDS)] != list(KINDS)


def test_choices_and_durations_have_their_range() -> None:
    faults = [fault for seed in range(20) for fault in schedule(seed, 16, 1, 100, KINDS)]
    assert all(0 <= fault.choice < 1 for fault in faults)
    assert len({fault.choice for fault in faults}) == len(faults)
    lasting = {fault.kind for fault in faults if fault.seconds is not None}
    assert lasting == {"drain", "fill_disk"}
    assert all(5 <= fault.seconds <= 30 for fault in faults if fault.seconds is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 21, 5, 24), "21 faults need as many steps, and from 5 to 24 there are 20"),
        ((0, 1, 5, 4), "there are 0"),
        ((0, -1, 5, 9), "-1 faults"),
        ((0, 1, 1, 9, ()), "no kinds"),
        ((0, 1, 1, 9, ("meteor",)), "'meteor': use one of kill_worker"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schedule(*arguments)


def test_faults_are_chained_and_come_in_the_order_of_their_steps() -> None:
    faults = (
        Faults()
        .kill_node_at(step=12)
        .fail_at(rank=1, step=7)
        .freeze_at(rank=0, step=20, seconds=3)
        .drain_at(step=21, deadline_s=5)
        .add_node_at(step=22)
        .damage_checkpoint_at(step=23, how="cut")
        .fill_disk_at(step=24, seconds=2)
        .kill_driver_at(step=25)
    )
    assert faults == (
        Fault("kill_worker", 7, rank=1),
        Fault("kill_node", 12),
        Fault("freeze", 20, rank=0, seconds=3),
        Fault("drain", 21, seconds=5),
        Fault("add_node", 22),
        Fault("damage_checkpoint", 23, how="cut"),
        Fault("fill_disk", 24, seconds=2),
        Fault("kill_driver", 25),
    )
    assert Faults() == ()


def test_a_fault_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bend': use one of cut, flip, remove, unmark"):
        Faults().damage_checkpoint_at(step=1, how="bend")
    with pytest.raises(ConfigError, match="fill_disk needs `seconds`"):
        Fault("fill_disk", 1)


# -- files -----------------------------------------------------------------------------------------


def save_checkpoint(run: Storage, step: int) -> Storage:
    """A committed checkpoint of two small files."""
    import hashlib

    folder = run / "checkpoints" / folder_name(step)
    files = []
    for name in ("__0_0.distcp", ".metadata"):
        content = (name * 40).encode()
        folder.write(name, content)
        checksum = hashlib.sha256(content).hexdigest()
        files.append({"name": name, "bytes": len(content), "sha256": checksum})
    meta = json.dumps({"step": step, "files": files})
    folder.write(META, meta)
    folder.write(MARKER, hashlib.sha256(meta.encode()).hexdigest() + "\n")
    return folder


def problem(folder: Storage) -> str | None:
    return verify(CheckpointInfo(0, folder, {}))


@pytest.fixture(params=["local", "remote"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A run directory, on a local disk and on a filesystem that can only replace whole files."""
    storage = Storage(str(tmp_path) if request.param == "local" else "memory://chaos")
    storage.make()
    yield storage
    storage.remove()


@pytest.mark.parametrize("choice", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_one_that_verification_finds(run: Storage, how: str, choice: float) -> None:
    folder = save_checkpoint(run, 20)
    assert problem(folder) is None
    assert damage(folder, how, choice)
    assert problem(folder) is not None
    assert bool(committed(run / "checkpoints")) == (how != "unmark")


def test_damage_is_as_small_as_it_says(run: Storage) -> None:
    folder = save_checkpoint(run, 20)
    before = {name: folder.read(name) for name in folder.names()}
    said = damage(folder, "flip", 0.7)
    changed = [name for name in before if folder.read(name) != before[name]]
    assert len(changed) == 1 and changed[0] in said
    old, new = before[changed[0]], folder.read(changed[0])
    assert len(new) == len(old)
    assert sum((a ^ b).bit_count() for a, b in zip(old, new, strict=True)) == 1


def test_choice_decides_what_is_damaged_and_how(run: Storage) -> None:
    said = set()
    for index in range(40):
        said.add(damage(save_checkpoint(run, 20), choice=index / 40))
    assert {words.split()[0] for words in said} == {"cut", "flipped", "removed"}
    assert f"removed {MARKER}" in said
    assert all(any(name in words for words in said) for name in ("__0_0", ".metadata", META))


def test_a_checkpoint_that_is_gone_cannot_be_damaged(run: Storage) -> None:
    for how in DAMAGES:
        with pytest.raises(FileNotFoundError):
            damage(run / "checkpoints" / folder_name(5), how)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    pytest.skip("mounting is not permitted here")


def test_ballast_fills_a_disk_and_gives_it_back(small_disk: Path) -> None:
    (small_disk / "before").write_bytes(b"x")
    ballast = Ballast(str(small_disk))
    assert ballast.num_bytes > 3 << 20
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "more").write_bytes(b"x" * 5000)
    (small_disk / "more").unlink()
    assert [path.name for path in small_disk.iterdir()] == ["before"]
    ballast.release()
    ballast.release()
    (small_disk / "more").write_bytes(b"x" * (3 << 20))


def test_ballast_fills_a_disk_that_has_less_than_it_says(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem may keep some of its free space for itself."""
    monkeypatch.setattr("cluster.damage._free_bytes", lambda folder: 7 << 20)
    ballast = Ballast(str(small_disk))
    assert os.statvfs(small_disk).f_bfree == 0
    ballast.release()


def test_ballast_ends_with_its_process(small_disk: Path) -> None:
    code = (
        "import sys, time; from cluster.chaos import Ballast; b = Ballast(sys.argv[1])\n"
        "print('full', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(small_disk)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "full\n"
        assert os.statvfs(small_disk).f_bfree == 0
    finally:
        process.kill()
        process.communicate()
    assert os.statvfs(small_disk).f_bfree > 0


# -- injector --------------------------------------------------------------------------------------


class FakeTarget:
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
    injector = Injector(trained, Faults().damage_checkpoint_at(5, "remove"), NoCluster())
    assert injector.poll() == []
    older, newer = save_checkpoint(trained, 4), save_checkpoint(trained, 8)
    (record,) = injector.poll()
    assert problem(older) is None and problem(newer) is not None
    assert newer.url in record["victim"] and "removed" in record["damage"]


def test_a_full_disk_has_space_again_after_its_seconds(small_disk: Path) -> None:
    run = start_run(Storage(str(small_disk / "run")), step=9)
    with Injector(run, Faults().fill_disk_at(5, seconds=0.5), NoCluster()) as injector:
        (record,) = injector.poll()
        assert os.statvfs(small_disk).f_bfree == 0
        assert record["bytes"] > 3 << 20 and str(small_disk) in record["victim"]
        assert injector.run(timeout_s=PATIENCE_S)
        assert os.statvfs(small_disk).f_bfree > 0
    with Injector(run, Faults().fill_disk_at(5, seconds=900), NoCluster()) as injector:
        injector.poll()
        assert os.statvfs(small_disk).f_bfree == 0
    assert os.statvfs(small_disk).f_bfree > 0


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def test_the_driver_is_killed_but_not_who_has_its_number_now(trained: Storage) -> None:
    driver, later = sleeper(), sleeper()
    try:
        start_run(trained, 9, pid=later.pid, since=time.time() - 3600)
        injector = Injector(trained, Faults().kill_driver_at(5), NoCluster())
        assert injector.poll() == []
        start_run(trained, 9, pid=driver.pid, host="elsewhere")
        with pytest.raises(Impossible, match="elsewhere"):
            injector.aim(injector.pending[0]).strike()
        start_run(trained, 9, pid=driver.pid)
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


# -- command line ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_dry_run_prints_the_schedule_and_does_nothing(
    trained: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = sleeper()
    try:
        start_run(trained, 9, pid=driver.pid)
        folder = save_checkpoint(trained, 8)
        options = ["--seed", "3", "--faults", "8", "--first-step", "1", "--kinds", *KINDS]
        before = sorted(Path(trained.path).rglob("*"))
        free = os.statvfs(trained.path).f_bfree
        assert main([trained.path, *options]) == 0
        assert driver.poll() is None
        assert problem(folder) is None
        assert sorted(Path(trained.path).rglob("*")) == before
        assert os.statvfs(trained.path).f_bfree > free // 2
    finally:
        driver.kill()
        driver.wait()
    said = capsys.readouterr()
    assert "nothing is done without --really" in said.err
    lines = said.out.splitlines()
    faults = schedule(3, 8, 1, 40, KINDS)
    assert [line.split()[1:3] for line in lines] == [[str(f.at_step), f.kind] for f in faults]
    for line, fault in zip(lines, faults, strict=True):
        shown = {
            "damage_checkpoint": folder.url,
            "fill_disk": "bytes free",
            "kill_driver": f"process {driver.pid}",
            "add_node": "skipped: no program can order a node here",
        }
        assert shown.get(fault.kind, "skipped: needs a cluster; give its --address") in line


def test_a_schedule_goes_from_the_next_step_to_the_last(
    trained: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    reach(trained, 30)
    assert main([trained.path, "--faults", "10", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["step"] for record in records] == list(range(31, 41))
    assert {record["outcome"] for record in records} <= {"skipped", "waits"}


def test_with_really_it_is_done(trained: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    driver = sleeper()
    try:
        start_run(trained, 9, pid=driver.pid)
        folder = save_checkpoint(trained, 8)
        options = ["--faults=2", "--first-step=1", "--last-step=9", "--really"]
        assert main([trained.path, *options, "--kinds", "damage_checkpoint", "kill_driver"]) == 0
        assert driver.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        assert not committed(trained / "checkpoints") or problem(folder) is not None
    finally:
        driver.kill()
        driver.wait()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_it_ends_with_the_run(trained: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    trained.write_json("run.json", {"status": "finished", "updated": time.time() + 60})
    assert main([trained.path, "--kinds", "kill_driver", "--faults=3", "--really"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "the run ended before 3 of the faults" in said.err


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_users_mistakes_are_one_line_and_a_status(
    trained: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        text = capsys.readouterr().err
        assert text.startswith("chaos: ") and text.count("\n") == 1
        return text

    assert main([str(trained.url) + "-not"]) == 2
    assert "there is no run" in said()
    assert main([trained.path, "--faults=41"]) == 2
    assert "41 faults need as many steps" in said()
    assert main([trained.path, f"--address=127.0.0.1:{unused_port()}"]) == 1
    assert "no Ray cluster answers there" in said()
    assert main([trained.path, "--address=auto"]) == 1
    assert "no Ray cluster answers there" in said()
    assert main([trained.path, "--really"]) == 2
    assert "kill_worker" in said()
    trained.remove("plan.json")
    assert main([trained.path]) == 2
    assert "give --last-step" in said()
    with pytest.raises(SystemExit, match="2"):
        main([trained.path, "--kinds", "meteor"])


# -- a cluster of real nodes -----------------------------------------------------------------------

NOTICE_LOSS_SOON = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000}
DRIVER = """
import json, os, sys, time, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, resources={"spot": 1})
class RayTrainWorker:
    def where(self):
        return os.getpid(), ray.get_runtime_context().get_node_id()
    def train(self):
        time.sleep(3600)

workers = [RayTrainWorker.remote() for _ in range(int(sys.argv[1]))]
print(json.dumps(ray.get([worker.where.remote() for worker in workers])), flush=True)
ray.wait([worker.train.remote() for worker in workers], num_returns=len(workers))
time.sleep(3600)
"""


@contextlib.contextmanager
def driver(
    cluster: LocalCluster, num_workers: int
) -> Iterator[tuple[subprocess.Popen[str], list[TrainWorker]]]:
    """A driver whose actors are named like Ray Train's workers and are busy; and where they are."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(num_workers)], env=os.environ | cluster.environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        wait_until(lambda: all(b"train" in command_line(pid) for pid, _ in found), "busy workers")
        yield process, [TrainWorker(node, pid) for pid, node in found]
    finally:
        process.kill()
        process.communicate()


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(head_cpus=1, system_config=NOTICE_LOSS_SOON) as cluster:
        yield cluster


@pytest.fixture
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The head alone, at first."""
    yield local_cluster
    for node_id in local_cluster.node_ids():
        local_cluster.remove_node(node_id)
    wait_until(lambda: not local_cluster.alive_node_ids(), "the loss of the last node")


SPOT = {"spot": 2.0}


@pytest.mark.slow
def test_nodes_join_and_are_lost_with_all_that_runs_there(cluster: LocalCluster) -> None:
    gcs = Gcs(cluster.address)
    first, second = cluster.add_node(1, SPOT), cluster.add_node(2, SPOT)
    assert cluster.node_ids() == cluster.alive_node_ids() == [first, second]
    resources = {node["NodeID"]: node["Resources"] for node in gcs.nodes()}
    assert set(resources) == {cluster.head_id, first, second}
    assert [resources[node]["CPU"] for node in (first, second)] == [1, 2]
    assert gcs.losable_nodes() == sorted([first, second])

    with driver(cluster, 3) as (_, workers):
        assert sorted(worker.node_id for worker in workers) == sorted([first, second, second])
        there = {worker.pid for worker in workers if worker.node_id == second}
        on_node = [cluster.raylet_pid(second), *descendants(cluster.raylet_pid(second))]
        assert there < set(on_node)
        cluster.remove_node(second)
        assert not any(map(is_running, on_node))  # not a moment later than its loss
        assert cluster.node_ids() == [first]
        wait_until(lambda: cluster.alive_node_ids() == [first], "that Ray notices the loss")
        assert all(is_running(worker.pid) for worker in workers if worker.node_id == first)
    for gone in (second, cluster.head_id, "00" * 28):
        with pytest.raises(KeyError, match="no node"):
            cluster.remove_node(gone)


@pytest.mark.slow
def test_a_reclaim_is_a_notice_and_then_a_loss(cluster: LocalCluster) -> None:
    gcs = Gcs(cluster.address)
    busy = cluster.add_node(1, SPOT)
    with driver(cluster, 1) as (_, [worker]):
        idle = cluster.add_node(1)
        cluster.drain_node(idle, deadline_s=3600)
        wait_until(lambda: idle not in cluster.node_ids(), "that an idle node leaves at the notice")

        noticed = time.monotonic()
        cluster.drain_node(busy, deadline_s=4)
        assert gcs.losable_nodes() == []  # a node with a notice is none to strike
        while time.monotonic() < noticed + 3:
            assert is_running(worker.pid) and busy in cluster.alive_node_ids()
            time.sleep(0.1)
        wait_until(lambda: not is_running(worker.pid), "the loss at the deadline")
        assert time.monotonic() >= noticed + 4
        wait_until(lambda: busy not in cluster.alive_node_ids(), "that Ray notices the loss")
    assert cluster.node_ids() == []


@pytest.mark.slow
def test_a_node_that_is_cut_off_works_on_without_ray(cluster: LocalCluster) -> None:
    node = cluster.add_node(1, SPOT)
    with driver(cluster, 1) as (_, [worker]):
        cluster.cut_off_node(node)
        wait_until(lambda: not cluster.alive_node_ids(), "that Ray takes it for lost")
        assert Gcs(cluster.address).train_workers(None) == []
        assert is_running(worker.pid) and cluster.node_ids() == [node]
        cluster.remove_node(node)
        assert not is_running(worker.pid) and cluster.node_ids() == []


@pytest.mark.slow
def test_a_cluster_leaves_no_process_and_no_file(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not touch what tells Ray which cluster of this machine is the last."""
    last = tmp_path / "ray" / "ray_current_cluster"
    last.parent.mkdir()
    last.write_text("192.0.2.1:6379")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    before = dict(os.environ)
    children, handler = set(descendants(os.getpid())), signal.getsignal(signal.SIGTERM)
    with LocalCluster(head_cpus=1) as other:
        other.add_node(1, SPOT)
        with driver(other, 1):
            assert other.address != cluster.address
            assert list(Path(other.folder).rglob("raylet.out"))
            assert len(set(descendants(os.getpid())) - children) > 6
    assert not Path(other.folder).exists()
    assert set(descendants(os.getpid())) == children
    assert last.read_text() == "192.0.2.1:6379"
    assert dict(os.environ) == before
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_nodes_are_added_on_the_main_thread_only(cluster: LocalCluster) -> None:
    errors = []

    def add() -> None:
        try:
            cluster.add_node(1)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    assert errors == ["nodes are added and removed on the main thread only"]


@pytest.mark.slow
def test_only_the_workers_of_the_run_are_found_and_struck(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """Not those of another run on the cluster, nor those of another cluster on the machine."""
    for _ in range(3):
        cluster.add_node(1, SPOT)
    with (
        driver(cluster, 2) as (process, workers),
        driver(cluster, 1) as (_, others),
        LocalCluster(head_cpus=0) as elsewhere,
    ):
        elsewhere.add_node(1, SPOT)
        with driver(elsewhere, 1) as (_, strangers):
            target = LocalTarget(cluster, node_resources=SPOT)
            owner = Driver(socket.gethostname(), process.pid, time.time())
            assert set(target.workers(owner)) == set(workers)
            assert set(target.workers(None)) == {*workers, *others}
            assert target.workers(Driver(owner.host, 1, time.time())) == []
            for stranger in strangers:
                with pytest.raises(NotNow):
                    target.signal_worker(stranger, signal.SIGKILL)
                with pytest.raises(NotNow):  # a number that another cluster's worker has by now
                    stale = TrainWorker(workers[0].node_id, stranger.pid)
                    target.signal_worker(stale, signal.SIGKILL)

            run = start_run(Storage(str(tmp_path / "run")), 9, pid=process.pid)
            start_attempt(run, *(worker.node_id for worker in workers))
            faults = Faults().fail_at(5, rank=1).freeze_at(6).fail_at(7).add_node_at(8)
            injector = Injector(run, faults, target)
            injector.poll()
            wait_until(lambda: not is_running(workers[1].pid), "the end of rank 1")
            assert [record["kind"] for record in injector.done] == [
                "kill_worker", "freeze", "add_node",
            ]  # fmt: skip
            assert injector.done[2]["node"] in cluster.node_ids()
            wait_until(lambda: state(workers[0].pid) == "T", "a frozen worker")
            assert [fault.kind for fault in injector.pending] == ["kill_worker"]  # none is left
            wait_until(lambda: target.workers(owner) == [workers[0]], "that Ray notices")
            assert all(is_running(worker.pid) for worker in [*others, *strangers])


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_a_cluster_that_others_started_is_struck_by_tasks(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """The command line, in a process that knows the address alone."""
    for _ in range(3):
        cluster.add_node(1, SPOT)
    with driver(cluster, 3) as (process, workers):
        run = start_run(Storage(str(tmp_path / "run")), 9, pid=process.pid)
        ranks = {worker.node_id: worker for worker in workers}
        command = [
            sys.executable, "-m", "cluster.chaos", run.path, "--first-step=1", "--last-step=9",
            f"--address={cluster.address}", "--json",
        ]  # fmt: skip

        def chaos(*options: str) -> list[dict[str, Any]]:
            done = subprocess.run(
                [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S
            )
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr
            return [json.loads(line) for line in done.stdout.splitlines()]

        (record,) = chaos("--kinds", "kill_node")
        assert record["outcome"] == "not done" and record["node"] in ranks
        assert all(is_running(worker.pid) for worker in workers)

        (record,) = chaos("--kinds", "kill_worker", "--really")
        wait_until(lambda: not is_running(record["pid"]), "the end of a worker")
        assert sum(is_running(worker.pid) for worker in workers) == 2

        (lost,) = chaos("--kinds", "kill_node", "--really")
        wait_until(lambda: not is_running(ranks[lost["node"]].pid), "the end of a node")
        assert len(cluster.node_ids()) == 2
        wait_until(lambda: len(cluster.alive_node_ids()) == 2, "that Ray notices the loss")

        (taken,) = chaos("--kinds", "drain", "--really")
        # It came back at the deadline, so the node is gone.
        assert 5 <= taken["seconds"] <= 30 and time.time() >= taken["time"] + taken["seconds"] - 1
        wait_until(lambda: not is_running(ranks[taken["node"]].pid), "the loss at the deadline")
        wait_until(lambda: taken["node"] not in cluster.node_ids(), "the end of its raylet")
        assert len({record["node"], lost["node"], taken["node"]}) == 3
