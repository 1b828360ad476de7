"""Spare processes: started and warmed up while training goes on, taken when one is needed.

    python …/spares.py <Ray's worker script> …    import what a worker needs, then be one
    order_spares                                  ask this node's raylet for more, ahead of need

A new worker process spends its first seconds on imports: torch, transformers, Ray Data. Ray keeps
processes that it was asked to start ahead, and gives one to the next actor that has the same
runtime environment. So every worker orders one like itself, once it trains, and a restarted group
finds its imports done (2 cores, 2026-11: an actor with torch was ready after 0.2 s instead of 2.4).
Rank 0 orders those that stand beside a group too, its controller and Ray Data's; they are only
started, not warmed up: done for all of Ray's processes, that cost more than it saved (14 s instead
of 11 s from a kill to the next step).

The order is a message of Ray's own between its parts (`PrestartWorkers`), not of its public
interface: where it fails, for whatever reason, a restart merely takes longer.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_MODEL_TYPE = "TST_RAY_MODEL_TYPE"
_MODULES = ("tst_ray.worker", "tst_ray.group", "ray.train.torch", "ray.data", "tst_ray.memory")
_NUM_DATA = 3  # what hands out the datasets, what splits the first one, and a reader
_KEEP_S = 30 * 24 * 3600
_ANSWER_S = 10.0


def interpreter() -> str:
    """What to start a process of Ray with, so that it warms up first."""
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).resolve()))}"


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
    return {"py_executable": interpreter(), "env_vars": {_MODEL_TYPE: model_type}}


def order_spares(beside: dict[str, str] | None) -> None:
    """Have this node's raylet start what a restart would need; returns at once.

    Args:
        beside: the environment variables of a controller, where those that stand beside a group
            are to be ordered too.
    """
    try:
        _order(beside)
    except Exception as error:  # Ray's inner interface may change; a run does not depend on it
        log.warning("no spare processes: %s", error)


def _order(beside: dict[str, str] | None) -> None:
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import (
        common_pb2,
        node_manager_pb2,
        node_manager_pb2_grpc,
        runtime_environment_pb2,
    )

    context = ray.get_runtime_context()
    wanted = _wanted(context.get_runtime_env_string(), beside)
    if not wanted:
        return
    node = next(n for n in ray.nodes() if n["NodeID"] == context.get_node_id())
    channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
    stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
    try:
        for environment, count in wanted:
            request = node_manager_pb2.PrestartWorkersRequest(
                language=common_pb2.Language.PYTHON,
                job_id=bytes.fromhex(context.get_job_id()),
                runtime_env_info=runtime_environment_pb2.RuntimeEnvInfo(
                    serialized_runtime_env=environment
                ),
                keep_alive_duration_secs=_KEEP_S,
                num_workers=count,
            )
            stub.PrestartWorkers(request, timeout=_ANSWER_S)
    finally:
        channel.close()


def _wanted(own: str, beside: dict[str, str] | None) -> list[tuple[str, int]]:
    """(runtime environment as Ray writes it, how many) of the processes to order."""
    from ray.runtime_env import RuntimeEnv

    if json.loads(own or "{}").get("py_executable") != interpreter():
        return []
    wanted = [(own, 1)]
    if beside is not None:
        controller = RuntimeEnv(env_vars=beside)
        wanted += [(controller.serialize(), 1), (RuntimeEnv().serialize(), _NUM_DATA)]
    return wanted


def warm_up(model_type: str | None) -> None:
    """Import what a worker needs; what cannot be imported now will say so when it is used."""
    names = list(_MODULES)
    if model_type:
        names.append(f"transformers.models.{model_type}.modeling_{model_type}")
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            log.warning("%s is not imported ahead: %s", name, error)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # our packages, not our modules
    warm_up(os.environ.get(_MODEL_TYPE))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
