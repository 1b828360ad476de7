"""Whether the machines of a run have the memory for its model, before anything starts on them."""

from __future__ import annotations

import os

from tst_ray.errors import ConfigError
from tst_ray.estimates import Host, ModelShape, memory_problem
from tst_ray.machine import memory_limit
from tst_ray.nodes import hosts_of_workers, workers_needed
from tst_ray.plan import Plan
from tst_ray.settings import Config


def check_memory(config: Config, plan: Plan, shape: ModelShape, step: int) -> None:
    """Refuse a model that the machines have no memory for: the kernel would kill it unsaid.

    What a cluster that grows will have, nobody knows. GPUs' memory is the workers' to look at.

    Args:
        step: how many steps are done.

    Raises:
        ConfigError: with both numbers.
    """
    hosts = [Host(memory_limit(), workers_needed(plan))]
    if config.cluster.backend == "ray" and os.environ.get("RAY_ADDRESS"):
        hosts = hosts_of_workers(config)
    if config.cluster.wait_s or not hosts:
        return
    on_gpus = config.cluster.gpus_per_worker > 0
    for phase in plan.phases:
        problem = memory_problem(shape, plan, phase, config.train, hosts, on_gpus=on_gpus)
        if problem and phase.last_step > step:
            raise ConfigError(problem)
