"""The command line of fault injection."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from cluster.chaos import (
    KINDS,
    main,
    schedule,
)
from tests.chaos import PATIENCE_S, problem, reach, save_checkpoint, sleeper, start_run
from tst_ray.checkpoint import committed
from tst_ray.storage import Storage


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def trained(tmp_path: Path) -> Storage:
    """A run that has not taken a step."""
    return start_run(Storage(str(tmp_path / "run")))


def test_a_dry_run_prints_the_schedule_and_does_nothing(
    trained: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = sleeper()
    try:
        start_run(trained, 9, pid=driver.pid)
        folder = save_checkpoint(trained, 8)
        options = ["--seed", "3", "--faults", "8", "--first-step", "1", "--kinds", *KINDS]
        before = sorted(Path(trained.path).rglob("*"))
        free = os.statvfs(trained.path).f_bfree
        assert main([trained.path, *options]) == 0
        assert driver.poll() is None
        assert problem(folder) is None
        assert sorted(Path(trained.path).rglob("*")) == before
        assert os.statvfs(trained.path).f_bfree > free // 2
    finally:
        driver.kill()
        driver.wait()
    said = capsys.readouterr()
    assert "nothing is done without --really" in said.err
    lines = said.out.splitlines()
    faults = schedule(3, 8, 1, 40, KINDS)
    assert [line.split()[1:3] for line in lines] == [[str(f.at_step), f.kind] for f in faults]
    for line, fault in zip(lines, faults, strict=True):
        shown = {
            "damage_checkpoint": folder.url,
            "fill_disk": "bytes free",
            "kill_driver": f"process {driver.pid}",
            "add_node": "skipped: no program can order a node here",
        }
        assert shown.get(fault.kind, "skipped: needs a cluster; give its --address") in line


def test_a_schedule_goes_from_the_next_step_to_the_last(
    trained: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    reach(trained, 30)
    assert main([trained.path, "--faults", "10", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["step"] for record in records] == list(range(31, 41))
    assert {record["outcome"] for record in records} <= {"skipped", "waits"}


def test_with_really_it_is_done(trained: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    driver = sleeper()
    try:
        start_run(trained, 9, pid=driver.pid)
        folder = save_checkpoint(trained, 8)
        options = ["--faults=2", "--first-step=1", "--last-step=9", "--really"]
        assert main([trained.path, *options, "--kinds", "damage_checkpoint", "kill_driver"]) == 0
        assert driver.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        assert not committed(trained / "checkpoints") or problem(folder) is not None
    finally:
        driver.kill()
        driver.wait()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_it_ends_with_the_run(trained: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    trained.write_json("run.json", {"status": "finished", "updated": time.time() + 60})
    assert main([trained.path, "--kinds", "kill_driver", "--faults=3", "--really"]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "the run ended before 3 of the faults" in said.err


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_users_mistakes_are_one_line_and_a_status(
    trained: Storage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        text = capsys.readouterr().err
        assert text.startswith("chaos: ") and text.count("\n") == 1
        return text

    assert main([str(trained.url) + "-not"]) == 2
    assert "there is no run" in said()
    assert main([trained.path, "--faults=41"]) == 2
    assert "41 faults need as many steps" in said()
    assert main([trained.path, f"--address=127.0.0.1:{unused_port()}"]) == 1
    assert "no Ray cluster answers there" in said()
    assert main([trained.path, "--address=auto"]) == 1
    assert "no Ray cluster answers there" in said()
    assert main([trained.path, "--really"]) == 2
    assert "kill_worker" in said()
    address = f"127.0.0.1:{unused_port()}"
    trained.write_json("run.json", {"status": "running", "ray_address": address})
    assert main([trained.path, "--really"]) == 1
    assert f"{address}: no Ray cluster answers there" in said()
    trained.remove("plan.json")
    assert main([trained.path]) == 2
    assert "give --last-step" in said()
    with pytest.raises(SystemExit, match="2"):
        main([trained.path, "--kinds", "meteor"])
