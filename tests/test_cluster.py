"""Clusters of real nodes on this machine, and faults put into them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.chaos import (
    Faults,
    Injector,
    LocalTarget,
)
from cluster.local import LocalCluster
from cluster.processes import descendants, is_running
from cluster.targets import Driver, Gcs, NotNow, TrainWorker
from tests.chaos import PATIENCE_S, ROOT, start_attempt, start_run, wait_until
from tst_ray.storage import Storage


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


NOTICE_LOSS_SOON = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000}
OWN_RAY = """
import ray
def init(**options):
    ray.init = started
    resources = {"spot": 1}
    context = ray.init("local", num_cpus=1, resources=resources, include_dashboard=False, **options)
    print(context.address_info["gcs_address"], flush=True)
ray.init, started = init, ray.init
"""
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
def test_a_ray_that_a_run_started_is_found_by_the_run(tmp_path: Path) -> None:
    """Nothing is given but the run directory; Ray asks for a token, as it does of itself."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_RAY + DRIVER, "1"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        ((pid, _),) = json.loads(process.stdout.readline())
        run = start_run(Storage(str(tmp_path / "run")), 9, pid=process.pid)
        run.write_json("run.json", {"status": "running", "step": 9, "ray_address": address})
        done = subprocess.run(
            [sys.executable, "-m", "cluster.chaos", run.path, "--kinds=kill_worker", "--really",
             "--first-step=1", "--last-step=9"],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        wait_until(lambda: not is_running(pid), "the end of the worker")
    finally:
        process.terminate()  # Ray ends what it started
        process.communicate(timeout=PATIENCE_S)


LOOK = """
import sys, ray
from tst_ray.sight import Sight
ray.init(log_to_driver=False)
for path in sys.argv[1:]:
    sight = Sight({path: "run.storage"})
    sight.settle()
    print(len(sight.unseen()), *sight.problems().values())
"""


@pytest.mark.slow
def test_storage_that_a_node_does_not_see_is_told(cluster: LocalCluster, tmp_path: Path) -> None:
    """These nodes see all that this machine has, so a file that is nowhere stands for it."""
    cluster.add_node(1)
    (tmp_path / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path / "lock"), "/nowhere/lock"],
        env=os.environ | cluster.environment, cwd=ROOT, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen, unseen = done.stdout.splitlines()
    assert seen == "0"
    assert re.fullmatch(r"1 node \S+ does not see /nowhere/lock \(run.storage\)", unseen)


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

        # Ray notices an end later than /proc has it, and would name a victim that is gone.
        gcs = Gcs(cluster.address)
        wait_until(lambda: len(gcs.train_workers(None)) == 2, "that Ray notices the end")

        (lost,) = chaos("--kinds", "kill_node", "--really")
        wait_until(lambda: not is_running(ranks[lost["node"]].pid), "the end of a node")
        assert len(cluster.node_ids()) == 2
        wait_until(lambda: len(cluster.alive_node_ids()) == 2, "that Ray notices the loss")
        wait_until(lambda: len(gcs.train_workers(None)) == 1, "the end of its worker")

        (taken,) = chaos("--kinds", "drain", "--really")
        # It came back at the deadline, so the node is gone.
        assert 5 <= taken["seconds"] <= 30 and time.time() >= taken["time"] + taken["seconds"] - 1
        wait_until(lambda: not is_running(ranks[taken["node"]].pid), "the loss at the deadline")
        wait_until(lambda: taken["node"] not in cluster.node_ids(), "the end of its raylet")
        assert len({record["node"], lost["node"], taken["node"]}) == 3
