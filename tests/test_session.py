"""The cluster that a run uses: what it must have, whom it asks for more, what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tst_ray import forkclient, session
from tst_ray.config import Config, load_config
from tst_ray.elastic import Node
from tst_ray.errors import ConfigError, RunError
from tst_ray.plan import build_plan
from tst_ray.session import (
    ask_autoscaler,
    check_capacity,
    check_local,
    local_cpus,
    ray_session,
    unused_gpus,
    worker_resources,
)


def config_of(*overrides: str) -> Config:
    return load_config(None, ["--train.steps=100", *overrides])


def nodes(*cpus: float, gpus: float = 0.0) -> list[Node]:
    return [Node(f"n{i}", {"CPU": c, "GPU": gpus}) for i, c in enumerate(cpus)]


# -- a Ray on this machine -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "options", "cpus"),
    [
        (2, [], 3),  # the demo: two workers, and its reader shares a core with them
        (1, [], 3),
        (16, [], 16),
        (4, ["--cluster.workers=[1, 64]"], 5),  # no more workers than cores
        (4, ["--cluster.workers=[1, 64]", "--cluster.cpus_per_worker=2"], 5),
        (4, ["--cluster.workers=[1, 64]", "--cluster.cpus_per_worker=0.5"], 5),
        (4, ["--cluster.workers=3", "--cluster.data_cpus=4"], 7),
    ],
)
def test_a_range_of_workers_goes_as_far_as_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, options: list[str], cpus: int
) -> None:
    monkeypatch.setattr(session, "_cores", lambda: cores)
    config = config_of("--train.batch_size=64", *options)
    assert local_cpus(config, build_plan(config)) == cpus


def test_what_trains_nothing_needs_no_cpus_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_cores", lambda: 4)
    config = config_of("--cluster.workers=16")
    with pytest.raises(ConfigError, match="this machine has 4"):
        check_local(config, build_plan(config))
    assert local_cpus(config, None) == 4


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1)]
)
def test_a_container_has_the_cores_of_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert session._cores(tmp_path / "cpu.max") == cores
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert session._cores(tmp_path / "cpu.max") == session._cores(tmp_path / "none") == 64


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_of_another_kind_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    config = config_of("--cluster.fork_server=false")
    told = pytest.raises(RunError, match=f"RAY_ADDRESS = {address}: give HOST:PORT")
    with told, ray_session(config, build_plan(config)):
        pass


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("lacks", [[], ["setup_worker_path"], ["no_monitor", "setup_worker_path"]])
def test_a_local_ray_is_told_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, lacks: list[str], forks: bool
) -> None:
    """Parameters of Ray's own, which another Ray may have no more."""
    import ray
    from ray._private import parameter

    wanted = {"no_monitor": True} | ({"setup_worker_path": forkclient.__file__} if forks else {})
    known = [name for name in ("no_monitor", "setup_worker_path") if name not in lacks]

    class RayParams:
        __signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in known]
        )

        def __init__(self, **given: Any) -> None:
            told.append(given)

    told: list[dict[str, Any]] = []
    info = {"gcs_address": "here", "session_dir": "/tmp"}

    def init(**options: Any) -> Any:
        parameter.RayParams()
        return SimpleNamespace(address_info=info)

    monkeypatch.setattr(parameter, "RayParams", RayParams)
    monkeypatch.setattr(ray, "init", init)
    config = config_of(f"--cluster.fork_server={str(forks).lower()}")
    with session._started(config, None) as started:
        assert (started.is_local, started.address) == (True, "here")
    assert told == [{name: value for name, value in wanted.items() if name in known}]
    assert parameter.RayParams is RayParams, "for others, it is what it was"


# -- room ------------------------------------------------------------------------------------------


class Cluster:
    """Nodes that come when an autoscaler was asked and some time has passed; no time passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *cpus: float) -> None:
        self.nodes, self.coming, self.asked, self.now = nodes(*cpus), nodes(), [], 0.0
        monkeypatch.setattr(session, "living_nodes", lambda: self.nodes)
        monkeypatch.setattr(session, "ask_autoscaler", self._ask)
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(session, "time", clock)

    def _ask(self, config: Config, num_workers: int) -> None:
        self.asked.append(num_workers)
        self.coming = nodes(*[1.0] * (num_workers + 1))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 60:
            self.nodes = [*self.nodes, *self.coming]


TWO_SIZES = ["--tst.workers=2", "--cluster.workers=8"]


def capacity(step: int, *options: str) -> list[str]:
    config = config_of(*TWO_SIZES, *options)
    said: list[str] = []
    check_capacity(config, build_plan(config), step, said.append)
    return said


def test_a_cluster_that_does_not_grow_must_have_room_for_every_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(monkeypatch, 4)
    with pytest.raises(RunError, match=r"workers = 8: needs 8 x 1 CPU .* the cluster has 4 CPU"):
        capacity(0)
    assert not cluster.asked
    Cluster(monkeypatch, 9)
    assert capacity(0) == []


@pytest.mark.parametrize(("step", "workers"), [(0, 2), (29, 2), (30, 8)])
def test_a_cluster_that_grows_is_asked_for_the_phase_that_comes_next(
    monkeypatch: pytest.MonkeyPatch, step: int, workers: int
) -> None:
    """From nothing: an autoscaler starts no node that nobody asks for."""
    cluster = Cluster(monkeypatch)
    (said,) = capacity(step, "--cluster.wait_s=3600")
    assert f"waiting for the cluster to grow: cluster.workers = {workers}" in said
    assert set(cluster.asked) == {workers}
    assert len(cluster.asked) == 6, "in a minute: others put theirs in its place"


def test_a_finished_run_needs_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    Cluster(monkeypatch)  # with a head alone, which has no CPU
    assert capacity(100, "--cluster.wait_s=10") == []


def test_waiting_for_a_cluster_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, 1)
    with pytest.raises(RunError, match="workers = 2: needs"):
        capacity(0, "--cluster.wait_s=30")
    assert 30 <= cluster.now < 32


def test_gpus_that_nobody_trains_on_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "living_nodes", lambda: nodes(8, 8, gpus=4))
    assert unused_gpus(config_of()) == 8
    assert unused_gpus(config_of("--cluster.gpus_per_worker=1")) == 0


def test_an_autoscaler_is_asked_for_other_nodes_than_those_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Ray's own function, which refuses what is no label selector."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        "ray.autoscaler.sdk.sdk.commands.request_resources", lambda *args: asked.append(args)
    )
    config = config_of("--cluster.data_cpus=1")
    for workers, without in ((2, {"b2", "a1"}), (1, ()), (0, ())):
        ask_autoscaler(config, workers, without)
    worker, away = worker_resources(config), {"ray.io/node-id": "!in(a1,b2)"}
    assert asked == [
        (None, [worker, worker, {"CPU": 1.0}], [away, away, away]),
        (None, [worker, {"CPU": 1.0}], [{}, {}]),
        (None, [], []),
    ]


def test_the_object_stores_are_those_that_the_fewest_workers_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stores = {"head": 1.0, "a": 8.0, "b": 4.0, "c": 16.0}
    places = {"head": 0.0, "a": 2.0, "b": 1.0, "c": 4.0}
    there = [Node(n, {"CPU": places[n], "object_store_memory": stores[n]}) for n in stores]
    monkeypatch.setattr(session, "living_nodes", lambda without=(): there)
    for workers, smallest in ((1, [4, 8]), (4, [4, 8]), (6, [4, 8]), (7, [4, 8, 16])):
        assert session.object_stores(config_of(), workers) == smallest
    there[2:] = []
    assert session.object_stores(config_of(), 1) == [8.0], "one node has them once"
