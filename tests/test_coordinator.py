"""The driver's own decisions, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tst_ray.config import load_config
from tst_ray.coordinator import Coordinator, _begin, check_model, memory_problem
from tst_ray.elastic import Node
from tst_ray.errors import RunError
from tst_ray.plan import ModelShape, build_plan
from tst_ray.storage import Storage

GIB = 2.0**30


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = load_config(None)
    remarks, shape = check_model(config, build_plan(config), None)
    assert not remarks
    return shape


def test_checkpoints_in_memory_take_half_of_the_object_stores_at_the_most(
    shape: ModelShape,
) -> None:
    billion = replace(shape, parameters=2**30)  # 12 GiB each; two kept and one on its way
    assert memory_problem(billion, [72 * GIB]) is None  # on one node, once
    assert memory_problem(billion, [36 * GIB] * 4) is None  # on several, twice
    told = memory_problem(billion, [35 * GIB] * 4)
    assert told is not None and "would take 72.0 GiB" in told and "have 140.0;" in told
    assert memory_problem(shape, [GIB]) is None  # the demo, where Ray has a single gibibyte


class Task:
    """Stands in for a Ray task: what it was asked with, and what came of it."""

    asked: dict[str, Any]

    def options(self, **options: Any) -> Task:
        self.asked = options
        return self

    def remote(self, *args: Any) -> str:
        return "reference"


def test_a_task_goes_where_its_memory_is_and_its_loss_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.exceptions import OutOfMemoryError

    def lost(reference: str) -> Any:
        raise OutOfMemoryError("the node ran low on memory\nand more")

    task = Task()
    nodes = [
        Node("head", {"CPU": 0.0, "memory": 256 * GIB}),
        Node("small", {"CPU": 4.0, "memory": 8 * GIB}),
        Node("large", {"CPU": 4.0, "memory": 64 * GIB}),
    ]
    monkeypatch.setattr("ray.remote", lambda function: task)
    monkeypatch.setattr("ray.get", lost)
    nodes.append(Node("blind", {"CPU": 4.0, "memory": 512 * GIB}))
    monkeypatch.setattr(
        "tst_ray.coordinator.living_nodes",
        lambda away: [node for node in nodes if node.node_id not in away],
    )
    for wanted, asked in ((0.0, 0.0), (12 * GIB, 12 * GIB), (96 * GIB, 32 * GIB)):
        wait = _begin("ray", memory_problem, memory=wanted, away=frozenset({"blind"}))
        assert task.asked.pop("label_selector") == {"ray.io/node-id": "!in(blind)"}
        assert task.asked == {"num_cpus": 1, "memory": asked}, "a task too large is tried anyway"
    with pytest.raises(RunError, match="memory_problem: the node ran low on memory and more"):
        wait()


# -- what the nodes of a cluster must see ----------------------------------------------------------


class Blind:
    """Stands in for what looked at the nodes: one of them sees nothing."""

    def __init__(self) -> None:
        self.required: list[str] = []

    def require(self, path: str) -> None:
        self.required.append(path)

    def settle(self) -> None:
        pass

    def unseen(self) -> frozenset[str]:
        return frozenset({"blind"})

    def problems(self) -> dict[str, str]:
        return {"blind": f"node 10.0.0.7 does not see {self.required[-1]}"}


def coordinator_on(place: Path, *options: str, cluster: bool = True) -> tuple[Coordinator, Storage]:
    config = load_config(None, ["--run.name=a", f"--run.storage={place}/runs", *options])
    coordinator = Coordinator(config, SimpleNamespace(say=lambda text: None))
    coordinator.sight, coordinator.on_cluster = Blind(), cluster  # type: ignore[assignment]
    return coordinator, Storage(config.run.storage) / config.run.name


@pytest.mark.parametrize(
    ("options", "shards", "setting"),
    [
        ([], "{place}/runs/shards/one", None),
        (["--data.cache={place}/cache"], "{place}/cache/one", "data.cache"),
        (["--data.prepared={place}/p"], "{place}/p", "data.prepared"),
        (["--data.prepared=s3://bucket/p"], "memory://bucket/p", None),
    ],
)
def test_nodes_must_see_shards_that_lie_elsewhere_than_the_run(
    tmp_path: Path, options: list[str], shards: str, setting: str | None
) -> None:
    options = [option.format(place=tmp_path) for option in options]
    manifest: Any = SimpleNamespace(folder=shards.format(place=tmp_path))
    coordinator, run = coordinator_on(tmp_path, *options)
    if setting is None:
        coordinator._require_shards(run, manifest)
        assert coordinator.sight.required == []  # type: ignore[attr-defined]
        return
    with pytest.raises(RunError, match=f"^{setting}: node 10.0.0.7 does not see .*manifest.json; "):
        coordinator._require_shards(run, manifest)
    coordinator, _ = coordinator_on(tmp_path, *options, cluster=False)
    coordinator._require_shards(run, manifest)
    assert coordinator.sight.required == []  # type: ignore[attr-defined]


def test_a_run_that_has_begun_goes_on_without_a_node_that_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tst_ray.coordinator.newest_step", lambda run: 100)
    coordinator, run = coordinator_on(tmp_path)
    coordinator._require(run, "run.storage", run.at("config.yaml"))
    assert coordinator.sight.required == [f"{tmp_path}/runs/a/config.yaml"]  # type: ignore[attr-defined]


def test_all_tasks_of_a_run_are_kept_off_nodes_that_do_not_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: ModelShape
) -> None:
    coordinator, run = coordinator_on(tmp_path)
    asked: list[tuple[str, frozenset[str]]] = []

    def call(backend: str, function: Any, *args: Any, away: frozenset[str], **rest: Any) -> Any:
        asked.append((function.__name__, away))
        return ((), shape) if function is check_model else (coordinator.plan.total_steps, [])

    monkeypatch.setattr("tst_ray.coordinator._call", call)
    for name in ("build_order", "build_feeds", "newest_step"):
        monkeypatch.setattr(f"tst_ray.coordinator.{name}", lambda *args: 0)
    monkeypatch.setattr("tst_ray.coordinator.mixture", lambda order: {})
    for name in ("_corpus_of", "_require_shards", "_charge", "_record_plan", "_train", "_finish"):
        monkeypatch.setattr(coordinator, name, lambda *args, **options: None)
    coordinator._drive(run, "ray", lambda: ((), shape))
    blind = frozenset({"blind"})
    assert asked == [("check_model", blind), ("export_model", blind)]
