"""Requests for nodes: through Ray's coordinator, beside others', and with a real autoscaler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.autoscaler import AutoscaledCluster
from tests.chaos import ROOT
from tests.test_recovery import SETTINGS
from tests.test_runs import events, write_text
from tests.test_session import config_of
from tst_ray import autoscaler
from tst_ray.nodes import ask_autoscaler, keep_nodes, worker_resources

PATIENCE_S = 400.0
CPU = {"CPU": 1.0}


class Coordinator:
    """Ray's own actor, in this process; and what it sends to the autoscaler, the last one last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.sent: list[tuple[list[Any], list[Any] | None]] = []
        module = autoscaler._coordinator_module()
        self.actor = module._AutoscalingCoordinatorActor(
            lambda: self.now,
            lambda bundles, label_selectors=None: self.sent.append((bundles, label_selectors)),
            lambda: [],
        )
        handle = SimpleNamespace(
            request_resources=SimpleNamespace(remote=self.actor.request_resources),
            cancel_request=SimpleNamespace(remote=self.actor.cancel_request),
        )
        monkeypatch.setattr(module, "get_or_create_autoscaling_coordinator", lambda: handle)
        monkeypatch.setattr("ray.wait", lambda answers, timeout: (answers, []))
        monkeypatch.setattr("ray.get", lambda answers: answers)

    def asked(self) -> list[Any]:
        """The bundles that the autoscaler is asked for once the coordinator has looked again."""
        self.actor._tick()
        return self.sent[-1][0]


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    return Coordinator(monkeypatch)


def test_this_ray_has_what_is_needed_to_ask_through_its_coordinator() -> None:
    """If this fails, Ray has changed: see what autoscaler.py lists, or runs ask as they did."""
    autoscaler.is_coordinated.cache_clear()
    assert autoscaler.is_coordinated()


def test_two_runs_add_up_and_end_by_themselves(coordinator: Coordinator) -> None:
    one = config_of("--run.name=one")
    two = config_of("--run.name=two")
    ask_autoscaler(one, 2)
    ask_autoscaler(two, 3)
    assert coordinator.asked() == [CPU] * (3 + 4), "with a CPU each for reading"
    ask_autoscaler(one, 1)
    assert coordinator.asked() == [CPU] * (2 + 4), "in place of its own"
    ask_autoscaler(two, 0)
    assert coordinator.asked() == [CPU] * 2
    ask_autoscaler(two, 0)  # again, as at a run's very end


def test_the_request_of_a_killed_driver_expires(coordinator: Coordinator) -> None:
    config = config_of()
    ask_autoscaler(config, 2)
    for _ in range(20):
        coordinator.now += 10.0
        ask_autoscaler(config, 2)
    assert coordinator.asked() == [CPU] * 3, "as long as it is repeated, it stands"
    coordinator.now += autoscaler.EXPIRES_S + 1
    assert coordinator.asked() == []


def test_the_next_driver_of_a_run_takes_its_request_over(coordinator: Coordinator) -> None:
    """By the run's name and storage; another storage's run of that name is another run."""
    ask_autoscaler(config_of("--run.storage=/a"), 2)
    ask_autoscaler(config_of("--run.storage=/a"), 1)
    assert coordinator.asked() == [CPU] * 2
    ask_autoscaler(config_of("--run.storage=/b"), 2)
    assert coordinator.asked() == [CPU] * 5


def test_where_nodes_may_not_be_reaches_the_autoscaler(coordinator: Coordinator) -> None:
    config = config_of("--cluster.data_cpus=1", "--cluster.resources_per_worker={spot: 1}")
    ask_autoscaler(config, 1, {"b2", "a1"})
    away = {"ray.io/node-id": "!in(a1,b2)"}
    assert coordinator.sent[-1] == ([worker_resources(config), CPU], [away, away])


def test_while_text_is_tokenized_nodes_are_kept_and_none_of_their_cpus(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data reads on the CPUs that nobody asked for."""
    cluster = [
        {"NodeID": name, "Alive": True, "Resources": {"CPU": 1.0, "object_store_memory": 1e8}}
        for name in ("a", "b", "c")
    ]
    coordinator.actor._get_cluster_nodes = lambda: cluster
    monkeypatch.setattr("ray.nodes", lambda: cluster)
    monkeypatch.setattr("tst_ray.nodes.draining_nodes", set)

    def of_ray_data() -> float:
        remaining = ["CPU", "object_store_memory"]
        coordinator.actor.request_resources("data", [], 1e9, request_remaining=remaining)
        coordinator.actor._tick()
        reserved = coordinator.actor.get_reserved_resources("data").values()
        return sum(node.get("CPU", 0.0) for node in reserved)

    ask_autoscaler(config_of(), 2)
    assert of_ray_data() == 0.0
    keep_nodes(config_of())
    assert of_ray_data() == 3.0
    bundles, selectors = coordinator.sent[-1]
    assert bundles == [{"object_store_memory": 1.0}] * 3
    assert selectors == [{"ray.io/node-id": f"in({name})"} for name in ("a", "b", "c")]
    coordinator.now += autoscaler.EXPIRES_S + 1
    assert coordinator.asked() == []


def test_a_cluster_that_does_not_answer_ends_no_run(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a coordinator that takes long to start, nor a head node that is away."""
    monkeypatch.setattr("ray.wait", lambda answers, timeout: ([], answers))
    ask_autoscaler(config_of(), 1)
    assert coordinator.asked() == [CPU] * 2, "it hears later"

    def away(*args: Any, **options: Any) -> None:
        raise RuntimeError("no GCS")

    monkeypatch.setattr("ray.wait", away)
    ask_autoscaler(config_of(), 1)
    ask_autoscaler(config_of(), 0)


def test_a_group_of_ray_train_asks_for_nothing_besides() -> None:
    """The run has asked for its workers; both would add up. In the controller it holds, too."""
    import pickle

    import ray.train
    from ray.train.v2._internal.execution.scaling_policy import create_scaling_policy

    def policy() -> Any:
        return create_scaling_policy(ray.train.ScalingConfig(num_workers=3))

    asked: list[int] = []
    client = SimpleNamespace(
        maybe_send_resource_request=lambda config, workers: asked.append(workers),
        send_resource_request=lambda config, workers: asked.append(workers),
    )
    loud, quiet = policy(), policy()
    autoscaler.leave_to_the_run({"scaling_policy": quiet})
    for each in (loud, pickle.loads(pickle.dumps(quiet))):
        each._coordinator_client = client
        each._send_resource_request()
        assert each.make_decision_for_non_running_worker_group().num_workers == 3
        each.make_decision_for_running_worker_group(None, None)
    assert asked == [3, 3, 3], "the one that was left as it is"
    autoscaler.leave_to_the_run({})


def test_a_ray_without_a_coordinator_is_asked_as_before(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray's public function, for what is asked last; and Ray Train asks for its own."""
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "ray.autoscaler.sdk.sdk.commands.request_resources", lambda *args: told.append(args)
    )
    monkeypatch.setattr(autoscaler, "is_coordinated", lambda: False)
    config = config_of("--cluster.data_cpus=1")
    for workers, without in ((2, {"b2", "a1"}), (1, ()), (0, ())):
        ask_autoscaler(config, workers, without)
    away = {"ray.io/node-id": "!in(a1,b2)"}
    assert told == [
        (None, [CPU] * 3, [away] * 3),
        (None, [CPU] * 2, [{}] * 2),
        (None, [], []),
    ]
    assert coordinator.sent == []
    policy = SimpleNamespace(_send_resource_request=None)
    autoscaler.leave_to_the_run({"scaling_policy": policy})
    assert policy._send_resource_request is None


@pytest.mark.parametrize("lost", ["get_or_create_autoscaling_coordinator", "signature"])
def test_another_ray_is_not_asked_in_a_way_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    module = autoscaler._coordinator_module()
    if lost == "signature":
        other = lambda self, requester_id, resources: None  # noqa: E731
        monkeypatch.setattr(module._AutoscalingCoordinatorActor, "request_resources", other)
    else:
        monkeypatch.delattr(module, lost)
    autoscaler.is_coordinated.cache_clear()
    assert not autoscaler.is_coordinated()
    monkeypatch.undo()
    autoscaler.is_coordinated.cache_clear()
    assert autoscaler.is_coordinated()


DRIVER = """
import sys
from tst_ray import autoscaler
from tst_ray.cli import main
if sys.argv[1] == "alone":
    autoscaler.is_coordinated = lambda: False
sys.exit(main(["run", *sys.argv[2:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "idle_s"), [("coordinated", 12.0), ("alone", 90.0)])
def test_a_phase_of_more_workers_gets_its_machines_from_a_real_autoscaler(
    tmp_path: Path, how: str, idle_s: float
) -> None:
    """Phase one on one worker, phase two on three, each machine of one CPU and 10 s to start.

    Coordinated, no machine is ordered that is not needed, and none is taken away while phase two
    waits, though they wait for as long as makes one idle. By Ray's public function alone this holds
    only if machines may be idle for long.
    """
    changes = {
        "run.name": "grows", "run.storage": tmp_path, "data.sources": write_text(tmp_path / "text"),
        "train.steps": 40, "tst.ratio": 0.5, "tst.workers": 1, "cluster.workers": 3,
        "cluster.resources_per_worker": "{}", "cluster.data_cpus": 1, "cluster.wait_s": 300,
        "checkpoint.every": 100, "checkpoint.memory_every": "null", "metrics.val_every": 100,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in (SETTINGS | changes).items()]
    with AutoscaledCluster(tmp_path, most=4, idle_s=idle_s, boot_s=10.0) as cluster:
        log = tmp_path / "log"
        with log.open("w") as output:
            status = subprocess.run(
                [sys.executable, "-c", DRIVER, how, *options],
                cwd=ROOT, env=os.environ | cluster.environment, stdout=output, stderr=output,
                timeout=PATIENCE_S,
            ).returncode  # fmt: skip
        assert status == 0, log.read_text()[-4000:]
        attempts = events(tmp_path / "grows", "attempt")
        assert [attempt["world_size"] for attempt in attempts] == [1, 3]
        began = attempts[-1]["time"]
        orders = [(order.what, order.machine) for order in cluster.orders() if order.time < began]
        assert not [machine for what, machine in orders if what == "taken away"], orders
        if how == "coordinated":
            wanted = [f"{number:05}" for number in range(1, 5)]
            assert orders == [("started", machine) for machine in wanted]
            (switch,) = events(tmp_path / "grows", "switch")
            assert began - switch["time"] < 60.0, "10 s for machines, and the start of a group"
            cluster.wait_until_empty()
