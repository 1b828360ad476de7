"""The Ray cluster a run uses: joined where there is one, else started on this machine.

Ray Train reserves CPUs for its workers, Ray Data needs some to read. A cluster without room for
both would hang without a word, so `check_capacity` refuses it with the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from tst_ray import forkclient, forkserver
from tst_ray.config import Config
from tst_ray.elastic import Node, workers_that_fit
from tst_ray.errors import ConfigError, RunError
from tst_ray.plan import Plan
from tst_ray.timeouts import GROUP_END_S, GROUP_POLL_S, GROUP_START_S, WORKER_ANSWER_S

_LOCAL_OBJECT_STORE_BYTES = 1 << 30
_CONNECT_TIMEOUT_S = 10.0
ASK_AGAIN_S = 10.0
"""Between two requests to an autoscaler, which knows the last one only: another run's end takes it
back, and every 20 s the coordinator of Ray Train and Ray Data puts in its place what these use."""

_RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": GROUP_POLL_S,
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": GROUP_START_S,
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": WORKER_ANSWER_S,
    # The driver looks for notices of preemption itself (stage.py); this saves a process a group.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": 0,
    # Where one rank fails, the others are in a collective that never ends: waiting gains nothing.
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": GROUP_END_S,
    # Workers stay in the job's folder (`ray job submit --working-dir`), or where this Ray was
    # started: a relative model.source means the same there as here.
    "RAY_CHDIR_TO_TRIAL_DIR": 0,
    # Ray Train's own choice, made here so that all processes of a run have one environment.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": 0,
}


@dataclass(frozen=True)
class Session:
    """A connected Ray.

    Attributes:
        address: HOST:PORT of its head.
        log_folder: where Ray writes its own logs, on the head node.
    """

    is_local: bool
    address: str
    log_folder: str


def workers_needed(plan: Plan) -> int:
    """The workers without which some phase cannot run."""
    return max(phase.min_workers for phase in plan.phases)


def least_workers(plan: Plan) -> int:
    """The fewest workers that some phase may run with."""
    return min(phase.min_workers for phase in plan.phases)


def workers_needed_next(plan: Plan, step: int) -> int:
    """The workers without which a run cannot go on from a step; 0 where it is trained."""
    return next((p.min_workers for p in plan.phases if p.last_step > step), 0)


def cpus_needed(config: Config, num_workers: int) -> float:
    """CPUs that `num_workers` train workers and Ray Data take together."""
    return num_workers * config.cluster.cpus_per_worker + config.cluster.data_cpus


def check_local(config: Config, plan: Plan) -> None:
    """Refuse, before Ray starts, more workers than this machine has CPUs for.

    Ray Data's reader shares a core with the workers here: it needs little of it.

    Raises:
        ConfigError: with both numbers.
    """
    workers, cores = workers_needed(plan), max(_cores(), 2)
    if workers * config.cluster.cpus_per_worker > cores:
        raise ConfigError(
            f"cluster.workers = {workers}: needs {workers * config.cluster.cpus_per_worker:g} CPUs "
            f"for the workers, and this machine has {cores}; lower it, lower "
            "cluster.cpus_per_worker, or join a cluster (RAY_ADDRESS)"
        )


def _cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use; a container's are fewer than its machine's.

    Args:
        cpu_max: a control group's quota: microseconds of a period, and the period.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
        quota, period = map(int, cpu_max.read_text().split())
        cores = min(cores, max(quota // period, 1))
    return cores


@contextlib.contextmanager
def ray_session(config: Config, plan: Plan | None) -> Iterator[Session]:
    """Join the cluster at RAY_ADDRESS (a Ray job has it set), or start Ray here and stop it after.

    Args:
        plan: what is to be trained; None where nothing is.

    Raises:
        ConfigError: a Ray here could never have room for the plan.
        RunError: there is no cluster at the address.
    """
    is_local = "RAY_ADDRESS" not in os.environ
    if is_local and plan is not None:
        check_local(config, plan)
    # Usage statistics would leave the user's machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in _RAY_TRAIN_SETTINGS.items():
        os.environ.setdefault(name, str(value))
    with contextlib.ExitStack() as stack:
        kind = str(config.model.config.get("model_type", ""))
        if is_local:
            if _forks(config):
                stack.enter_context(forkserver.server_ahead(kind))
            yield stack.enter_context(_started(config, plan))
            return
        options: dict[str, Any] = {}
        if _forks(config):
            variables = {name: os.environ[name] for name in _RAY_TRAIN_SETTINGS}
            submitted = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
            options["runtime_env"] = forkserver.job_environment(submitted, variables, kind)
        yield stack.enter_context(_joined(os.environ["RAY_ADDRESS"], options))


def _forks(config: Config) -> bool:
    return config.cluster.fork_server and sys.platform == "linux"


def local_cpus(config: Config, plan: Plan | None) -> int:
    """The CPUs of a Ray on this machine: its cores, and some more where readers share them.

    Workers each have cores of their own: a range of workers goes as far as the cores do.
    """
    cores = _cores()
    if plan is None:
        return cores
    most = max(phase.max_workers for phase in plan.phases)
    hold = int(max(cores, 2) / config.cluster.cpus_per_worker + 1e-9)
    workers = max(min(most, hold), workers_needed(plan))
    return max(cores, math.ceil(cpus_needed(config, workers)))


def _local_options(config: Config, plan: Plan | None) -> dict[str, Any]:
    """What `ray.init` is told to start a Ray on this machine."""
    return {
        "address": "local",  # a cluster that runs here by chance is somebody else's
        "num_cpus": local_cpus(config, plan),
        "include_dashboard": False,
        "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
        # A process that Ray starts unasked is for no job, and would have a server of its own.
        "_system_config": {"prestart_worker_first_driver": not _forks(config)},
    }


@contextlib.contextmanager
def _started(config: Config, plan: Plan | None) -> Iterator[Session]:
    """A Ray on this machine, with what a run needs of it.

    Ray's own parameters say more than ray.init has options for: no autoscaler, which would have
    nothing to do, and the fork server's client as what runs before each worker.
    """
    import inspect
    from unittest import mock

    import ray
    from ray._private import parameter

    wanted: dict[str, Any] = {"no_monitor": True}
    if _forks(config):
        wanted["setup_worker_path"] = os.path.abspath(forkclient.__file__)
    known = inspect.signature(parameter.RayParams).parameters  # another Ray's may be fewer
    own = {name: value for name, value in wanted.items() if name in known}
    parameters = functools.partial(parameter.RayParams, **own)
    with mock.patch.object(parameter, "RayParams", parameters):
        context = ray.init(**_local_options(config, plan))
    with _until_shutdown(context, is_local=True) as session:
        yield session


@contextlib.contextmanager
def _joined(address: str, options: dict[str, Any]) -> Iterator[Session]:
    """The cluster at an address. Raises RunError where there is none."""
    _check_address(address)
    import ray

    try:
        context = ray.init(**options)
    except (ConnectionError, ValueError) as error:  # the second: what is no address at all
        raise _no_cluster(address) from error
    with _until_shutdown(context, is_local=False) as session:
        yield session


@contextlib.contextmanager
def _until_shutdown(context: Any, is_local: bool) -> Iterator[Session]:
    """The session of a connected Ray, which ends with the block."""
    import ray

    try:
        info = context.address_info
        yield Session(is_local, info["gcs_address"], os.path.join(info["session_dir"], "logs"))
    finally:
        with contextlib.suppress(OSError):  # it prints, and the disk of the log may be full
            ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try for minutes."""
    if "://" in address:
        raise RunError(
            f"RAY_ADDRESS = {address}: give HOST:PORT, as `ray start --head` prints it; http:// is "
            "for `ray job submit`, and a driver at the end of a ray:// would be none of the cluster"
        )
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # `auto`
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address) from error


def _no_cluster(address: str) -> RunError:
    return RunError(
        f"RAY_ADDRESS = {address}: no Ray cluster answers there; start one, or unset it to run on "
        "this machine"
    )


def check_capacity(config: Config, plan: Plan, step: int, say: Callable[[str], None]) -> None:
    """Wait, `cluster.wait_s` at most, until the cluster has room for the smallest allowed group.

    A cluster that grows (`cluster.wait_s` is not 0) needs room for the phase that comes next; a
    later one waits for its nodes when its turn comes. An autoscaler starts no node that nobody
    asks for, so it is asked. One that does not grow must have room for every phase.

    Args:
        step: how many steps are done.

    Raises:
        RunError: it has not; with what is needed and what there is.
    """
    grows = config.cluster.wait_s > 0
    workers = workers_needed_next(plan, step) if grows else workers_needed(plan)
    if not workers:
        return  # what is left to do is a task, which an autoscaler hears of by itself
    deadline = time.monotonic() + config.cluster.wait_s
    asked_at: float | None = None
    while (problem := _shortage(config, workers)) is not None:
        if time.monotonic() >= deadline:
            raise RunError(problem)
        if asked_at is None:
            say(f"waiting for the cluster to grow: {problem}")
        if asked_at is None or time.monotonic() - asked_at > ASK_AGAIN_S:
            asked_at = time.monotonic()
            ask_autoscaler(config, workers)
        time.sleep(1.0)


def unused_gpus(config: Config) -> int:
    """How many GPUs the cluster has where the workers are to train without."""
    if config.cluster.gpus_per_worker:
        return 0
    return int(sum(node.resources.get("GPU", 0.0) for node in living_nodes()))


def _shortage(config: Config, workers: int) -> str | None:
    """What the cluster lacks for so many workers; None where it lacks nothing."""
    per_worker, nodes = worker_resources(config), living_nodes()
    for name, amount in per_worker.items():
        total = sum(node.resources.get(name, 0.0) for node in nodes)
        data_cpus = config.cluster.data_cpus if name == "CPU" else 0
        places = sum(node.places({name: amount}) for node in nodes)
        if total + 1e-9 < workers * amount + data_cpus or places < workers:
            extra = f" and {data_cpus} for Ray Data" if data_cpus else ""
            return (
                f"cluster.workers = {workers}: needs {workers} x {amount:g} {name} for the workers"
                f"{extra}, {workers * amount + data_cpus:g} in all; the cluster has {total:g} "
                f"{name} on {len(nodes)} node(s); add nodes, lower cluster.workers, or let it grow "
                "with cluster.wait_s"
            )
    places = sum(node.places(per_worker) for node in nodes)
    if places < workers:
        return (
            f"cluster.workers = {workers}: the {len(nodes)} node(s) have room for {places} with "
            f"{per_worker} each on one node; add nodes or lower cluster.workers"
        )
    return None


def living_nodes(without: Collection[str] = ()) -> list[Node]:
    """The nodes that take new work: alive, not about to be reclaimed, and not left out."""
    import ray

    leaving = draining_nodes().union(without)
    return [
        Node(node["NodeID"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def address_of(node_id: str) -> str | None:
    """A node's address, for people; None where the cluster knows no such node."""
    import ray

    found = (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    return next(found, None)


def nodes_for_workers(config: Config, without: Collection[str] = ()) -> list[Node]:
    """The nodes that could have a worker: no head without CPUs, nor one without GPUs for those."""
    per_worker = worker_resources(config)
    return [node for node in living_nodes(without) if node.places(per_worker)]


def object_stores(config: Config, workers: int) -> list[float]:
    """The bytes of the object stores that workers have at the least, the smallest first.

    Args:
        workers: how many; they are on as few nodes as hold them, and on the smallest stores.

    Returns:
        one for each of those nodes; of two nodes where there are two.
    """
    nodes, per_worker = nodes_for_workers(config), worker_resources(config)
    held = accumulate(sorted((node.places(per_worker) for node in nodes), reverse=True))
    fewest = sum(places < workers for places in held) + 1
    stores = sorted(node.resources.get("object_store_memory", 0.0) for node in nodes)
    return stores[: max(fewest, 2)]


def own_node() -> str:
    """The id of the node that this process is on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def draining_nodes() -> set[str]:
    """Nodes with a notice that they will be taken away (a spot reclaim, an idle autoscaler's).

    Ray Train passes the same notice on to workers, but through a barrier of all ranks
    (`get_preemption_info`), which a loop would pay for at every look; the driver can look for free.
    """
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def room_for(config: Config, most: int, without: Collection[str]) -> int:
    """How many of `most` workers the cluster holds now, beside Ray Data; 0 where none fits.

    Args:
        without: nodes to leave out.
    """
    return workers_that_fit(
        living_nodes(without), worker_resources(config), config.cluster.data_cpus, most
    )


def free_room(config: Config, most: int, without: Collection[str]) -> int:
    """As `room_for`, of what nobody uses at this moment."""
    import ray

    free = ray._private.state.available_resources_per_node()
    nodes = [Node(node.node_id, free.get(node.node_id, {})) for node in living_nodes(without)]
    return workers_that_fit(nodes, worker_resources(config), config.cluster.data_cpus, most)


def ask_autoscaler(config: Config, num_workers: int, without: Collection[str] = ()) -> None:
    """Ask an autoscaler, if there is one, for room for so many workers and for reading; 0 lets go.

    Args:
        without: nodes that are no room: others are started in their place, where the autoscaler
            knows label selectors (Ray's second version).

    See https://docs.ray.io/en/latest/cluster/running-applications/autoscaling/reference.html.
    """
    from ray.autoscaler.sdk import request_resources

    bundles = [worker_resources(config)] * num_workers
    if num_workers:
        bundles += [{"CPU": 1.0}] * config.cluster.data_cpus
    selectors = [away_from(without)] * len(bundles)
    request_resources(bundles=bundles, bundle_label_selectors=selectors)


def away_from(nodes: Collection[str]) -> dict[str, str]:
    """The label selector that keeps off some nodes, by Ray's ids.

    See https://docs.ray.io/en/latest/ray-core/scheduling/labels.html.
    """
    return {"ray.io/node-id": f"!in({','.join(sorted(nodes))})"} if nodes else {}


def only_on(nodes: Collection[str]) -> dict[str, str]:
    """The label selector that keeps to some nodes, by Ray's ids."""
    return {"ray.io/node-id": f"in({','.join(sorted(nodes))})"}


def worker_resources(config: Config) -> dict[str, float]:
    """What Ray Train reserves for each worker."""
    resources = {"CPU": config.cluster.cpus_per_worker, **config.cluster.resources_per_worker}
    if config.cluster.gpus_per_worker:
        resources["GPU"] = config.cluster.gpus_per_worker
    return resources
