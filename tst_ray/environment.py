"""The environment that a run is started in: what Ray would trip over, mended or told in one line.

    check_environment ──> ConfigError, before anything starts
    prepare_for_ray   ──> variables that Ray, its workers and torch read

The variables are this process's and, through it, those of a Ray that it starts. A Ray that it joins
has its own.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tst_ray.errors import ConfigError
from tst_ray.settings import Config

LEAST_OPEN_FILES = 1024
"""Ray's head, and a few workers of it, hold some hundreds of files and sockets."""

_LONGEST_SOCKET_PATH = 107  # sun_path of Linux, without its final zero
_IN_RAYS_FOLDER = "ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1"
_SHORT_FOLDER = "/tmp"
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for the driver of `ray job submit`
_TOKEN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None for a Ray of the run's own."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def check_environment(config: Config) -> None:
    """Refuse an environment in which a run would fail, or lose what it writes.

    Raises:
        ConfigError: with the variable or setting, its value and the remedy.
    """
    _check_paths(config)
    if config.cluster.backend == "ray" and cluster_address() is None:
        _check_open_files()
        _check_interfaces(name for _, name in socket.if_nameindex())


def prepare_for_ray(is_local: bool) -> None:
    """Set the variables that Ray needs, before it is imported.

    Raises:
        ConfigError: RAY_TMPDIR is too long for Ray's sockets.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # the only one that is used here
    if not is_local:
        return
    # Ray would have `uv run` make each worker's environment, and upload the folder for it. All
    # processes of a Ray on this machine have this one's already.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    _give_short_folder()
    _give_token()


def _check_paths(config: Config) -> None:
    """Refuse relative paths where they lead into a folder that Ray makes for one job."""
    in_ray = "runtime_resources" in Path.cwd().parts
    if not in_ray and not os.environ.get(_JOB):
        return
    settings = {"run.storage": config.run.storage, "data.cache": config.data.cache}
    lines = [
        f"{name} = {value}: in a Ray job a relative path lies in the job's own unpacked folder, "
        "where the next job does not find it; give an absolute path that all nodes share, or a URL"
        for name, value in settings.items()
        if value and "://" not in value and not Path(value).expanduser().is_absolute()
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _check_open_files() -> None:
    """Have this process open as many files as it may. Raises ConfigError if those are too few."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= LEAST_OPEN_FILES:
        return
    if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
        raise ConfigError(
            f"ulimit -n = {hard}: Ray needs {LEAST_OPEN_FILES} open files at the least; raise the "
            "limit of this user or container, or set cluster.backend=inline"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (LEAST_OPEN_FILES, hard))


def _check_interfaces(there: Iterable[str]) -> None:
    """Refuse names of network interfaces that this machine has not.

    Args:
        there: its interfaces.
    """
    names = set(there)
    # gloo takes whole names. NCCL takes beginnings, unless "=" comes first, and "^" excludes.
    gloo = _listed("GLOO_SOCKET_IFNAME")
    nccl = _listed("NCCL_SOCKET_IFNAME")
    missing = {"GLOO_SOCKET_IFNAME": [name for name in gloo if name not in names]}
    if nccl and not nccl[0].startswith("^"):
        whole = nccl[0].startswith("=")
        wanted = [name.removeprefix("=").partition(":")[0] for name in nccl]
        found = [
            name in names if whole else any(other.startswith(name) for other in names)
            for name in wanted
        ]
        if not any(found):
            missing["NCCL_SOCKET_IFNAME"] = wanted
    for variable, absent in missing.items():
        if absent:
            raise ConfigError(
                f"{variable} = {os.environ[variable]}: this machine has no network interface "
                f"{absent[0]}; it has {', '.join(sorted(names))}; name one of them, or unset it"
            )


def _listed(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


def _give_short_folder() -> None:
    """Have Ray keep its files where the paths of its sockets are short enough."""
    given = os.environ.get("RAY_TMPDIR")
    folder = given or tempfile.gettempdir()
    if len(f"{folder}/{_IN_RAYS_FOLDER}".encode()) <= _LONGEST_SOCKET_PATH:
        return
    if given:
        longest = _LONGEST_SOCKET_PATH - len(_IN_RAYS_FOLDER) - 1
        raise ConfigError(
            f"RAY_TMPDIR = {given}: is too long for the paths of Ray's sockets; name a folder of "
            f"at most {longest} characters, such as {_SHORT_FOLDER}"
        )
    os.environ["RAY_TMPDIR"] = _SHORT_FOLDER


def _give_token() -> None:
    """Give a Ray on this machine a token of its own where it could keep none at home."""
    if any(os.environ.get(name) for name in _TOKEN_VARIABLES) or _home_takes_files():
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _home_takes_files() -> bool:
    """Whether Ray can read or make a token at home."""
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(exist_ok=True)  # as Ray does
    except (RuntimeError, OSError):  # there is no home, or none that can be written to
        return False
    token = folder / "auth_token"
    return os.access(token, os.R_OK) if token.is_file() else os.access(folder, os.W_OK)
