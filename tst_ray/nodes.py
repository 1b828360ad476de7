"""The nodes of a run's cluster: what they have, what they lack, who is asked for more.

    living_nodes ──> how many workers they hold (room_for), or lack a place for (check_capacity)
    ask_autoscaler ──> more of them, where there is one

Ray Train reserves CPUs for its workers, Ray Data needs some to read. A cluster without room for
both would hang without a word, so `check_capacity` refuses it with the numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate

from tst_ray import autoscaler
from tst_ray.elastic import Node, workers_that_fit
from tst_ray.errors import RunError
from tst_ray.estimates import Host
from tst_ray.plan import Plan
from tst_ray.settings import Config

log = logging.getLogger(__name__)

ASK_AGAIN_S = 10.0
"""Between two requests to an autoscaler, since one expires (autoscaler.py)."""


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


def check_capacity(
    config: Config,
    plan: Plan,
    step: int,
    say: Callable[[str], None],
    wait_on: Callable[[], None] = lambda: None,
) -> None:
    """Wait, `cluster.wait_s` at most, until the cluster has room for the smallest allowed group.

    A cluster that grows (`cluster.wait_s` is not 0) needs room for the phase that comes next; a
    later one waits for its nodes when its turn comes. An autoscaler starts no node that nobody
    asks for, so it is asked. One that does not grow must have room for every phase.

    Args:
        step: how many steps are done.
        say: told once, where there is something to wait for.
        wait_on: called now and then while it is waited for, and at its end.

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
            wait_on()
            ask_autoscaler(config, workers)
        time.sleep(1.0)
    if asked_at is not None:
        wait_on()


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


def cpus_within(where: Mapping[str, str]) -> float:
    """The CPUs of the living nodes that a label selector of `only_on` names; of all, for none."""
    nodes = living_nodes()
    if where:
        named = where["ray.io/node-id"].removeprefix("in(").removesuffix(")").split(",")
        nodes = [node for node in nodes if node.node_id in named]
    return sum(node.resources.get("CPU", 0.0) for node in nodes)


def lost_nodes(nodes: Collection[str]) -> set[str]:
    """Those of some nodes that the cluster knows to be lost; none while it does not answer."""
    import ray

    if not nodes or not ray.is_initialized():
        return set()
    try:
        return set(nodes) - {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    except Exception:  # the head node is away: who asks has other things to do
        return set()


def address_of(node_id: str) -> str | None:
    """A node's address, for people; None where the cluster knows no such node."""
    import ray

    found = (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    return next(found, None)


def nodes_for_workers(config: Config, without: Collection[str] = ()) -> list[Node]:
    """The nodes that could have a worker: no head without CPUs, nor one without GPUs for those."""
    per_worker = worker_resources(config)
    return [node for node in living_nodes(without) if node.places(per_worker)]


def hosts_of_workers(config: Config) -> list[Host]:
    """The nodes that could have a worker, with their memory as Ray found it when they joined.

    Of it Ray sets a part aside for its object store, which is filled only as it is needed.
    """
    per_worker = worker_resources(config)
    kinds = ("memory", "object_store_memory")
    return [
        Host(
            sum(node.resources.get(kind, 0.0) for kind in kinds) or math.inf,
            node.places(per_worker),
        )
        for node in nodes_for_workers(config)
    ]


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
    return workers_that_fit(
        free_nodes(without), worker_resources(config), config.cluster.data_cpus, most
    )


def free_nodes(without: Collection[str] = ()) -> list[Node]:
    """As `living_nodes`, with what nobody uses of them at this moment."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return [Node(node.node_id, free.get(node.node_id, {})) for node in living_nodes(without)]


def ask_autoscaler(config: Config, num_workers: int, without: Collection[str] = ()) -> None:
    """Ask an autoscaler, if there is one, for room for so many workers and for reading; 0 lets go.

    It may not hear: the head node may be away for a while. So this is done again and again.

    Args:
        without: nodes that are no room: others are started in their place, where the autoscaler
            knows label selectors (Ray's second version).
    """
    name = autoscaler.requester(config)
    bundles = [worker_resources(config)] * num_workers
    bundles += [{"CPU": 1.0}] * config.cluster.data_cpus
    try:
        if num_workers:
            autoscaler.ask(name, bundles, [away_from(without)] * len(bundles))
        else:
            autoscaler.let_go(name)
    except Exception as error:
        log.warning("the autoscaler was not asked: %s", error)


def keep_nodes(config: Config) -> None:
    """Ask an autoscaler for no more than to leave the nodes that are there, for a minute.

    In place of what the run asked for before, which counts as used: Ray Data takes for its own only
    what nobody asks for. A byte on each node holds it, where the autoscaler knows label selectors.
    """
    if not autoscaler.is_coordinated():  # such a request would stay
        ask_autoscaler(config, 0)
        return
    try:
        nodes = [node.node_id for node in living_nodes()]
        bundles = [{"object_store_memory": 1.0}] * len(nodes)
        autoscaler.ask(autoscaler.requester(config), bundles, [only_on([node]) for node in nodes])
    except Exception as error:
        log.warning("the autoscaler was not asked: %s", error)


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
