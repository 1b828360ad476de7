"""The driver's own decisions, without Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.test_bad_input import arguments
from tests.test_runs import write_text
from tests.tiny import make_config, make_corpus
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.coordinator import Coordinator
from tst_ray.errors import ConfigError, RunError
from tst_ray.hold import Hold, Overtaken
from tst_ray.journal import read_state, update_state
from tst_ray.metrics import add_event
from tst_ray.plan import build_plan
from tst_ray.preview import plan_facts
from tst_ray.report import print_summary, status_facts
from tst_ray.runstore import read_events, run_storage
from tst_ray.storage import Storage
from tst_ray.tasks import Call, check_model


@pytest.mark.parametrize("facts", [plan_facts, lambda c: check_model(c, build_plan(c), None)])
def test_the_positions_of_evaluation_count_where_phases_have_fewer(facts: Any) -> None:
    phases = "--phases=[{bag_size: 4, steps: 8, fold: none}]"
    config = load_config(None, [phases, "--model.config.max_position_embeddings=63"])
    assert [phase.latent_length for phase in build_plan(config).phases] == [16]
    with pytest.raises(ConfigError, match=r"= 63: shorter than train.sequence_length = 64"):
        facts(config)


class Lost(Hold):
    """A hold on a run that another driver has taken."""

    def check(self) -> None:
        raise Overtaken("another driver has taken this run")


def test_an_overtaken_driver_leaves_no_mark_on_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may learn of it by its workers, to whom another attempt is a failure."""
    config = load_config(None, [f"--run.storage={tmp_path}", "--cluster.backend=inline"])
    driver = Coordinator(config, SimpleNamespace(say=lambda text: None))

    def taken(run: Storage, *args: Any) -> None:
        driver._trains = True
        update_state(run, status="running", attempt=7)
        monkeypatch.setattr(driver, "_held", Lost())
        raise RunError("another attempt of this run has taken over; this one ends")

    monkeypatch.setattr(driver, "_drive", taken)
    with pytest.raises(Overtaken):
        driver.run()
    run = run_storage(config)
    assert (read_state(run)["status"], read_state(run)["attempt"]) == ("running", 7)
    assert run.read_lines("events.jsonl") == []


def a_bit_flips(run: Storage, name: str, where: bytes) -> None:
    content = run.read(name)
    at = content.index(where)
    run.write(name, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize("damage", ["none", "byte", "field", "removed"])
def test_a_run_is_finished_whatever_was_done_to_its_logs(tmp_path: Path, damage: str) -> None:
    """They are for people; what a run must not lose is in its checkpoints."""
    config = load_config(None, ["--train.steps=6", f"--run.storage={tmp_path}"])
    driver, run = Coordinator(config, SimpleNamespace(say=None)), run_storage(config)
    run.make()
    update_state(run, status="running", step=6, total_steps=6)
    for step in range(1, 7):
        record = {"step": step, "attempt": 1, "phase": driver.plan.phase_at(step - 1).index}
        record |= {"world_size": 2, "step_time_s": 1.0, "loss": 2.5, "val_loss": 2.0}
        run.append("metrics.jsonl", json.dumps(record) + "\n")
        add_event(run, "checkpoint", step=step)
    if damage == "byte":
        for name in ("metrics.jsonl", "events.jsonl"):
            Path(run.at(name)).write_bytes(run.read(name).replace(b'"step"', b'"st\xe5p"', 1))
    elif damage == "field":
        a_bit_flips(run, "metrics.jsonl", b"phase")
        a_bit_flips(run, "events.jsonl", b"event")
    elif damage == "removed":
        run.remove("metrics.jsonl")
    outcome = driver._finish(run, [])
    page = Console(file=io.StringIO(), width=200)
    print_summary(outcome, page)
    said = page.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("data tokens") == len(driver.plan.phases) == 2
    assert (read_state(run)["status"], read_state(run)["step"]) == ("finished", 6)
    told = [event for event in read_events(run) if event.get("event") == "finish"]
    assert [event["step"] for event in told] == [6]
    assert ("2 workers, loss 2.500" in said) is (damage != "removed")
    assert ("final validation loss: 2.0000" in said) is (damage != "removed")
    assert status_facts(run)["last_events"][-1]["event"] == "finish"


@pytest.mark.parametrize("before", ["failed", "stopped", "running", "finished", None])
def test_how_a_run_stopped_is_not_said_of_it_while_a_driver_is_back_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """Hours may pass until a worker writes that it trains; a finished run stays finished."""
    config = load_config(None, [f"--run.storage={tmp_path}", "--cluster.backend=inline"])
    driver, run = Coordinator(config, SimpleNamespace(say=lambda text: None)), run_storage(config)
    if before is not None:
        run.make()
        update_state(run, status=before, step=7, time={"at": 1.0, "parts": {}})
    seen = []

    def prepare(*args: Any) -> None:
        seen.append(read_state(run)["status"])
        raise RunError("the text is not there")

    monkeypatch.setattr(driver, "_drive", prepare)
    with pytest.raises(RunError, match="the text is not there"):
        driver.run()
    is_finished = before == "finished"
    assert seen == ["finished" if is_finished else "starting"]
    state = read_state(run)
    assert state["status"] == ("finished" if is_finished else "failed")
    assert state.get("step") == (None if before is None else 7)
    assert (state["time"]["parts"].get("down", 0.0) > 1.0) is (before not in ("finished", None))
    assert run.read_lines("events.jsonl") == [], "it was refused before it trained"


def test_storage_that_is_away_delays_no_word_of_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait outlasts it; who has ended is not kept from saying so."""
    answers: list[Any] = [OSError("503")] * 2
    waited: list[float] = []

    def read(run: Storage) -> dict[str, Any]:
        if answers:
            raise answers.pop()
        return {"status": "finished"}

    def pauses(patience_s: float) -> Iterator[float]:
        while True:
            waited.append(patience_s)
            yield 0.0

    monkeypatch.setattr("tst_ray.coordinator.read_state", read)
    monkeypatch.setattr("tst_ray.storage.pauses", pauses)
    driver = Coordinator(load_config(None), SimpleNamespace(say=lambda text: None))
    driver._record_failure(Storage(str(tmp_path)), RunError("it ended"))
    assert waited == []
    driver._wait_on(Storage(str(tmp_path)))
    assert len(waited) == 1


@pytest.mark.parametrize(("step", "part"), [(0, "startup"), (100, "restart")])
def test_waiting_for_an_autoscaler_is_charged_as_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, part: str
) -> None:
    run, said, parts = Storage(str(tmp_path)), [], []
    driver = Coordinator(load_config(None), SimpleNamespace(say=said.append))

    def grows(*args: Any, say: Any, wait_on: Any) -> None:
        say("waiting for the cluster to grow")
        wait_on()
        wait_on()

    monkeypatch.setattr("tst_ray.coordinator.check_capacity", grows)
    monkeypatch.setattr("tst_ray.coordinator.unused_gpus", lambda config: 0)
    monkeypatch.setattr("tst_ray.coordinator.newest_step", lambda run: step)
    monkeypatch.setattr("tst_ray.coordinator.charge", lambda run, part: parts.append(part))
    driver._check_cluster(run, is_local=True)
    assert parts == [part, "waiting_for_nodes", "waiting_for_nodes"]
    assert said == ["waiting for the cluster to grow"]
    assert [(event["event"], event["why"]) for event in read_events(run)] == [("waiting", said[0])]
    monkeypatch.setattr(driver, "_held", Lost())
    with pytest.raises(Overtaken):
        driver._check_cluster(run, is_local=True)


class Crowded(Call):
    """A task that begins at the third look; others have its place until then."""

    def __init__(self, lacks: str | None) -> None:
        self.looks: list[float] = []
        self._lacks = lacks

    def has_begun(self, wait_s: float) -> bool:
        self.looks.append(wait_s)
        return len(self.looks) > 3

    def lacks(self) -> str | None:
        return self._lacks

    def result(self) -> Any:
        return "done"


@pytest.mark.parametrize("lacks", ["a free CPU", None])
def test_a_task_that_others_keep_waiting_is_told_once_and_charged_as_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str | None
) -> None:
    """One whose process takes long to start is no reason to say so."""
    run, said, parts = Storage(str(tmp_path)), [], []
    driver = Coordinator(load_config(None), SimpleNamespace(say=said.append))
    monkeypatch.setattr("tst_ray.coordinator.charge", lambda run, part: parts.append(part))
    task = Crowded(lacks)
    assert driver._result(run, task, "closing") == "done"
    assert task.looks == [10.0] * 4
    told = ["waiting for a free CPU: others use the nodes"] if lacks else []
    assert said == told == [event["why"] for event in read_events(run)]
    assert parts == (["closing", *["waiting_for_nodes"] * 3] if lacks else [])


class Blind:
    """Stands in for what looked at the nodes: one of them sees nothing."""

    def settle(self) -> None:
        pass

    def unseen(self) -> frozenset[str]:
        return frozenset({"blind"})

    def problems(self) -> dict[str, str]:
        return {"blind": "node 10.0.0.7 does not see /runs/a/config.yaml (run.storage)"}


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """One on a cluster of which a node sees nothing."""
    monkeypatch.setattr("tst_ray.coordinator.Sight", lambda needed=None: Blind())
    for name in ("check_capacity", "unused_gpus", "needed_everywhere"):
        monkeypatch.setattr(f"tst_ray.coordinator.{name}", lambda *args, **options: 0)
    return Coordinator(load_config(None), SimpleNamespace(say=lambda text: None))


def test_a_run_that_has_begun_goes_on_without_a_node_that_does_not_see(
    blind: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Storage(str(tmp_path))
    monkeypatch.setattr("tst_ray.coordinator.newest_step", lambda run: 0)
    with pytest.raises(
        RunError, match=r"^node 10.0.0.7 .* \(run.storage\); give a folder that all"
    ):
        blind._check_cluster(run, is_local=False)
    monkeypatch.setattr("tst_ray.coordinator.newest_step", lambda run: 100)
    blind._check_cluster(run, is_local=False)


def test_all_tasks_of_a_run_are_kept_off_nodes_that_do_not_see_it(
    blind: Coordinator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, frozenset[str]]] = []

    def begun(backend: str, function: Any, *args: Any, away: frozenset[str], **rest: Any) -> Any:
        asked.append((function.__name__, away))
        shape = SimpleNamespace(parameters=1)
        ended = ((), shape, {}) if function is check_model else (blind.plan.total_steps, [])
        return Call(lambda: ended, ())

    monkeypatch.setattr("tst_ray.coordinator.begin", begun)
    for name in ("build_order", "build_feeds", "newest_step", "check_memory"):
        monkeypatch.setattr(f"tst_ray.coordinator.{name}", lambda *args: 0)
    monkeypatch.setattr("tst_ray.coordinator.mixture", lambda order: {})
    for name in ("_corpus_of", "_charge", "_record_plan", "_train", "_finish"):
        monkeypatch.setattr(blind, name, lambda *args, **options: None)
    blind._drive(Storage(str(tmp_path)), "ray", blind._begin_check("ray", None))
    names = ["check_model", "check_model", "export_model"]
    assert asked == [(name, frozenset({"blind"})) for name in names]


def test_a_run_whose_last_steps_were_passed_over_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Storage(str(tmp_path / "bad"))
    run.make()
    run.write_json("passed_over.json", [{"first_step": 1, "last_step": 3}])
    assert main(["run", *arguments(tmp_path, write_text(tmp_path / "text"))]) == 0
    assert "plain" in (said := capfd.readouterr().out) and "1 worker, loss –" in said
    state = read_state(run)
    assert (state["status"], state["step"]) == ("finished", 4)
    (finish,) = [event for event in read_events(run) if event["event"] == "finish"]
    assert finish["val_loss"] == state["val_loss"] > 0
    assert "loss" not in finish


def test_a_run_of_an_older_version_keeps_its_model_from_now_on(tmp_path: Path) -> None:
    """One that has its fields keeps those."""
    manifest = make_corpus(tmp_path / "text")
    config = make_config(tmp_path, manifest)
    driver, run = Coordinator(config, SimpleNamespace(say=lambda text: None)), run_storage(config)
    run.make()
    driver._record_plan(run, manifest, {"hidden_act": "silu"})
    plan = run.read_json("plan.json")
    run.write_json("plan.json", {name: plan[name] for name in plan.keys() - {"model"}})
    for given in ("silu", "relu"):
        driver._record_plan(run, manifest, {"hidden_act": given})
        assert run.read_json("plan.json") == plan
