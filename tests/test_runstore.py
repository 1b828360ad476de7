"""The run directory: one driver, one config, nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.order import ORDER_VERSION
from tst_ray.config import load_config
from tst_ray.errors import ConfigError, RunError
from tst_ray.journal import read_state, update_state
from tst_ray.runstore import open_run, order_problem, run_storage
from tst_ray.storage import Storage


def make_config(tmp_path: Path, *overrides: str):
    return load_config(None, [f"--run.storage={tmp_path}", *overrides])


def test_the_config_is_written_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_run(config) as (run, _):
        first = run.read("config.yaml")
        run.write_json("plan.json", {"order": ORDER_VERSION})
    with open_run(make_config(tmp_path, "--checkpoint.every=7")) as (run, _):
        assert run.read("config.yaml") == first


def test_another_config_is_refused_with_the_fields_and_nothing_changes(tmp_path: Path) -> None:
    with open_run(make_config(tmp_path)) as (run, _):
        before = run.read("config.yaml")
        run.write_json("plan.json", {"order": ORDER_VERSION})
    other = make_config(tmp_path, "--train.batch_size=8", "--run.seed=3")
    with pytest.raises(ConfigError) as caught, open_run(other):
        pass
    message = str(caught.value)
    assert "train.batch_size" in message and "16" in message and "8" in message
    assert "run.seed" in message
    assert run.read("config.yaml") == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"train: [1, 2", "not valid YAML"),
        (b"\xff", "not valid YAML"),
        (b"", "has no settings"),
        (None, "is gone"),
    ],
)
def test_a_damaged_config_of_the_run_is_told_in_a_line(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    with open_run(make_config(tmp_path)) as (run, _):
        run.write_json("plan.json", {"order": ORDER_VERSION})
    run.remove("config.yaml")
    if content is not None:
        run.write("config.yaml", content)
    match = rf"config\.yaml[^\n]*: {told}[^\n]*; restore it from a copy, or mend it$"
    with pytest.raises(RunError, match=match), open_run(make_config(tmp_path)):
        pass


def test_what_was_refused_before_it_began_binds_nobody(tmp_path: Path) -> None:
    """A wrong path, corrected, must not be taken for another run."""
    with open_run(make_config(tmp_path, "--data.sources=[tezt]")):
        pass
    with open_run(make_config(tmp_path, "--data.sources=[text]")) as (run, _):
        assert b"tezt" not in run.read("config.yaml")


def test_state_keeps_what_is_not_changed(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    assert read_state(run) == {}
    update_state(run, status="running", step=5)
    update_state(run, status="failed")
    state = read_state(run)
    assert (state["status"], state["step"]) == ("failed", 5)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = load_config(None, [f"--run.storage={tmp_path}/file"])
    with pytest.raises(RunError, match=r"run\.storage: cannot write"), open_run(config):
        pass
    assert run_storage(config).url.endswith("/file/demo")


@pytest.mark.parametrize(("plan", "version"), [({}, 1), ({"order": 3}, 3)])
def test_a_run_in_another_order_of_the_data_is_refused_unless_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: dict[str, int], version: int
) -> None:
    config = make_config(tmp_path)
    with open_run(config) as (run, _):
        run.write_json("plan.json", plan)
    told = f"version {version} of the data's order.*another run"
    with pytest.raises(ConfigError, match=told), open_run(config):
        pass
    monkeypatch.setattr("tst_ray.runstore.newest_step", lambda run: config.train.steps)
    with open_run(config):
        pass
    assert f"version {version}" in (order_problem(run) or "")  # of use if it had to go back
