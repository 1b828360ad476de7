"""Which nodes may be used: those where a look has found the run's folder."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pyarrow import ArrowInvalid
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem
from ray.exceptions import NodeDiedError, RayTaskError

from tst_ray import sight as sight_module
from tst_ray.config import load_config
from tst_ray.elastic import Node
from tst_ray.room import Room
from tst_ray.runstore import run_storage
from tst_ray.sight import Sight, needed_everywhere
from tst_ray.storage import Storage
from tst_ray.timeouts import LOOK_S

NEEDED = {"/runs/a/config.yaml": "run.storage", "/shards/manifest.json": "data.prepared"}
BLIND = (False, "node 10.0.0.7 does not see it")


class Looks:
    """The nodes of a cluster, and what a look at each of them finds once it is answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.living = {"own": 1.0, "a": 1.0}  # and their CPUs
        self.answers: dict[str, tuple[bool, str | None]] = {}
        self.begun: list[str] = []
        self.given_up: list[str] = []
        self.now = 1000.0
        monkeypatch.setattr(sight_module, "own_node", lambda: "own")
        monkeypatch.setattr(
            sight_module,
            "living_nodes",
            lambda: [Node(name, {"CPU": cpus}) for name, cpus in self.living.items()],
        )
        monkeypatch.setattr(sight_module, "_begin", self._begin)
        monkeypatch.setattr(sight_module, "_is_done", lambda task: task in self.answers)
        monkeypatch.setattr(sight_module, "_answer", lambda task, *_: self.answers[task])
        monkeypatch.setattr(sight_module, "_give_up", self.given_up.append)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _begin(self, node: str, needed: dict[str, str]) -> str:
        assert needed == NEEDED
        self.begun.append(node)
        return node

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    return Looks(monkeypatch)


def test_a_node_is_used_once_it_was_seen_to_see(looks: Looks) -> None:
    sight = Sight(NEEDED)
    sight.look()
    assert (sight.unseen(), looks.begun) == ({"a"}, ["a"])
    assert sight.where() == {"ray.io/node-id": "in(own)"}
    assert sight.problems() == {}, "nobody knows yet"
    assert sight.is_looking
    looks.answers["a"] = (True, None)
    sight.look()
    assert sight.unseen() == frozenset()
    assert not sight.is_looking
    assert sight.where() == {"ray.io/node-id": "in(a,own)"}
    looks.living["b"] = 1.0
    sight.look()
    assert (sight.unseen(), looks.begun) == ({"b"}, ["a", "b"])


def test_an_autoscaler_is_asked_for_others_than_blind_nodes_not_than_new_ones(
    looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would start two machines for each that is looked at, and take the first one away."""
    asked: list[set[str]] = []
    monkeypatch.setattr(
        "tst_ray.room.ask_autoscaler", lambda config, workers, without: asked.append(set(without))
    )
    looks.living["b"] = 1.0
    sight = Sight(NEEDED)
    room = Room(load_config(None), 1, 3, sight)
    sight.look()
    room.ask()
    looks.answers |= {"a": BLIND, "b": (True, None)}
    sight.look()
    room.ask()
    looks.now += 11
    del looks.answers["a"]
    sight.look()  # again
    room.ask()
    assert asked == [set(), {"a"}, {"a"}]


def test_a_node_that_does_not_see_is_told_and_asked_again(looks: Looks) -> None:
    sight = Sight(NEEDED)
    looks.answers["a"] = BLIND
    sight.settle()
    assert (sight.unseen(), sight.problems()) == ({"a"}, {"a": BLIND[1]})
    looks.now += 11
    del looks.answers["a"]
    sight.look()
    assert looks.begun == ["a", "a"]
    assert sight.problems() == {"a": BLIND[1]}, "as long as nobody knows better"
    looks.answers["a"] = (True, None)
    sight.look()
    assert (sight.unseen(), sight.problems()) == (frozenset(), {})


def test_a_blind_node_is_left_alone_for_longer_and_longer(looks: Looks) -> None:
    """A look makes it busy: an autoscaler takes away only what is idle for some minutes."""
    sight = Sight(NEEDED)
    looks.answers["a"] = BLIND
    times = []
    for _ in range(3600):
        sight.look()
        times += [looks.now] * (len(looks.begun) - len(times))
        looks.now += 1
    pauses = [b - a for a, b in pairwise(times)]
    assert pauses[0] < 15
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(600, abs=3)


def test_nodes_that_are_gone_or_have_no_cpus_are_no_matter(looks: Looks) -> None:
    sight = Sight(NEEDED)
    looks.living["head"] = 0.0
    looks.answers["a"] = BLIND
    sight.settle()
    assert looks.begun == ["a"]
    del looks.living["a"]
    sight.look()
    assert (sight.unseen(), sight.problems()) == (frozenset(), {})
    looks.living.clear()
    sight.look()
    assert sight.where() == {}


def test_a_node_that_hangs_is_given_up_and_not_waited_for_again(looks: Looks) -> None:
    sight = Sight(NEEDED)
    sight.settle()
    assert looks.now - 1000 == pytest.approx(LOOK_S, abs=1)
    assert (sight.unseen(), looks.given_up) == ({"a"}, ["a"])
    assert sight.problems() == {}, "nobody knows"
    looks.now += 60
    sight.settle()
    assert looks.now - 1000 == pytest.approx(LOOK_S + 60, abs=1)
    assert looks.begun == ["a", "a"]


def test_who_has_enough_nodes_does_not_wait_for_more(looks: Looks) -> None:
    sight = Sight(NEEDED)
    sight.settle(lambda: sight.where() == {"ray.io/node-id": "in(own)"})
    assert looks.now == 1000


def test_a_look_says_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    asked = [str(tmp_path / name) for name in ("here", "not", "nor")]
    assert sight_module.missing(of_the_run(*asked)) == dict.fromkeys(asked[1:], "")


def of_the_run(*paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, "run.storage")


def test_a_look_at_an_object_store_says_why_it_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package may be missing on a node, or the credentials."""
    run = Storage("memory://seen/run")
    run.write("config.yaml", "")
    asked = ["memory://seen/run/config.yaml", "memory://seen/run/not", "nothing://a/config.yaml"]
    here, *rest = asked
    found = sight_module.missing(of_the_run(*asked))
    assert list(found) == rest
    assert found[rest[0]] == "" and "nothing://a: cannot be opened" in found[rest[1]]

    def refuse(self: Storage, name: str = "") -> bool:
        raise PermissionError("403 forbidden")

    monkeypatch.setattr(Storage, "exists", refuse)
    assert sight_module.missing(of_the_run(here)) == {here: "403 forbidden"}
    answers = [OSError("503"), True]

    def flaky(self: Storage, name: str = "") -> bool:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(Storage, "exists", flaky)
    assert sight_module.missing(of_the_run(here)) == {}, "it was asked again"


def test_where_all_see_nobody_looks(looks: Looks) -> None:
    sight = Sight()
    sight.settle()
    assert (looks.begun, sight.unseen(), sight.where()) == ([], frozenset(), {})


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        ({}, (True, None)),
        (
            {"/shards/manifest.json": ""},
            (False, "node 10.0.0.7 does not see /shards/manifest.json (data.prepared)"),
        ),
        (
            {"/runs/a/config.yaml": "403 forbidden"},
            (False, "node 10.0.0.7 does not see /runs/a/config.yaml (run.storage): 403 forbidden"),
        ),
        (
            RayTaskError(
                "missing", "Traceback\nModuleNotFoundError: No module named 'tst_ray'", None
            ),
            (
                False,
                "node 10.0.0.7 cannot import this package "
                "(ModuleNotFoundError: No module named 'tst_ray')",
            ),
        ),
        (NodeDiedError("lost"), (False, None)),
    ],
    ids=["sees", "does not", "may not", "has not the package", "is lost"],
)
def test_what_is_wrong_is_told_with_the_node(
    monkeypatch: pytest.MonkeyPatch, outcome: Any, told: tuple[bool, str | None]
) -> None:
    def get(task: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("ray.get", get)
    monkeypatch.setattr(sight_module, "address_of", lambda node: "10.0.0.7")
    assert sight_module._answer(None, "a", NEEDED) == told


# -- what a run needs on every node ---------------------------------------------------------------


def needed(place: Path, *overrides: str, storage: str = "runs", **plan: str) -> dict[str, str]:
    """The files that all nodes must see, relative to a folder where they are below it."""
    url = storage if "://" in storage else f"{place}/{storage}"
    config = load_config(None, ["--run.name=a", f"--run.storage={url}", *overrides])
    run = run_storage(config)
    if plan:
        run.make()
        run.write_json("plan.json", plan)
    found = needed_everywhere(run, config)
    there = (path for path in found if "://" not in path and not path.endswith("config.yaml"))
    assert all(Path(path).exists() for path in there)
    return {path.removeprefix(f"{place}/"): setting for path, setting in found.items()}


RUN = {"runs/a/config.yaml": "run.storage"}


def test_shards_below_the_storage_are_seen_with_it(tmp_path: Path) -> None:
    assert needed(tmp_path) == RUN
    assert needed(tmp_path, f"--data.cache={tmp_path}/runs/deep/cache") == RUN


def test_shards_elsewhere_must_be_seen_too(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").touch()
    prepared = f"--data.prepared={tmp_path}/prepared"
    shards = {"prepared/manifest.json": "data.prepared"}
    assert needed(tmp_path, prepared) == RUN | shards
    far = {"memory://bucket/runs/a/config.yaml": "run.storage"}  # its package may be missing
    assert needed(tmp_path, prepared, storage="memory://bucket/runs") == far | shards
    for nowhere in ("memory://bucket/none", "nothing://bucket/prepared"):
        assert needed(tmp_path, f"--data.prepared={nowhere}") == RUN, "that is told elsewhere"
    assert needed(tmp_path, f"--data.prepared={tmp_path}/nowhere") == RUN, "that is told elsewhere"


def test_a_folder_for_shards_to_come_has_a_file_to_be_seen(tmp_path: Path) -> None:
    seen = {"cache/.seen": "data.cache"}
    assert needed(tmp_path, f"--data.cache={tmp_path}/cache") == RUN | seen
    (tmp_path / "file").touch()
    assert needed(tmp_path, f"--data.cache={tmp_path}/file/cache") == RUN, "that is told elsewhere"
    # What only looks as if it were below the storage, too.
    (tmp_path / "runs").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs" / "shards").symlink_to(tmp_path / "disk")
    assert needed(tmp_path) == RUN | {"runs/shards/.seen": "data.cache"}


def test_a_run_that_has_begun_needs_the_shards_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "manifest.json").touch()
    began_with = {"before/manifest.json": "data.cache"}
    assert needed(tmp_path, shards=f"{tmp_path}/before") == RUN | began_with
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "manifest.json").touch()
    copied = f"--data.prepared={tmp_path}/copied"
    now = {"copied/manifest.json": "data.prepared"}
    assert needed(tmp_path, copied, shards=f"{tmp_path}/before") == RUN | now


def test_a_run_whose_cache_has_moved_needs_the_shards_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("before", "now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    monkeypatch.setattr("tst_ray.sight.shards_folder", lambda config: f"{tmp_path}/now")
    moved = {"now/manifest.json": "data.cache"}
    assert needed(tmp_path, shards=f"{tmp_path}/before") == RUN | moved
    is_there, answers = sight_module._is_there, [OSError("network is unreachable")]

    def hiccups(path: str) -> bool:
        if answers:
            raise answers.pop()
        return is_there(path)

    monkeypatch.setattr(sight_module, "_is_there", hiccups)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert needed(tmp_path, shards=f"{tmp_path}/before") == RUN | moved
    monkeypatch.setattr(sight_module, "_PATIENCE_S", 0.0)
    answers += [OSError("network is unreachable")]
    before = {"before/manifest.json": "data.cache"}
    assert needed(tmp_path, shards=f"{tmp_path}/before") == RUN | before, "no reason to end"


def test_a_models_folder_must_be_seen_but_not_what_is_fetched(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    assert needed(tmp_path, f"--model={tmp_path}/model") == RUN | {"model": "model.source"}
    assert needed(tmp_path, "--model=paper-270m") == RUN
    begun = {"shards": f"{tmp_path}/runs/shards", "model": "all its fields"}
    assert needed(tmp_path, f"--model={tmp_path}/model", **begun) == RUN, "it is read no more"
    weights = [
        *(f"--{name}={tmp_path}/model" for name in ("model.source", "data.tokenizer")),
        "--model.pretrained=true",
    ]
    assert "model" in needed(tmp_path, *weights, **begun)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What s3://bucket/ holds; only pyarrow opens it."""
    (tmp_path / "bucket").mkdir()
    store = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())

    class Opens:
        @staticmethod
        def from_uri(uri: str) -> tuple[FileSystem, str]:
            if not uri.startswith("s3://bucket/"):
                raise ArrowInvalid(f"unknown scheme: {uri}")
            return store, uri.removeprefix("s3://bucket/")

    monkeypatch.setattr("pipelines.storage.pafs.FileSystem", Opens)
    return tmp_path / "bucket"


def test_shards_on_an_object_store_must_be_seen_as_readers_see_them(
    tmp_path: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pyarrow: fsspec's package need not be there. The run's own storage does need it."""
    prepared = "--data.prepared=s3://bucket/prepared"
    assert needed(tmp_path, prepared) == RUN, "that is told elsewhere"
    (bucket / "prepared").mkdir()
    (bucket / "prepared" / "manifest.json").touch()
    manifest = "s3://bucket/prepared/manifest.json"
    shards = {manifest: "data.prepared"}
    assert needed(tmp_path, prepared) == RUN | shards
    assert sight_module.missing(shards) == {}
    (told,) = sight_module.missing(of_the_run(manifest)).values()
    assert "s3://bucket/prepared: cannot be opened" in told
    (bucket / "prepared" / "manifest.json").unlink()
    assert sight_module.missing(shards) == {manifest: ""}
    cache = {"s3://bucket/cache/.seen": "data.cache"}
    assert needed(tmp_path, "--data.cache=s3://bucket/cache") == RUN | cache
    assert (bucket / "cache" / ".seen").exists()
    assert needed(tmp_path, shards="s3://bucket/cache") == RUN, "it is gone"

    def silent(path: str) -> bool:
        raise OSError("503")

    monkeypatch.setattr(sight_module, "_is_there", silent)
    assert needed(tmp_path, prepared) == RUN | shards, "the nodes look again"
    monkeypatch.setattr(sight_module, "_PATIENCE_S", 0.0)
    assert sight_module.missing(shards) == {manifest: "503"}


def test_shards_below_remote_storage_are_seen_with_it() -> None:
    below = sight_module._is_below
    assert below("memory://bucket/runs/shards", Storage("memory://bucket/runs"))
    assert not below("memory://bucket/runs2/shards", Storage("memory://bucket/runs"))
    assert not below("/runs/shards", Storage("memory://bucket/runs"))
    assert not below("memory://bucket/runs/shards", Storage("/runs"))
    assert below("file:///tmp/runs/shards", Storage("/tmp/runs"))
