"""What a run is started in: what is mended for Ray, and what is refused in a line."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.units import run_inline
from tests.test_session import config_of
from tst_ray.coordinator import prepare_only, told_of_ray
from tst_ray.environment import check_environment, cluster_address, prepare_for_ray
from tst_ray.errors import ConfigError
from tst_ray.plan import Plan
from tst_ray.settings import Config

NAMES = (
    "RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH",
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_TRAIN_V2_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
)  # fmt: skip


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that takes files, and an environment that says nothing."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set here ends with the test
    monkeypatch.setitem(os.environ, "HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (None, None),
        ("", None),
        ("  ", None),
        ("local", None),
        (" local ", None),
        ("auto", "auto"),
        (" 10.0.0.1:6379 ", "10.0.0.1:6379"),
    ],
)
def test_an_address_is_taken_as_it_is_meant(given: str | None, address: str | None) -> None:
    if given is not None:
        os.environ["RAY_ADDRESS"] = given
    assert cluster_address() == address


def test_ray_train_is_the_one_that_is_used_here() -> None:
    os.environ["RAY_TRAIN_V2_ENABLED"] = "0"
    prepare_for_ray(is_local=False)
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"


def test_a_ray_of_the_runs_own_needs_no_package_of_the_folder() -> None:
    """A cluster that is joined may need it: its nodes do not have this environment."""
    prepare_for_ray(is_local=False)
    assert "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ
    prepare_for_ray(is_local=True)
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_a_ray_of_the_runs_own_is_where_paths_are_short() -> None:
    prepare_for_ray(is_local=True)
    assert "RAY_TMPDIR" not in os.environ
    os.environ["TMPDIR"] = "/tmp"
    prepare_for_ray(is_local=True)
    assert "RAY_TMPDIR" not in os.environ, "it is short enough"


def test_a_long_temporary_folder_is_not_rays(tmp_path: Path) -> None:
    folder = tmp_path / ("job" * 30)
    folder.mkdir()
    os.environ["TMPDIR"] = str(folder)
    prepare_for_ray(is_local=False)
    assert "RAY_TMPDIR" not in os.environ
    prepare_for_ray(is_local=True)
    assert os.environ["RAY_TMPDIR"] == "/tmp"
    os.environ["RAY_TMPDIR"] = str(folder)
    with pytest.raises(ConfigError, match=r"^RAY_TMPDIR = .* at most \d+ characters, such as /tmp"):
        prepare_for_ray(is_local=True)


@pytest.mark.parametrize("place", ["/proc/no-home", "/dev/null"])
def test_without_a_home_ray_gets_a_token_of_its_own(place: str) -> None:
    os.environ["HOME"] = place
    prepare_for_ray(is_local=False)
    assert "RAY_AUTH_MODE" not in os.environ
    prepare_for_ray(is_local=True)
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_who_says_what_token_to_use_is_heeded(name: str) -> None:
    os.environ |= {"HOME": "/proc/no-home", name: "given"}
    before = dict(os.environ)
    prepare_for_ray(is_local=True)
    token = {key: value for key, value in os.environ.items() if "AUTH" in key}
    assert token == {key: value for key, value in before.items() if "AUTH" in key}


def test_a_home_keeps_the_token() -> None:
    prepare_for_ray(is_local=True)
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize(
    ("variable", "name"), [("GLOO", "ib0"), ("GLOO", "lo,ib0"), ("NCCL", "ib")]
)
def test_a_network_interface_that_is_not_there_is_told(variable: str, name: str) -> None:
    variable = f"{variable}_SOCKET_IFNAME"
    os.environ[variable] = name
    told = rf"^{variable} = {name}: this machine has no network interface ib0?; it has .*lo"
    with pytest.raises(ConfigError, match=told):
        check_environment(config_of())
    check_environment(config_of("--cluster.backend=inline", "--cluster.workers=1"))
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"  # other machines have others
    check_environment(config_of())


@pytest.mark.parametrize("name", ["lo", "l", "=lo", "^docker", "lo:1", "ib,lo"])
def test_nccl_takes_parts_of_names(name: str) -> None:
    os.environ["NCCL_SOCKET_IFNAME"] = name
    check_environment(config_of())


@pytest.mark.parametrize(
    ("soft", "hard", "raised"), [(256, 4096, 1024), (1024, 1024, None), (256, -1, 1024)]
)
def test_as_many_files_as_ray_needs_may_be_open(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None
) -> None:
    done: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: done.append(limits))
    check_environment(config_of())
    assert done == ([(raised, hard)] if raised else [])


def test_too_low_a_limit_of_open_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))
    with pytest.raises(ConfigError, match=r"^ulimit -n = 512: Ray needs 1024 open files"):
        check_environment(config_of())


@pytest.mark.parametrize("where", ["job", "folder"])
def test_a_job_writes_nothing_where_the_next_one_does_not_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    check_environment(config_of())
    if where == "job":
        os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"] = "{}"
    else:
        folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"^run\.storage = runs: in a Ray job .* absolute path"):
        check_environment(config_of())
    with pytest.raises(ConfigError, match=r"^data\.cache = shards: in a Ray job") as told:
        check_environment(config_of("--run.storage=/shared/runs", "--data.cache=shards"))
    assert told.value.exit_status == 2
    for storage in ("/shared/runs", "~/runs", "s3://bucket/runs"):
        check_environment(config_of(f"--run.storage={storage}"))


def test_ray_is_there_for_text_that_is_to_be_tokenized_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it prints goes to a file."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a line of plain text\n" * 400)
    done: list[str] = []

    @contextlib.contextmanager
    def ray_session(config: Config, plan: Plan | None) -> Iterator[None]:
        done.append("Ray starts")
        yield
        done.append("and ends")

    @contextlib.contextmanager
    def quiet(log_path: str) -> Iterator[None]:
        done.append(log_path)
        yield

    monkeypatch.setattr("tst_ray.coordinator.ray_session", ray_session)
    monkeypatch.setattr("pipelines.tokenize.run_on_ray", run_inline)
    config = config_of(
        f"--run.storage={tmp_path}",
        f"--data.sources=[{tmp_path / 'text'}]",
        "--data.vocab_size=280",
    )
    told: list[str] = []
    prepared = prepare_only(config, told.append, quiet)
    log_path = str(tmp_path / "shards" / "ray.log")
    assert done == [log_path, "Ray starts", "and ends"]
    assert f"starting Ray (what it prints is in {log_path})" in told
    assert prepare_only(config, told.append, quiet) == prepared
    assert len(done) == 3


def test_what_is_said_of_ray_is_what_is_done() -> None:
    assert told_of_ray() == "starting Ray"
    os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    assert told_of_ray() == "joining Ray at 10.0.0.1:6379"
