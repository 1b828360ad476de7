"""A Ray cluster of several nodes on this machine, whose nodes join, die and are reclaimed.

    with LocalCluster(head_cpus=1) as cluster:            a head, for the driver and Ray Data
        node, other = cluster.add_node(1), cluster.add_node(1)      a raylet of its own each
        driver = Popen([..., "-m", "tst_ray.run"], env=os.environ | cluster.environment)
        cluster.remove_node(node)                         its machine is lost, without a word
        cluster.drain_node(other, deadline_s=30)          a spot reclaim: a notice, then the loss

A lost node is a lost machine: the raylet and everything that it started get SIGKILL at once.
SIGKILL for the raylet alone would leave its workers a second in which they go on.

For tests on a machine of one's own: the cluster listens on its network address and asks for no
token, because a Ray driver replaces a loopback address by that one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.processes import end_tree, is_running

_MIB = 1 << 20
_JOIN_TIMEOUT_S, _GONE_TIMEOUT_S = 120.0, 60.0
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class LocalCluster:
    """Several raylets on this machine; a context manager that leaves no process and no file behind.

    Nodes die with the process that made them. Several clusters can run at once.

    Args:
        head_cpus: CPUs of the head node; it is never lost, so what must live belongs there.
        object_store_mib: shared memory of each node's object store.
        dashboard: whether the head serves the dashboard, and with it `ray job submit`.
        system_config: Ray's internal settings. By default Ray notices after 15 seconds that a node
            is lost, and after 60 that one is cut off; with {"health_check_period_ms": 500,
            "health_check_timeout_ms": 1000} a lost one after about 5.

    Attributes:
        head_id: the head's node id, in hex.
        folder: where Ray's files are, its logs among them, until `shutdown`.

    Raises:
        RuntimeError: not on the main thread. A raylet dies with the thread that started it.
    """

    def __init__(
        self,
        head_cpus: int,
        *,
        object_store_mib: int = 200,
        dashboard: bool = False,
        system_config: Mapping[str, Any] | None = None,
    ) -> None:
        _check_main_thread()
        self._object_store_bytes = object_store_mib * _MIB
        self._cluster: Any = None
        self._nodes: dict[str, Any] = {}  # Ray's Node objects by node id, the head first
        self._timers: list[threading.Timer] = []
        self.folder = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray puts sockets there
        try:
            with self._own_environment():
                from ray.cluster_utils import Cluster

            self._cluster = Cluster()
            self.head_id = self._start(
                num_cpus=head_cpus,
                include_dashboard=dashboard,
                dashboard_port=_free_port(),
                no_monitor=True,  # nothing here scales by itself
                _system_config=dict(system_config or {}),
            )
        except BaseException:
            self.shutdown()
            raise

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *details: object) -> None:
        self.shutdown()

    @property
    def address(self) -> str:
        """HOST:PORT, as RAY_ADDRESS takes it."""
        return str(self._cluster.address)

    @property
    def environment(self) -> dict[str, str]:
        """What a driver's process needs in its environment to join this cluster."""
        return {**_ENVIRONMENT, "RAY_ADDRESS": self.address}

    def node_ids(self) -> list[str]:
        """The nodes whose raylet runs, without the head, in the order they were added.

        Ray takes a lost node for alive a while longer; see `alive_node_ids`.
        """
        return [
            node_id
            for node_id, node in self._nodes.items()
            if node_id != self.head_id and any(_running(node))
        ]

    def alive_node_ids(self) -> list[str]:
        """The nodes that Ray takes for alive, without the head, in the order they were added."""
        table = self._cluster.global_state.node_table()
        alive = {node["NodeID"] for node in table if node["Alive"]}
        return [node_id for node_id in self._nodes if node_id in alive - {self.head_id}]

    def raylet_pid(self, node_id: str) -> int:
        """The process that is the node. Raises KeyError for one that this cluster never had."""
        return int(self._nodes[node_id].all_processes["raylet"][0].process.pid)

    def add_node(self, cpus: int, resources: Mapping[str, float] | None = None) -> str:
        """Start a node and wait until it has joined; on the main thread only.

        Args:
            cpus: its CPUs.
            resources: its custom resources, such as {"spot": 1}, by which workers can be kept off
                the head (`cluster.resources_per_worker`).

        Returns:
            the node id, in hex.
        """
        _check_main_thread()
        return self._start(num_cpus=cpus, resources=dict(resources or {}))

    def remove_node(self, node_id: str) -> None:
        """Lose a node without a word; on the main thread only.

        Raises:
            KeyError: no such node runs here, or it is the head.
        """
        _check_main_thread()
        self._check_runs(node_id)
        _lose(self._nodes[node_id])
        with self._own_environment():
            self._cluster.remove_node(self._nodes[node_id], allow_graceful=False)

    def cut_off_node(self, node_id: str) -> None:
        """Let Ray take a node for lost whose workers go on, as when only its network fails.

        Its raylet gets SIGSTOP, so it no longer answers; `remove_node` ends it all.

        Raises:
            KeyError: no such node runs here, or it is the head.
        """
        self._check_runs(node_id)
        os.kill(self.raylet_pid(node_id), signal.SIGSTOP)

    def drain_node(self, node_id: str, deadline_s: float) -> None:
        """Give notice of a node's reclaim, as a spot market does, and take it at the deadline.

        A node without work leaves at the notice already: Ray stops it then, and also when its work
        ends before the deadline. At the deadline itself Ray does nothing; the loss is ours.

        Raises:
            KeyError: no such node runs here, or it is the head.
            RuntimeError: Ray rejects the notice, with its reason.
        """
        self._check_runs(node_id)
        give_notice(self.address, node_id, deadline_s)
        timer = threading.Timer(deadline_s, _lose, [self._nodes[node_id]])
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def shutdown(self) -> None:
        """End every process of the cluster and remove its files."""
        for timer in self._timers:
            timer.cancel()
            timer.join()
        with self._own_environment():
            if self._cluster is not None:
                for node in self._cluster.list_all_nodes():
                    _lose(node)
                self._cluster.shutdown()
        self._cluster, self._nodes = None, {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, **options: Any) -> str:
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with self._own_environment():
                node = self._cluster.add_node(
                    wait=False, object_store_memory=self._object_store_bytes, **options
                )
                self._cluster._wait_for_node(node, _JOIN_TIMEOUT_S)
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray's Node sets one of its own
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def _check_runs(self, node_id: str) -> None:
        if node_id not in self.node_ids():
            raise KeyError(f"no node {node_id} runs in this cluster, besides the head")

    @contextlib.contextmanager
    def _own_environment(self) -> Iterator[None]:
        """Keep Ray to this cluster's folder: it would write and remove the machine's default."""
        ours = {**_ENVIRONMENT, "RAY_TMPDIR": self.folder}
        before = {name: os.environ.get(name) for name in [*ours, "RAY_ADDRESS"]}
        os.environ.pop("RAY_ADDRESS", None)
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def give_notice(address: str, node_id: str, deadline_s: float) -> None:
    """Tell the cluster at an address that a node will be taken, for preemption, after so long.

    Raises:
        RuntimeError: Ray rejects it, with its reason.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined,unused-ignore]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    # What `ray drain-node` calls.
    accepted, reason = GcsClient(address=address).drain_node(
        node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the machine is reclaimed",
        int((time.time() + deadline_s) * 1000),
    )
    if not accepted:
        raise RuntimeError(f"the notice for node {node_id} is not accepted: {reason}")


def _lose(node: Any) -> None:
    """SIGKILL all of a Ray Node's processes; from any thread, and again without harm."""
    ended = []
    for process in _running(node):
        ended += end_tree(process.pid)
        process.wait(_GONE_TIMEOUT_S)
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while any(map(is_running, ended)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of node {node.node_id} outlived SIGKILL: {ended}")
        time.sleep(0.01)


def _running(node: Any) -> list[Any]:
    """The processes (Popen) of a Ray Node that have not ended."""
    infos = [info for infos in node.all_processes.values() for info in infos]
    return [info.process for info in infos if info.process.poll() is None]


def _check_main_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("nodes are added and removed on the main thread only")


def _free_port() -> int:
    """A port that is free now: Ray's default may be taken by another cluster's dashboard."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
