"""What people and programs read of a run while it trains, and after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_runs import write_text
from tests.tiny import MODEL, SETTINGS
from tst_ray import checkpoint, report
from tst_ray.checkpoint import CheckpointInfo, remove
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.coordinator import Outcome
from tst_ray.display import Terminal, plain_console
from tst_ray.goodput import Account
from tst_ray.journal import read_state
from tst_ray.liveness import driver_state
from tst_ray.plan import build_plan
from tst_ray.preview import plan_facts, print_plan
from tst_ray.report import (
    checkpoint_facts,
    print_checkpoints,
    print_status,
    print_summary,
    status_facts,
)
from tst_ray.storage import Storage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A run of 8 steps in this process, by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    settings = SETTINGS | {
        "model.config": MODEL,
        "data.sources": write_text(folder / "text"),
        "data.vocab_size": 300,
        "data.row_tokens": 512,
        "data.validation_share": 0.1,
        "run.storage": folder,
        "run.name": "tiny",
    }
    assert main(["run", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    return Storage(str(folder / "tiny"))


def test_status_says_where_the_time_went(
    finished: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", finished.url, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["status"], facts["step"], facts["world_size"]) == ("finished", 8, 1)
    assert facts["newest_checkpoint"] == 8
    assert facts["newest_checkpoint_checked"] == "checksums"
    assert facts["time_s"]["stepping"] > 0
    assert facts["time_s"]["closing"] > 0
    assert sum(facts["time_s"].values()) == pytest.approx(facts["wall_s"], abs=0.01)
    before = read_state(finished)["time"]["parts"]  # told to the millisecond, kept to more
    assert facts["goodput"] == pytest.approx(before["stepping"] / sum(before.values()), abs=1e-4)
    assert main(["status", finished.url]) == 0
    said = capsys.readouterr().out
    assert "goodput" in said and "newest checkpoint: step 8" in said
    assert read_state(finished)["time"]["parts"] == before


@pytest.mark.parametrize("status", ["starting", "running"])
def test_status_does_not_take_a_dead_run_for_one_at_work(
    finished: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str
) -> None:
    """A killed driver leaves what it wrote last behind."""
    shutil.copytree(finished.path, tmp_path / "killed")
    run = Storage(str(tmp_path / "killed"))
    for silent_s, dead in ((60, False), (3600, True)):
        state = read_state(run) | {
            "status": status,
            "step": 6,
            "updated": time.time() - silent_s,
        }
        run.write_json("run.json", state)
        assert main(["status", run.url]) == 0
        said = capsys.readouterr().out
        assert ("no news of it for 1:00:0" in said) is dead
        assert ("left" in said) is (not dead and status == "running")


def test_status_says_loss_and_speed(finished: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    facts = status_facts(finished)
    last = finished.read_lines("metrics.jsonl")[-1]
    assert (facts["loss"], facts["val_loss"]) == (last["loss"], last["val_loss"])
    plain = [r["step_time_s"] for r in finished.read_lines("metrics.jsonl") if r["phase"] == 1]
    assert facts["steps_per_s"] == pytest.approx(len(plain) / sum(plain), rel=0.01)
    assert facts["tokens_per_s"] == last["tokens_per_s"]
    print_status(facts)
    said = capsys.readouterr().out
    assert f"loss {last['loss']:.3f}, validation loss {last['val_loss']:.3f}, " in said
    assert " steps/s, " in said and " tokens/s" in said


def test_people_count_phases_from_one_and_programs_from_zero(
    finished: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = status_facts(finished)
    facts["last_events"] = [
        {"time": 0.0, "event": "phase_start", "phase": number} for number in (0, 1)
    ]
    assert (facts["phase"], facts["last_record"]["phase"]) == (1, 1)
    print_status(facts)
    said = capsys.readouterr().out
    assert "phase 2, step 8 of 8" in said
    assert "phase_start  phase 1\n" in said and "phase_start  phase 2\n" in said


def test_status_sees_at_once_that_a_driver_here_has_ended(
    finished: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path, tmp_path / "killed")
    run = Storage(str(tmp_path / "killed"))
    run.write_json("run.json", read_state(run) | {"status": "running", "updated": time.time()})
    code = (
        "import sys\nfrom tst_ray.hold import hold\nfrom tst_ray.storage import Storage\n"
        "with hold(Storage(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, run.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert driver.stdout and driver.stdout.readline() == b"held\n"
    assert status_facts(run)["driver"] == "running"
    driver.kill()
    os.waitid(os.P_PID, driver.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for it
    assert status_facts(run)["driver"] == "gone"
    driver.wait()
    assert main(["status", run.url]) == 0
    said = capsys.readouterr().out
    assert "not running: its driver has ended; the same command resumes it" in said
    assert "no news" not in said and "left" not in said
    owner = run.read_json("driver.lock") or {}
    for change, state in (
        ({"pid": os.getpid(), "since": time.time()}, "running"),
        ({"pid": os.getpid(), "since": time.time() - 10**6}, "gone"),  # it got that number later
        ({"host": "elsewhere"}, None),
        ({"pids": "pid:[1]"}, None),
    ):
        run.write_json("driver.lock", owner | change)
        assert driver_state(run) == state, change
    run.write("driver.lock", "")
    assert driver_state(run) is None


def test_a_run_that_knows_its_text_by_heart_is_told_so(
    finished: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = build_plan(load_config(None, ["--train.steps=100"]))
    val_loss = 0.9 + max(record["loss"] for record in finished.read_lines("metrics.jsonl"))
    for counts, warned in (({"web": 0.3, "notes": 57.2}, True), ({"web": 2.0}, False)):
        outcome = Outcome(finished, plan, {}, val_loss, "", (), None, Account(0.0), counts)
        print_summary(outcome, plain_console())
        said = capsys.readouterr().out
        assert ("in 57.2 passes the model has learnt the text by heart" in said) is warned


def test_checkpoints_are_listed_and_verified(
    finished: Storage, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    run = Path(shutil.copytree(finished.path, tmp_path / "run"))
    (run / "checkpoints" / "notes.txt").write_text("not a checkpoint")
    assert main(["checkpoints", str(run), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(c["step"], c["state"], c["checked"]) for c in found] == [
        (8, "committed", "checksums"), (6, "committed", "checksums"), (3, "committed", "checksums"),
    ]  # fmt: skip
    file = next((run / "checkpoints" / "step-00000006").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    (run / "checkpoints" / "step-00000003" / "COMMITTED").unlink()
    assert main(["checkpoints", str(run), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "damaged" in said and "another checksum" in said and "uncommitted" in said
    for marker in run.glob("checkpoints/*/COMMITTED"):
        marker.write_text("x")
    assert main(["checkpoints", str(run)]) == 1
    assert "checkpoints is good" in capsys.readouterr().err
    assert main(["checkpoints", str(tmp_path)]) == 1
    assert "not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_checkpoint_that_is_pruned_while_it_is_looked_at_is_no_damage(
    finished: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A run that trains removes its oldest."""
    shutil.copytree(finished.path, tmp_path / "run")
    run = Storage(str(tmp_path / "run"))
    read: list[int] = []

    def prune(info: CheckpointInfo, at: str) -> None:
        if at == when and info.step == 3:
            remove(info.folder)

    def meta(info: CheckpointInfo, key: bytes | None) -> CheckpointInfo:
        read.append(info.step)
        prune(info, "before")
        return checkpoint.read_meta(info)

    def verified(info: CheckpointInfo, contents: bool, key: bytes | None) -> str | None:
        prune(info, "while")
        problem = checkpoint.verify(info, contents=contents)
        prune(info, "after")
        return problem

    monkeypatch.setattr(report, "read_meta", meta)
    monkeypatch.setattr(report, "verify", verified)
    found = [(facts["step"], facts["state"]) for facts in checkpoint_facts(run, verify_all=True)]
    there = [(8, "committed"), (6, "committed"), (3, "committed")]
    assert found == (there if when == "after" else there[:2])
    assert read == [8, 6, 3], "more than once"
    assert status_facts(run)["newest_checkpoint"] == 8


def test_what_rich_takes_for_markup_is_shown_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Folders and sources are named by people."""
    config = load_config(None, ["--train.steps=100"])
    run, name = Storage(str(tmp_path / "[old] :smile:")), "[old] :smile:"
    outcome = Outcome(
        run, build_plan(config), {}, None, f"{run.url}/model", (), None, Account(0.0), {}
    )
    terminal = Terminal()
    terminal.say(name)
    print_summary(outcome, terminal.console)
    assert capfd.readouterr().out.count(name) == 4
    facts = plan_facts(config)
    for phase in facts["phases"]:
        phase |= {
            "epochs_after": {name: 0.5},
            "tail_tokens": {name: 5},
            "dropped_tokens": {name: 0},
        }
    print_plan({**facts, "corpus": {"mixture": {name: 0.5, "other": 0.5}}})
    assert capfd.readouterr().out.count(name) == 3
    print_checkpoints([{"step": 3, "state": "damaged", "checked": "sizes", "problem": name}])
    assert name in capfd.readouterr().out
    run.write_json("run.json", {"status": "finished", "step": 3, "updated": 0.0})
    print_status(status_facts(run))
    assert name in capfd.readouterr().out
