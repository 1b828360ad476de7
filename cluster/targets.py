"""How a cluster's train workers and nodes are found and struck: one on this machine, or a real one.

Gcs            what Ray's own tables say: nodes, jobs, actors; read only, no dashboard needed
Target         no cluster: only what concerns files, or a driver on this machine
LocalTarget    a LocalCluster: signals from here, nodes by its methods
RayTarget      any cluster: a Ray task pinned to the victim's node does it there
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster import processes
from cluster.local import LocalCluster, give_notice
from tst_ray.errors import RunError, last_line
from tst_ray.session import show_token_if_asked

_TRAIN_WORKER = "RayTrainWorker"
_HEAD = "node:__internal_head__"  # the resource by which Ray tells the head from other nodes
_CONNECT_TIMEOUT_S = 10.0
_TASK_TIMEOUT_S = 60.0


class NotNow(Exception):
    """There is nothing to strike at the moment; there may be at the next look."""


class Impossible(Exception):
    """It cannot be done to this target at all."""


@dataclass(frozen=True)
class Driver:
    """The process that drives a run, as driver.lock has it.

    Attributes:
        since: when it took the run (Unix seconds).
        pids: the namespace of its number, as /proc names it; empty where that is not known.
    """

    host: str
    pid: int
    since: float
    pids: str = ""


@dataclass(frozen=True)
class TrainWorker:
    """A process that trains, on one node."""

    node_id: str
    pid: int


class Target:
    """What can be struck where there is no cluster: files, and a driver on this machine.

    Every method may raise NotNow or Impossible.

    Attributes:
        can_add_nodes: whether `add_node` is possible at all.
    """

    can_add_nodes = False

    def workers(self, driver: Driver | None) -> list[TrainWorker]:
        """The train workers of a driver's run, the oldest first; of all runs, for None."""
        raise _no_cluster()

    def losable_nodes(self) -> list[str]:
        """The nodes that can be lost: alive, not the head, and without a notice already."""
        raise _no_cluster()

    def signal_worker(self, worker: TrainWorker, signum: int) -> None:
        """Send a signal to a train worker."""
        raise _no_cluster()

    def signal_driver(self, driver: Driver, signum: int) -> None:
        """Send a signal to a run's driver."""
        if driver.host != socket.gethostname():
            raise Impossible(f"the driver runs on another machine, {driver.host}")
        try:
            processes.signal_older_process(driver.pid, signum, driver.since, driver.pids)
        except ProcessLookupError as error:
            raise NotNow(str(error)) from error

    def kill_node(self, node_id: str) -> None:
        """Lose a node without a word."""
        raise _no_cluster()

    def drain_node(self, node_id: str, deadline_s: float) -> None:
        """Give notice of a node's loss, and lose it after so long."""
        raise _no_cluster()

    def add_node(self) -> str:
        """Let a node join; its id."""
        raise _no_cluster()

    def close(self) -> None:
        """Leave the cluster; what was announced for later would not happen any more."""


def _no_cluster() -> Impossible:
    return Impossible("needs a cluster; give its --address, or set RAY_ADDRESS")


class Gcs:
    """What a cluster's control store says, without joining the cluster as a job.

    Args:
        address: HOST:PORT of the cluster.

    Raises:
        RunError: nothing answers there.
    """

    def __init__(self, address: str) -> None:
        _check_answers(address)
        show_token_if_asked(address)
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions  # type: ignore[attr-defined,unused-ignore]

        self.address = address
        self._state = GlobalState()
        self._state._initialize_global_state(
            GcsClientOptions.create(
                address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
        )

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that Ray takes for alive, as `ray.nodes()` gives them."""
        return [node for node in self._state.node_table() if node["Alive"]]

    def losable_nodes(self) -> list[str]:
        """The ids of the nodes that are alive, not the head, and without a notice."""
        leaving = self._state.get_draining_nodes()
        return sorted(
            node["NodeID"]
            for node in self.nodes()
            if _HEAD not in node["Resources"] and node["NodeID"] not in leaving
        )

    def train_workers(self, driver: Driver | None) -> list[TrainWorker]:
        """The living train workers of a driver's run, the oldest first; of all runs, for None."""
        jobs = None if driver is None else self._jobs_of(driver)
        actors = self._state.actor_table(None, None, "ALIVE").values()
        found = [
            (actor["StartTime"], TrainWorker(actor["Address"]["NodeID"], actor["Pid"]))
            for actor in actors
            if actor["ActorClassName"] == _TRAIN_WORKER and (jobs is None or actor["JobID"] in jobs)
        ]
        return [worker for _, worker in sorted(found, key=lambda pair: (pair[0], pair[1].pid))]

    def _jobs_of(self, driver: Driver) -> set[str]:
        addresses = {
            node["NodeManagerAddress"]
            for node in self.nodes()
            if node["NodeManagerHostname"] == driver.host
        }
        return {
            job["JobID"]
            for job in self._state.job_table()
            if job["DriverPid"] == driver.pid
            and not job["IsDead"]
            and job["DriverIPAddress"] in addresses  # else one of the same number elsewhere
        }


class LocalTarget(Target):
    """A LocalCluster of this process; nodes join and die on the main thread only.

    Args:
        cluster: the cluster.
        node_cpus: CPUs of a node that joins.
        node_resources: its custom resources.
    """

    can_add_nodes = True

    def __init__(
        self,
        cluster: LocalCluster,
        node_cpus: int = 1,
        node_resources: dict[str, float] | None = None,
    ) -> None:
        self._cluster, self._gcs = cluster, Gcs(cluster.address)
        self._node_cpus, self._node_resources = node_cpus, node_resources

    def workers(self, driver: Driver | None) -> list[TrainWorker]:
        return self._gcs.train_workers(driver)

    def losable_nodes(self) -> list[str]:
        running = self._cluster.node_ids()
        return [node_id for node_id in self._gcs.losable_nodes() if node_id in running]

    def signal_worker(self, worker: TrainWorker, signum: int) -> None:
        try:
            raylet = self._cluster.raylet_pid(worker.node_id)
            processes.signal_ray_worker(worker.pid, signum, raylet)
        except (KeyError, ProcessLookupError) as error:
            raise NotNow(str(error)) from error

    def kill_node(self, node_id: str) -> None:
        try:
            self._cluster.remove_node(node_id)
        except KeyError as error:
            raise NotNow(str(error)) from error

    def drain_node(self, node_id: str, deadline_s: float) -> None:
        try:
            self._cluster.drain_node(node_id, deadline_s)
        except KeyError as error:
            raise NotNow(str(error)) from error

    def add_node(self) -> str:
        return self._cluster.add_node(self._node_cpus, self._node_resources)


class RayTarget(Target):
    """Any cluster, joined as a job of its own when there is something to do.

    A node is lost by the end of its raylet and all that it started. Where something starts the
    raylet again (a Kubernetes pod), the node comes back as another.

    Args:
        address: HOST:PORT of the cluster.

    Raises:
        RunError: nothing answers there.
    """

    def __init__(self, address: str) -> None:
        self._gcs = Gcs(address)
        self._joined = False
        self._ends: list[tuple[float, Any]] = []  # when a node ends, and the task that sees to it

    def workers(self, driver: Driver | None) -> list[TrainWorker]:
        return self._gcs.train_workers(driver)

    def losable_nodes(self) -> list[str]:
        return self._gcs.losable_nodes()

    def signal_worker(self, worker: TrainWorker, signum: int) -> None:
        self._run_on(worker.node_id, processes.signal_ray_worker, worker.pid, signum)

    def signal_driver(self, driver: Driver, signum: int) -> None:
        if driver.host == socket.gethostname():
            super().signal_driver(driver, signum)
            return
        for node in self._gcs.nodes():
            if node["NodeManagerHostname"] == driver.host:
                arguments = (driver.pid, signum, driver.since, driver.pids)
                self._run_on(node["NodeID"], processes.signal_older_process, *arguments)
                return
        raise Impossible(f"the driver runs on {driver.host}, which is no node of this cluster")

    def kill_node(self, node_id: str) -> None:
        self._end_node(node_id, time.time())

    def drain_node(self, node_id: str, deadline_s: float) -> None:
        # In this order: a node with a notice takes no new task.
        self._end_node(node_id, time.time() + deadline_s)
        give_notice(self._gcs.address, node_id, deadline_s)

    def add_node(self) -> str:
        raise Impossible("nodes of this cluster are added by its autoscaler or administrator")

    def close(self) -> None:
        if self._joined:
            import ray

            # Ray ends a job's tasks with it: those that are about to end a node come first.
            due = [task.completed() for at, task in self._ends if at <= time.time()]
            if due:
                ray.wait(due, num_returns=len(due), timeout=_TASK_TIMEOUT_S)
            ray.shutdown()
            self._joined = False
            self._ends.clear()

    def _run_on(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Run a function on a node, to its end."""
        import ray

        try:
            ray.get(self._pinned(node_id, function).remote(*arguments), timeout=_TASK_TIMEOUT_S)
        except (ProcessLookupError, ray.exceptions.RayError) as error:
            raise NotNow(last_line(error)) from error

    def _end_node(self, node_id: str, at: float) -> None:
        """Let a node end at a time; returns when the task that will do it runs there."""
        import ray

        started = self._pinned(node_id, processes.end_this_node).remote(at)
        if not ray.wait([started], timeout=_TASK_TIMEOUT_S)[0]:
            ray.cancel(started)
            raise NotNow(f"node {node_id} starts no task")
        self._ends.append((at, started))
        try:
            ray.get(next(started))
        except (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError):
            pass  # it did it before the word that it runs was here
        except ray.exceptions.RayError as error:
            raise NotNow(last_line(error)) from error

    def _pinned(self, node_id: str, function: Callable[..., Any]) -> Any:
        """A function as a task that takes no CPU and runs on one node or nowhere."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._join()
        return ray.remote(num_cpus=0, max_retries=0)(function).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        )

    def _join(self) -> None:
        if self._joined:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        # The package need not be installed on the nodes.
        ray.cloudpickle.register_pickle_by_value(processes)
        try:
            ray.init(self._gcs.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise RunError(f"{self._gcs.address}: cannot join ({last_line(error)})") from error
        self._joined = True


def _check_answers(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise RunError(
            f"{address}: no Ray cluster answers there; give HOST:PORT of its head"
        ) from error
