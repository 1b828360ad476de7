"""Checkpoints in the memory of a cluster of three nodes on this machine: what outlives what."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.test_checkpoint import Events, make_state, restored, save_steps
from tst_ray import memory
from tst_ray.checkpoint import DAMAGED, MARKER, META, committed, find_good, folder_name
from tst_ray.errors import RunError
from tst_ray.memory import Vaults
from tst_ray.sharded import read_full
from tst_ray.storage import Storage

PATIENCE_S = 120.0
HANDS: dict[str, Any] = {}  # by node id
NUM_NODES = 3
LARGE = np.random.default_rng(0).bytes(3 << 20)
# A killed node is noticed in 2 s rather than 15; one that is only slow still has 10 s to answer.
NOTICE = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": NOTICE}
        )
        try:
            ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
            yield started
        finally:
            HANDS.clear()
            ray.shutdown()
            started.shutdown()


@pytest.fixture
def nodes(cluster: Cluster) -> list[str]:
    """The ids of three living nodes, in the order of their ring; this process is on the first."""
    wait_until(lambda: len(living()) == len(cluster.list_all_nodes()), "Ray to see who is there")
    while len(cluster.list_all_nodes()) < NUM_NODES:
        cluster.add_node(num_cpus=1)
    wait_until(lambda: len(living()) == NUM_NODES, "all nodes")
    own = ray.get_runtime_context().get_node_id()
    return sorted(living(), key=lambda node_id: (node_id < own, node_id))


@pytest.fixture
def vaults(nodes: list[str]) -> Iterator[Vaults]:
    made = Vaults(f"test-{uuid.uuid4().hex[:8]}")
    made.cover(nodes)
    yield made
    made.close()


@pytest.fixture
def root(vaults: Vaults) -> Storage:
    return Storage(vaults.url) / "checkpoints"


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        time.sleep(0.05)


def living() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


class Hand:
    """A process on a node of the cluster, to do things there.

    It is made from this module, and importing that makes the addresses of memory known.
    """

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def new_hand(node_id: str) -> Any:
    place = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Hand).options(num_cpus=0, scheduling_strategy=place).remote()


def on(node_id: str, function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in another process, on that node."""
    if node_id not in HANDS:
        HANDS[node_id] = new_hand(node_id)
    return ray.get(HANDS[node_id].call.remote(function, *args), timeout=PATIENCE_S)


def write(root: Storage, name: str, content: bytes) -> None:
    root.write(name, content)


def read(root: Storage, name: str) -> bytes:
    return root.read(name)


def names(root: Storage) -> list[str]:
    return root.names()


def doors(root: Storage) -> list[Any]:
    own, others = memory._doors(memory._key(root.path))
    return [*own, *others]


def ask(door: Any, method: str, *args: Any) -> Any:
    return door.answer(door.ask(method, *args), PATIENCE_S)


def holders(root: Storage, name: str) -> list[str]:
    """The nodes that have a copy of a file, in the order of the ring from here."""
    return [door.node_id for door in doors(root) if ask(door, "get", root.at(name))]


def process_of(door: Any) -> int:
    return ray.get(
        memory._handle(door.name).__ray_call__.remote(lambda vault: os.getpid()), timeout=PATIENCE_S
    )


def node_of(cluster: Cluster, node_id: str) -> Any:
    return next(node for node in cluster.list_all_nodes() if node.node_id == node_id)


# ---- without a cluster -------------------------------------------------------------------------


def test_importing_it_does_not_import_ray() -> None:
    code = "import sys, tst_ray.memory; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda root: root.exists("a"),
        lambda root: root.names(),
        lambda root: root.read("a"),
        lambda root: root.write("a", b""),
        lambda root: Vaults("run-1").cover(()),
    ],
)
def test_without_ray_it_says_so_in_a_line(
    use: Callable[[Storage], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RunError, match=r"^tst-memory://run-1: .* Ray is not on$"):
        use(Storage(Vaults("run-1").url))


@pytest.mark.parametrize("key", ["", "a/b", "a b"])
def test_a_key_that_is_no_part_of_a_path_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        Vaults(key)


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"one\ntwo\n", LARGE], ids=["empty", "small", "large"])
def test_what_is_written_is_read(root: Storage, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "local").write_bytes(content)
    half = len(content) // 2
    root.make()
    root.write("written", content)
    root.upload(str(tmp_path / "local"), "step/uploaded")
    for name in ("written", "step/uploaded"):
        assert root.exists(name)
        assert root.size(name) == len(content)
        assert root.read(name) == content
        with root._fs.open(root.at(name), "rb") as file:
            assert file.seek(half) == half
            assert file.read(3) == content[half : half + 3]
            assert file.seek(-half, os.SEEK_END) == len(content) - half
            assert file.read() == content[len(content) - half :]
    assert root.names() == ["step", "written"]
    assert (root / "step").names() == ["uploaded"]
    assert root._fs.ls(root.path, detail=True) == [
        {"name": root.at("step"), "size": 0, "type": "directory"},
        {"name": root.at("written"), "size": len(content), "type": "file"},
    ]
    assert root._fs.cat_file(root.at("written"), start=2, end=-1) == content[2:-1]
    root.append("lines", "one\n")
    root.append("lines", "two\n")
    assert root.read("lines") == b"one\ntwo\n"


@pytest.mark.slow
def test_what_is_not_there_is_not_found(root: Storage) -> None:
    root.write("a/file", b"x")
    for name in ("b", "a/fil", "a/file/x", "file"):
        assert not root.exists(name)
        for use in (root.read, root.size, root.sha256):
            with pytest.raises(FileNotFoundError, match=root.at(name)):
                use(name)
    assert (root / "b").names() == []
    root.remove("b")
    with pytest.raises(FileNotFoundError):
        root._fs.rm(root.at("a"))  # a folder, and not recursive
    assert root.exists("a/file")


@pytest.mark.slow
def test_a_file_being_written_is_there_once_closed_and_never_in_part(root: Storage) -> None:
    file = root._fs.open(root.at("whole"), "wb")
    file.write(b"ab")
    file.write(b"cd")
    assert not root.exists("whole")
    file.close()
    assert root.read("whole") == b"abcd"
    with pytest.raises(KeyError), root._fs.open(root.at("part"), "wb") as file:
        file.write(b"ab")
        raise KeyError
    assert not root.exists("part")
    with pytest.raises(ValueError, match="'ab'"):
        root._fs.open(root.at("whole"), "ab")
    with pytest.raises(FileExistsError):
        root._fs.pipe_file(root.at("whole"), b"x", mode="create")


@pytest.mark.slow
def test_a_file_is_on_the_node_of_its_writer_and_on_the_next(
    root: Storage, nodes: list[str]
) -> None:
    for number, node_id in enumerate(nodes):
        on(node_id, write, root, f"from-{number}", LARGE)
        two = {node_id, nodes[(number + 1) % NUM_NODES]}
        assert set(holders(root, f"from-{number}")) == two
    for node_id in nodes:  # whichever node one asks, everything is there
        assert on(node_id, names, root) == ["from-0", "from-1", "from-2"]
        assert all(on(node_id, read, root, f"from-{n}") == LARGE for n in range(NUM_NODES))


@pytest.mark.slow
def test_a_rewrite_from_another_node_leaves_no_older_copy(root: Storage, nodes: list[str]) -> None:
    root.write("file", b"old")
    on(nodes[1], write, root, "file", b"new")
    assert holders(root, "file") == [nodes[1], nodes[2]]
    assert [on(node_id, read, root, "file") for node_id in nodes] == [b"new"] * NUM_NODES


@pytest.mark.slow
def test_the_head_node_is_asked_for_each_vault_once(
    root: Storage, nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of hundreds of workers, each writes some files and reads many names, every minute."""
    asked: list[str] = []
    get_actor = ray.get_actor

    def counted(name: str, namespace: str) -> Any:
        asked.append(name)
        return get_actor(name, namespace=namespace)

    monkeypatch.setattr(ray, "get_actor", counted)
    for number in range(5):
        root.write(f"file-{number}", b"x")
        assert root.read(f"file-{number}") == b"x"
        assert len(root.names()) == number + 1
    assert len(asked) == len(set(asked)) == len(nodes)


def test_what_is_removed_is_in_no_vault(root: Storage, nodes: list[str]) -> None:
    for number, node_id in enumerate(nodes):
        on(node_id, write, root, f"step/{number}", b"x")
    root.write("stepped", b"x")  # its name begins like the folder's
    (root / "step").remove()
    assert not any(ask(door, "under", root.at("step")) for door in doors(root))
    assert root.names() == ["stepped"]
    root.remove("stepped")
    assert not root.exists()


# ---- what dies ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_outlive_the_process_that_wrote_them(root: Storage, nodes: list[str]) -> None:
    hand = new_hand(nodes[1])
    ray.get(hand.call.remote(write, root, "file", LARGE), timeout=PATIENCE_S)
    process = ray.get(hand.call.remote(os.getpid), timeout=PATIENCE_S)
    ray.kill(hand)
    wait_until(lambda: not Path(f"/proc/{process}").exists(), "the writer to end")
    assert [on(node_id, read, root, "file") for node_id in nodes] == [LARGE] * NUM_NODES


@pytest.mark.slow
def test_a_lost_node_loses_nothing(
    cluster: Cluster, vaults: Vaults, root: Storage, nodes: list[str]
) -> None:
    for number, node_id in enumerate(nodes):
        on(node_id, write, root, f"from-{number}", LARGE)
    cluster.remove_node(node_of(cluster, nodes[1]), allow_graceful=False)
    assert root.names() == ["from-0", "from-1", "from-2"]
    for node_id in (nodes[0], nodes[2]):
        assert all(on(node_id, read, root, f"from-{n}") == LARGE for n in range(NUM_NODES))
    root.write("from-0", b"new")  # its second copy goes to the node after the lost one
    assert holders(root, "from-0") == [nodes[0], nodes[2]]
    wait_until(lambda: nodes[1] not in living(), "Ray to see that a node is lost")
    vaults.cover(living())
    joined = cluster.add_node(num_cpus=1).node_id
    wait_until(lambda: joined in living(), "a node to join")
    vaults.cover(living())
    assert {door.node_id for door in doors(root)} == {nodes[0], nodes[2], joined}
    assert set(vaults._handles) == set(memory._names(vaults.key).values())
    on(joined, write, root, "from-0", b"newer")
    assert len(holders(root, "from-0")) == 2
    assert [on(n, read, root, "from-0") for n in (nodes[0], nodes[2], joined)] == [b"newer"] * 3
    assert root.names() == ["from-0", "from-1", "from-2"]


@pytest.mark.slow
def test_cover_starts_only_what_is_missing_and_that_not_at_once(
    vaults: Vaults, root: Storage, nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = memory._names(vaults.key)
    assert set(before) == set(nodes)
    vaults.cover(living())
    assert memory._names(vaults.key) == before
    root.write("file", LARGE)
    assert ask(doors(root)[2], "under", "") == {}  # all have started
    os.kill(process_of(doors(root)[0]), signal.SIGKILL)
    wait_until(lambda: nodes[0] not in memory._names(vaults.key), "Ray to see it")
    vaults.cover(living())
    assert set(memory._names(vaults.key)) == set(nodes[1:])
    assert root.read("file") == LARGE
    with pytest.raises(OSError, match="this node has no vault"):
        root.write("other", b"x")
    monkeypatch.setattr(memory, "_SETTLE_S", 0.0)
    vaults.cover(living())
    assert set(memory._names(vaults.key)) == set(nodes)
    root.write("file", b"new")
    assert holders(root, "file") == nodes[:2]


@pytest.mark.slow
def test_nodes_that_are_not_wanted_any_more_have_no_vault(
    vaults: Vaults, root: Storage, nodes: list[str]
) -> None:
    """Each would keep an autoscaler from taking its node; wanted again, it comes at once."""
    for number, node_id in enumerate(nodes):
        on(node_id, write, root, f"from-{number}", LARGE)
    vaults.keep_to(nodes[:2])
    wait_until(lambda: set(memory._names(vaults.key)) == set(nodes[:2]), "the end of the third")
    vaults.cover(nodes[:2])
    assert set(memory._names(vaults.key)) == set(nodes[:2])
    assert root.names() == ["from-0", "from-1", "from-2"], "each was on two nodes"
    vaults.cover(nodes)
    assert set(memory._names(vaults.key)) == set(nodes)


@pytest.mark.slow
def test_a_vault_that_does_not_answer_is_ended_and_the_write_succeeds(
    vaults: Vaults,
    root: Storage,
    nodes: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root.write("file", b"old")
    hung = process_of(doors(root)[1])
    os.kill(hung, signal.SIGSTOP)
    monkeypatch.setattr(memory, "_TRANSFER_S", 6.0)
    try:
        with caplog.at_level(logging.WARNING):
            root.write("file", b"new")
        assert "file is in the memory of this node only" in caplog.text
        wait_until(lambda: nodes[1] not in memory._names(vaults.key), "the vault to be ended")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(hung, signal.SIGCONT)  # it would answer now, with what is old
    assert holders(root, "file") == [nodes[0]]
    assert on(nodes[1], read, root, "file") == b"new"


@pytest.mark.slow
def test_a_vault_that_cannot_says_why_and_stays(root: Storage) -> None:
    root.write("file", b"x")
    with pytest.raises(OSError, match=r"the vault of node \w+: .*nbytes"):
        ask(doors(root)[0], "put", root.at("file"), None)
    assert root.read("file") == b"x"
    assert len(doors(root)) == NUM_NODES


@pytest.mark.slow
def test_a_write_that_this_node_cannot_take_changes_nothing(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write("file", b"old")
    full = ray.exceptions.ObjectStoreFullError("no room")
    monkeypatch.setattr(ray, "put", lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="no room"):
        root.write("file", b"new")
    monkeypatch.undo()
    assert root.read("file") == b"old"


@pytest.mark.slow
def test_closed_vaults_and_their_files_are_gone(vaults: Vaults, root: Storage) -> None:
    root.write("file", b"x")
    vaults.close()
    wait_until(lambda: not memory._names(vaults.key), "the vaults to end")
    assert not root.exists("file")
    assert root.names() == []


# ---- checkpoints -------------------------------------------------------------------------------


def data_file(folder: Storage) -> str:
    return next(name for name in folder.names() if name.endswith(".distcp"))


def cut(folder: Storage) -> None:
    folder.write(data_file(folder), folder.read(data_file(folder))[:-3])


def flip(folder: Storage) -> None:
    content = bytearray(folder.read(data_file(folder)))
    content[len(content) // 2] ^= 1
    folder.write(data_file(folder), bytes(content))


def lose(folder: Storage) -> None:
    folder.remove(data_file(folder))


def forge(folder: Storage) -> None:
    meta = folder.read(META)
    folder.write(META, meta.replace(b'"world_size": 1', b'"world_size": 2'))


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_restored_in_another(
    root: Storage, nodes: list[str]
) -> None:
    events = on(nodes[1], save_steps, root, 10, 20)
    assert [kind for kind, _ in events] == ["checkpoint", "checkpoint"]
    step, state = restored(root, Events())
    assert step == 20
    assert torch.equal(state["model"]["w"], make_state(20)["model"]["w"])
    assert torch.equal(state["model"]["b"], make_state(20)["model"]["b"])
    full = make_state(0)
    read_full(committed(root)[1].folder, full)
    assert torch.equal(full["model"]["w"], make_state(10)["model"]["w"])


@pytest.mark.slow
def test_a_checkpoint_outlives_the_node_that_wrote_it(
    cluster: Cluster, root: Storage, nodes: list[str]
) -> None:
    on(nodes[1], save_steps, root, 10)
    cluster.remove_node(node_of(cluster, nodes[1]), allow_graceful=False)
    events = Events()
    step, state = restored(root, events)
    assert (step, events) == (10, [])
    assert torch.equal(state["model"]["w"], make_state(10)["model"]["w"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "bytes instead of"),
        (flip, "another checksum"),
        (lose, "is missing"),
        (forge, "not the one that was committed"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    root: Storage, nodes: list[str], damage: Callable[[Storage], None], said: str
) -> None:
    on(nodes[1], save_steps, root, 10, 20)
    damage(root / folder_name(20))
    events = Events()
    step, state = restored(root, events)
    assert step == 10
    assert torch.equal(state["model"]["w"], make_state(10)["model"]["w"])
    assert events.kinds() == ["checkpoint_damaged"]
    assert said in events[0][1]["problem"]
    assert (root / folder_name(20)).exists(DAMAGED)


@pytest.mark.slow
def test_without_its_marker_a_checkpoint_does_not_exist(root: Storage, nodes: list[str]) -> None:
    save_steps(root, 10, 20)
    (root / folder_name(20)).remove(MARKER)
    assert [info.step for info in committed(root)] == [10]
    assert on(nodes[1], find_good, [root], Events()).step == 10


@pytest.mark.slow
def test_old_checkpoints_are_in_no_vault(root: Storage, nodes: list[str]) -> None:
    on(nodes[2], save_steps, root, 10)
    save_steps(root, 20, 30, keep=2)
    assert root.names() == [folder_name(20), folder_name(30)]
    assert not any(ask(door, "under", root.at(folder_name(10))) for door in doors(root))
