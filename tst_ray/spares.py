"""Spare worker processes: started and warmed up while training goes on, taken when one is needed.

    python -m tst_ray.spares <Ray's worker script> …    import what a worker needs, then be a worker
    order_spare                                         ask this node's raylet for one more

A new worker process spends its first seconds on imports: torch, transformers, Ray Data. Ray keeps
processes that it was asked to start ahead, and gives one to the next actor that has the same
runtime environment. So every worker of a group orders one, once it trains, and a restarted group
finds its imports done (2 cores, 2026-11: an actor with torch ready after 0.2 s instead of 2.4 s).

The request is one of Ray's own between its parts (`PrestartWorkers`), not of its public interface:
where it fails, for whatever reason, a restart merely takes longer.
"""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import sys
from typing import Any

log = logging.getLogger(__name__)

_MODEL_TYPE = "TST_RAY_MODEL_TYPE"
_MODULES = ("tst_ray.worker", "tst_ray.group", "ray.train.torch", "ray.data", "tst_ray.memory")
_KEEP_S = 30 * 24 * 3600
_ANSWER_S = 10.0


def worker_environment(model_type: str) -> dict[str, Any]:
    """The runtime environment of workers that warm up as they start; empty where they cannot.

    Args:
        model_type: transformers' name of the kind of model.
    """
    import ray

    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env or {})
    if any(
        name in job for name in ("pip", "uv", "conda", "container", "image_uri", "py_executable")
    ):
        return {}  # the interpreter is made on each node, and has another path there
    return {
        "py_executable": f"{sys.executable} -m tst_ray.spares",
        "env_vars": {_MODEL_TYPE: model_type},
    }


def order_spare() -> None:
    """Have this node's raylet start one more process like this one; returns at once."""
    try:
        _order()
    except Exception as error:  # Ray's inner interface may change; a run does not depend on it
        log.warning("no spare worker process: %s", error)


def _order() -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import (
        common_pb2,
        node_manager_pb2,
        node_manager_pb2_grpc,
        runtime_environment_pb2,
    )

    context = ray.get_runtime_context()
    environment = context.get_runtime_env_string()
    if "tst_ray.spares" not in environment:
        return
    node = next(n for n in ray.nodes() if n["NodeID"] == context.get_node_id())
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON,
        job_id=bytes.fromhex(context.get_job_id()),
        runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=environment),
        keep_alive_duration_secs=_KEEP_S,
        num_workers=1,
    )
    try:
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        stub.PrestartWorkers(request, timeout=_ANSWER_S)
    finally:
        channel.close()


def warm_up(model_type: str | None) -> None:
    """Import what a worker needs; what cannot be imported now will say so when it is used."""
    modules = list(_MODULES)
    if model_type:
        modules.append(f"transformers.models.{model_type}.modeling_{model_type}")
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            log.warning("%s is not imported ahead: %s", name, error)


if __name__ == "__main__":
    warm_up(os.environ.get(_MODEL_TYPE))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
