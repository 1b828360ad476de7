"""The Ray that a run uses: started here, or joined; what is refused."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import AuthenticationError, RpcError

from tst_ray import forkclient, session
from tst_ray.config import load_config
from tst_ray.errors import ConfigError, RunError
from tst_ray.plan import build_plan
from tst_ray.session import check_local, local_cpus, ray_session
from tst_ray.settings import Config


def config_of(*overrides: str) -> Config:
    return load_config(None, ["--train.steps=100", *overrides])


@pytest.mark.parametrize(
    ("cores", "options", "cpus"),
    [
        (2, [], 3),  # the demo: two workers, and its reader shares a core with them
        (1, [], 3),
        (16, [], 16),
        (4, ["--cluster.workers=[1, 64]"], 5),  # no more workers than cores
        (4, ["--cluster.workers=[1, 64]", "--cluster.cpus_per_worker=2"], 5),
        (4, ["--cluster.workers=[1, 64]", "--cluster.cpus_per_worker=0.5"], 5),
        (4, ["--cluster.workers=3", "--cluster.data_cpus=4"], 7),
    ],
)
def test_a_range_of_workers_goes_as_far_as_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, options: list[str], cpus: int
) -> None:
    monkeypatch.setattr(session, "_cores", lambda: cores)
    config = config_of("--train.batch_size=64", *options)
    assert local_cpus(config, build_plan(config)) == cpus


def test_what_trains_nothing_needs_no_cpus_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_cores", lambda: 4)
    config = config_of("--cluster.workers=16")
    with pytest.raises(ConfigError, match="this machine has 4"):
        check_local(config, build_plan(config))
    assert local_cpus(config, None) == 4


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1)]
)
def test_a_container_has_the_cores_of_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert session._cores(tmp_path / "cpu.max") == cores
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert session._cores(tmp_path / "cpu.max") == session._cores(tmp_path / "none") == 64


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_of_another_kind_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    config = config_of("--cluster.fork_server=false")
    told = pytest.raises(RunError, match=f"RAY_ADDRESS = {address}: give HOST:PORT")
    with told, ray_session(config, build_plan(config)):
        pass


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    seen: list[str | None] = []

    @contextlib.contextmanager
    def started(*args: Any) -> Iterator[session.Session]:
        seen.append(os.environ.get("RAY_ADDRESS"))  # which Ray itself heeds, too
        yield session.Session(True, "here")

    monkeypatch.setattr(session, "_started", started)
    config = config_of("--cluster.fork_server=false")
    with ray_session(config, None) as found:
        assert found.is_local
    assert seen == [None]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and an environment that says nothing of one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set here ends with the test
    return tmp_path


def test_a_token_is_shown_where_there_is_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session.show_token()
    assert "RAY_AUTH_MODE" not in os.environ
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret")
    session.show_token()
    assert os.environ.pop("RAY_AUTH_MODE") == "token"
    (home / ".ray" / "auth_token").unlink()
    monkeypatch.setitem(os.environ, "RAY_AUTH_TOKEN", "secret")
    session.show_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setitem(os.environ, "RAY_AUTH_MODE", "disabled")
    session.show_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled", "who says so is heeded"


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(None, None), (AuthenticationError("no token"), "token"), (RpcError("timed out"), None)],
)
def test_the_token_is_shown_to_a_cluster_that_asks_for_it_alone(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Exception | None,
    shown: str | None,
) -> None:
    """A driver that shows it hears nothing of the workers of a cluster that knows of none."""
    asked: list[str] = []

    def client(address: str) -> None:
        asked.append(address)
        if answer:
            raise answer

    monkeypatch.setattr("ray._raylet.GcsClient", client)
    session.show_token_if_asked("here:6379")
    assert asked == [] and "RAY_AUTH_MODE" not in os.environ, "there is none"
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret")
    session.show_token_if_asked("here:6379")
    assert asked == ["here:6379"] and os.environ.get("RAY_AUTH_MODE") == shown


@pytest.mark.parametrize(
    ("address", "asked"), [("auto", []), ("autoscaler-head:6379", ["autoscaler-head:6379"])]
)
def test_a_cluster_is_asked_at_its_address(
    monkeypatch: pytest.MonkeyPatch, address: str, asked: list[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(session, "_check_address", lambda address: None)
    monkeypatch.setattr(session, "show_token_if_asked", seen.append)
    monkeypatch.setattr("ray.init", Mock(side_effect=ConnectionError("nobody")))
    with pytest.raises(RunError, match="nobody"), session._joined(address, {}):
        pass
    assert seen == asked


@pytest.mark.parametrize("error", [ConnectionError, ValueError, AuthenticationError])
def test_a_cluster_that_refuses_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuses(**options: Any) -> None:
        raise error("Failed to connect\nto the cluster")

    monkeypatch.setattr("ray.init", refuses)
    told = pytest.raises(RunError, match=r"^RAY_ADDRESS = auto: .*Failed .* ~/\.ray/auth_token")
    with told as caught, session._joined("auto", {}):
        pass
    assert "\n" not in str(caught.value)


def test_a_cluster_of_another_ray_is_told_in_a_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError(f"{said}: The cluster was started with:\n    Ray: 2.60.0\n")

    monkeypatch.setattr("ray.init", init)
    said = "Version mismatch"
    told = r"^RAY_ADDRESS = auto: Version mismatch: .* Ray: 2\.60\.0; start the driver with"
    with pytest.raises(RunError, match=told), session._joined("auto", {}):
        pass
    said = "called twice"
    with pytest.raises(RuntimeError, match=r"^called twice") as caught, session._joined("auto", {}):
        pass
    assert not isinstance(caught.value, RunError), "a defect is no user's error"


@pytest.mark.parametrize("forks", [True, False])
@pytest.mark.parametrize("lacks", [[], ["setup_worker_path"], ["no_monitor", "setup_worker_path"]])
def test_a_local_ray_is_told_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, lacks: list[str], forks: bool
) -> None:
    """Parameters of Ray's own, which another Ray may have no more."""
    import ray
    from ray._private import parameter

    wanted = {"no_monitor": True} | ({"setup_worker_path": forkclient.__file__} if forks else {})
    known = [name for name in ("no_monitor", "setup_worker_path") if name not in lacks]

    class RayParams:
        __signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in known]
        )

        def __init__(self, **given: Any) -> None:
            told.append(given)

    told: list[dict[str, Any]] = []
    info = {"gcs_address": "here", "session_dir": "/tmp"}

    def init(**options: Any) -> Any:
        parameter.RayParams()
        return SimpleNamespace(address_info=info)

    monkeypatch.setattr(parameter, "RayParams", RayParams)
    monkeypatch.setattr(ray, "init", init)
    config = config_of(f"--cluster.fork_server={str(forks).lower()}")
    with session._started(config, None) as started:
        assert (started.is_local, started.address) == (True, "here")
    assert told == [{name: value for name, value in wanted.items() if name in known}]
    assert parameter.RayParams is RayParams, "for others, it is what it was"
