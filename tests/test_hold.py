"""Who drives a run: one driver at a time, on any storage."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.test_runstore import make_config
from tst_ray.errors import RunError
from tst_ray.hold import Overtaken, hold
from tst_ray.runstore import open_run
from tst_ray.storage import Storage


def refused(run: Storage, told: str) -> None:
    """Another driver gets no hold, and is told why."""
    with pytest.raises(RunError, match=told), hold(run):
        pass


def test_a_second_driver_is_refused_and_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_run(config) as (run, _):
        code = (
            "from tst_ray.hold import hold\nfrom tst_ray.storage import Storage\n"
            f"with hold(Storage({run.url!r})): print('held')"
        )
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode != 0
    assert "another driver holds this run (process" in second.stderr
    assert f"if its machine is gone, remove {run.at('driver.lock')}" in second.stderr
    assert "held" not in second.stdout
    with open_run(config):
        pass


def test_a_killed_drivers_hold_is_gone_at_once(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    run.make()
    code = (
        "import sys, time\nfrom tst_ray.hold import hold\nfrom tst_ray.storage import Storage\n"
        f"with hold(Storage({run.url!r})):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    assert first.stdout.readline().strip() == "held"
    first.kill()
    first.wait()
    with hold(run):
        pass


def test_on_remote_storage_a_lease_keeps_others_out_until_it_ends() -> None:
    run = Storage("memory://bucket/leased")
    run.remove()
    with hold(run):
        refused(run, r"another driver .* try again in \d+ seconds")
    with hold(run):
        pass


def test_a_driver_that_has_not_said_who_it_is_is_no_reason_to_remove_anything(
    tmp_path: Path,
) -> None:
    """It has the lock, and is about to write who it is, or has just taken that back."""
    run = Storage(str(tmp_path))
    with hold(run):
        assert run.read_json("driver.lock")["pids"] == os.readlink("/proc/self/ns/pid")
        Path(run.at("driver.lock")).write_text("{}")
        refused(run, "another driver is just starting or ending; try again$")


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_shared_folder_without_locks_is_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """NFS without its lock daemon, Lustre mounted without flock."""
    run = Storage(str(tmp_path))
    refuse_locks(monkeypatch, number)
    with hold(run):
        refused(run, r"another driver .* try again in \d+ seconds")
    with hold(run):
        pass


def test_a_lock_and_a_lease_keep_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two machines that mount the same folder, one may have locks."""
    run = Storage(str(tmp_path))
    with hold(run), monkeypatch.context() as patch:
        patch.setattr("tst_ray.hold._has_locks", lambda run: False)
        refused(run, r"if its machine is gone, remove .*driver\.lock")
    assert run.read_json("driver.lock") == {}, "who ended holds it no more"
    with monkeypatch.context() as patch:
        patch.setattr("tst_ray.hold._has_locks", lambda run: False)
        with hold(run):
            patch.undo()
            refused(run, "another driver")
    with hold(run):
        pass


def test_what_else_keeps_a_lock_from_being_taken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), hold(Storage(str(tmp_path))):
        pass


def test_a_stale_lease_is_taken_over() -> None:
    run = Storage("memory://bucket/stale")
    run.write_json("driver.lock", {"id": "x", "host": "gone", "pid": 1, "renewed": 0.0})
    with hold(run):
        assert run.read_json("driver.lock")["host"] != "gone"


def test_a_driver_whose_lease_was_taken_says_so_and_does_not_renew_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was suspended, say, for longer than its lease lasts."""
    monkeypatch.setattr("tst_ray.hold._RENEW_S", 0.01)
    run = Storage("memory://bucket/taken")
    run.remove()
    with hold(run) as held:
        held.check()
        theirs = {"id": "other", "host": "elsewhere", "pid": 7, "renewed": time.time()}
        run.write_json("driver.lock", theirs)
        deadline = time.monotonic() + 60.0
        with pytest.raises(Overtaken, match=r"another driver .*process 7 on elsewhere"):
            while time.monotonic() < deadline:
                held.check()
    assert run.read_json("driver.lock") == theirs


def test_a_driver_that_wakes_looks_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Storage("memory://bucket/woken")
    run.remove()
    with hold(run) as held:
        run.write_json("driver.lock", {"id": "other", "renewed": time.time()})
        held.check()  # renewed just now, so it is not looked
        now = time.time()
        monkeypatch.setattr("tst_ray.hold.time.time", lambda: now + 61.0)
        with pytest.raises(Overtaken, match="another driver"):
            held.check()


def test_what_storage_says_late_is_no_loss_of_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Storage("memory://bucket/late")
    run.remove()
    with hold(run) as held:
        now = time.time()
        monkeypatch.setattr("tst_ray.hold.time.time", lambda: now + 61.0)
        with monkeypatch.context() as trouble:
            trouble.setattr(Storage, "read", fail)
            held.check()
        held.check()
        assert run.read_json("driver.lock")["renewed"] == now + 61.0


def fail(*args: Any) -> None:
    raise OSError("503")
