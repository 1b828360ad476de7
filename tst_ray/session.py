"""The Ray that a run uses: joined where there is a cluster, else started on this machine.

    RAY_ADDRESS ──> _joined
    none        ──> _started, with what a run needs of it, and ended after it

What a cluster has, and whether that is enough, is for nodes.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import one_line
from tst_ray import forkclient, forkserver
from tst_ray.environment import cluster_address, prepare_for_ray
from tst_ray.errors import ConfigError, RunError
from tst_ray.nodes import cpus_needed, workers_needed
from tst_ray.plan import Plan
from tst_ray.settings import Config
from tst_ray.timeouts import GROUP_END_S, GROUP_POLL_S, GROUP_START_S, WORKER_ANSWER_S

log = logging.getLogger(__name__)

_LOCAL_OBJECT_STORE_BYTES = 1 << 30
_CONNECT_TIMEOUT_S = 10.0
_TOKEN_FILE = "~/.ray/auth_token"

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
    """

    is_local: bool
    address: str


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
    address = cluster_address()
    is_local = address is None
    if address is None:
        os.environ.pop("RAY_ADDRESS", None)  # empty or "local": Ray itself heeds it, too
    else:
        os.environ["RAY_ADDRESS"] = address  # without spaces around it
    prepare_for_ray(is_local)
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
            names = (*_RAY_TRAIN_SETTINGS, "RAY_TRAIN_V2_ENABLED")
            variables = {name: os.environ[name] for name in names}
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
    """The cluster at an address. Raises RunError where none lets it join."""
    _check_address(address)
    if address.rpartition(":")[2].isdigit():  # `auto` is for Ray to find
        show_token_if_asked(address)
    import ray
    from ray.exceptions import RayError

    try:
        context = ray.init(**options)
    except (ConnectionError, ValueError, RayError) as error:  # the second: no address at all
        raise RunError(
            f"RAY_ADDRESS = {address}: no Ray cluster lets this driver join there "
            f"({one_line(error)}); give HOST:PORT as `ray start --head` prints it and, if that "
            f"asks for a token, its own: in {_TOKEN_FILE} here, or as RAY_AUTH_TOKEN"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise RunError(
            f"RAY_ADDRESS = {address}: {one_line(error)}; start the driver with the cluster's "
            "Python and Ray, as `ray job submit` does"
        ) from error
    with _until_shutdown(context, is_local=False) as session:
        yield session


def show_token_if_asked(address: str) -> None:
    """Have this process show the user's token, if there is one, where a cluster asks for it.

    From the first `ray.init` on, each Ray that its user starts asks for the token at home, while
    Ray shows it to no address unasked. Nor should it: a driver that shows it asks for it too, and
    would hear nothing of the workers of a cluster that knows of none.

    Args:
        address: HOST:PORT of its head, where something listens.
    """
    if not _has_token():
        return
    try:
        from ray._raylet import GcsClient  # type: ignore[attr-defined,unused-ignore]
        from ray.exceptions import AuthenticationError, RayError
    except ImportError:  # an older Ray's, which knows no tokens
        return
    try:
        GcsClient(address=address)
    except AuthenticationError:
        show_token()
    except RayError as error:  # whoever joins is told
        log.warning("%s does not say whether it asks for a token: %s", address, error)


def show_token() -> None:
    """Have this process show the user's token from now on, if there is one."""
    if _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
        with contextlib.suppress(ImportError, AttributeError):  # an older Ray
            from ray._raylet import Config  # type: ignore[attr-defined,unused-ignore]

            Config.initialize("")  # the mode may have been looked up already


def _has_token() -> bool:
    """Whether there is a token that nobody has said to show, or not to."""
    given = any(map(os.environ.get, ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")))
    there = given or Path(_TOKEN_FILE).expanduser().exists()
    return there and "RAY_AUTH_MODE" not in os.environ


@contextlib.contextmanager
def _until_shutdown(context: Any, is_local: bool) -> Iterator[Session]:
    """The session of a connected Ray, which ends with the block."""
    import ray

    try:
        yield Session(is_local, context.address_info["gcs_address"])
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
