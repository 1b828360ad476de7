"""When a group that trains ends for a larger one: what is measured of it, and on which nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.manifest import Manifest
from tests.tiny import make_config, make_corpus, make_job
from tst_ray.growth import Growing
from tst_ray.journal import update_state
from tst_ray.metrics import add_event
from tst_ray.room import Room
from tst_ray.sight import Sight
from tst_ray.storage import Storage


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Those that could have workers; there is room for two, and no autoscaler."""
    there: set[str] = set()
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: 2)
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, without: None)
    monkeypatch.setattr(Room, "nodes", lambda room: there)
    return there


def growing(
    folder: Path, manifest: Manifest, most: int, **settings: Any
) -> tuple[Growing, Storage]:
    """Of a stage of one to `most` workers, and the run directory."""
    job = make_job(make_config(folder, manifest, **settings), manifest)
    return Growing(job, Room(job.config, 1, most, Sight())), Storage(job.run_url)


def trained(run: Storage, world_size: int, attempt: int, step: int, step_s: float) -> None:
    """Three steps up to this one, as a group leaves them behind."""
    update_state(run, attempt=attempt, attempt_from=0, step=step)
    for number in range(max(step - 2, 1), step + 1):
        record = {"step": number, "attempt": attempt, "world_size": world_size}
        run.append("metrics.jsonl", json.dumps({**record, "step_time_s": step_s}) + "\n")


def test_a_slow_step_of_other_nodes_says_nothing_of_those_that_came(
    tmp_path: Path, manifest: Manifest, nodes: set[str]
) -> None:
    settings = {"cluster__settle_s": 0, "cluster__growth_gain": 1, "train__steps": 10_000}
    of_stage, run = growing(tmp_path, manifest, 4, **settings)
    nodes |= {"a", "b"}

    def grows(world_size: int, attempt: int, at_work: set[str], step_s: float) -> bool:
        trained(run, world_size, attempt, 3, step_s)
        return of_stage.worth(world_size, at_work) is not None

    assert not grows(2, 1, {"a", "b"}, 2.0)  # b is slow
    assert not grows(1, 2, {"a"}, 1.0)
    nodes ^= {"b", "c"}
    assert grows(1, 3, {"a"}, 1.0)


def test_a_group_does_not_end_to_grow_while_it_cannot_be_saved(
    tmp_path: Path, manifest: Manifest
) -> None:
    settings = {"cluster__settle_s": 0, "cluster__growth_gain": 0}
    of_stage, run = growing(tmp_path, manifest, 4, **settings)
    trained(run, 1, 1, 3, 1.0)

    def grows_after(kind: str, **details: Any) -> bool:
        add_event(run, kind, **details)
        return of_stage.worth(1, set()) is not None

    assert grows_after("attempt")
    assert not grows_after("checkpoint_failed", step=2)
    assert not grows_after("grow", step=2)
    assert grows_after("checkpoint", step=3)
    assert grows_after("checkpoint_failed", step=3, memory=True)  # only copies are missing


def test_an_autoscaler_is_asked_for_the_workers_that_pay(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each look: a request expires."""
    asked: list[int] = []
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, _: asked.append(most))
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: 1)

    def look(most: int, step: int) -> list[int]:
        asked.clear()
        of_stage, run = growing(tmp_path / f"{most}-{step}", manifest, most)
        trained(run, 1, 1, step, 100.0)
        for _ in range(2):
            assert not of_stage.worth(1, set())
        return asked

    assert look(4, 3) == [4, 4]
    assert look(4, 8) == [1, 1], "nothing is left to do"
    assert look(1, 3) == [1, 1], "there can be no more"
    assert look(4, 0) == [4, 4], "how long a step takes is not known yet: as before"
    monkeypatch.setattr("tst_ray.autoscaler.is_coordinated", lambda: False)
    assert look(4, 3) == [4, 4]
    assert look(4, 8) == [], "Ray Train asks for those at work itself"
    assert look(1, 3) == []


def test_what_a_restart_costs_is_what_one_was_seen_to_cost(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the request to stop to the end of the next group's first step."""
    now = [1000.0]
    monkeypatch.setattr("tst_ray.growth.time.monotonic", lambda: now[0])
    settings = {"cluster__settle_s": 60, "cluster__growth_gain": 0}
    of_stage, run = growing(tmp_path, manifest, 4, **settings)
    trained(run, 1, 1, 3, 1.0)
    assert of_stage.start_s == 20.0
    now[0] = 1050.0
    of_stage.begun(started=1010.0)
    assert of_stage.start_s == 40.0
    now[0] = 1109.0
    assert of_stage.worth(1, set()) is None, "it has not settled"
    now[0] = 1111.0
    growth = of_stage.worth(1, set())
    assert growth is not None and (growth.restart_s, growth.since_resize_s) == (40.0, 61.0)
    now[0] = 1118.0
    of_stage.stopped(asked=1111.0)
    of_stage.resized()
    assert of_stage.worth(1, set()) is None
    now[0] = 1200.0
    growth = of_stage.worth(1, set())
    assert growth is not None and (growth.restart_s, growth.since_resize_s) == (47.0, 82.0)
