"""The run directory: one driver, one config, nothing overwritten."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tst_ray.config import load_config
from tst_ray.errors import ConfigError, RunError
from tst_ray.journal import read_state, update_state
from tst_ray.runstore import Overtaken, hold, needed_everywhere, open_run, run_storage
from tst_ray.storage import Storage


def make_config(tmp_path: Path, *overrides: str):
    return load_config(None, [f"--run.storage={tmp_path}", *overrides])


def test_the_config_is_written_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_run(config) as (run, _):
        first = run.read("config.yaml")
        run.write("plan.json", "{}")
    with open_run(make_config(tmp_path, "--checkpoint.every=7")) as (run, _):
        assert run.read("config.yaml") == first


def test_another_config_is_refused_with_the_fields_and_nothing_changes(tmp_path: Path) -> None:
    with open_run(make_config(tmp_path)) as (run, _):
        before = run.read("config.yaml")
        run.write("plan.json", "{}")
    other = make_config(tmp_path, "--train.batch_size=8", "--run.seed=3")
    with pytest.raises(ConfigError) as caught, open_run(other):
        pass
    message = str(caught.value)
    assert "train.batch_size" in message and "16" in message and "8" in message
    assert "run.seed" in message
    assert run.read("config.yaml") == before


def test_what_was_refused_before_it_began_binds_nobody(tmp_path: Path) -> None:
    """A wrong path, corrected, must not be taken for another run."""
    with open_run(make_config(tmp_path, "--data.sources=[tezt]")):
        pass
    with open_run(make_config(tmp_path, "--data.sources=[text]")) as (run, _):
        assert b"tezt" not in run.read("config.yaml")


def test_a_second_driver_is_refused_and_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with open_run(config) as (run, _):
        code = (
            "from tst_ray.runstore import hold\nfrom tst_ray.storage import Storage\n"
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
        "import sys, time\nfrom tst_ray.runstore import hold\nfrom tst_ray.storage import Storage\n"
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
    refusal = pytest.raises(RunError, match=r"another driver .* try again in \d+ seconds")
    with hold(run), refusal, hold(run):
        pass
    with hold(run):
        pass


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
    refusal = pytest.raises(RunError, match=r"another driver .* try again in \d+ seconds")
    with hold(run), refusal, hold(run):
        pass
    with hold(run):
        pass


def test_a_lock_and_a_lease_keep_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two machines that mount the same folder, one may have locks."""
    run = Storage(str(tmp_path))
    with hold(run), monkeypatch.context() as patch:
        patch.setattr("tst_ray.runstore._has_locks", lambda run: False)
        refusal = pytest.raises(RunError, match=r"if its machine is gone, remove .*driver\.lock")
        with refusal, hold(run):
            pass
    run.remove("driver.lock")
    with monkeypatch.context() as patch:
        patch.setattr("tst_ray.runstore._has_locks", lambda run: False)
        with hold(run):
            patch.undo()
            with pytest.raises(RunError, match="another driver"), hold(run):
                pass
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


# -- what a run needs on every node ---------------------------------------------------------------


def needed(place: Path, *overrides: str, storage: str = "runs", **plan: str) -> dict[str, str]:
    """The files that all nodes must see, relative to a folder where they are below it."""
    url = storage if "://" in storage else f"{place}/{storage}"
    config = load_config(None, ["--run.name=a", f"--run.storage={url}", *overrides])
    run = run_storage(config)
    if plan:
        run.make()
        run.write_json("plan.json", plan)
    found = needed_everywhere(run, config)
    assert all(Path(path).exists() for path in found if not path.endswith("config.yaml"))
    return {path.removeprefix(f"{place}/"): setting for path, setting in found.items()}


RUN = {"runs/a/config.yaml": "run.storage"}


def test_shards_below_the_storage_are_seen_with_it(tmp_path: Path) -> None:
    assert needed(tmp_path) == RUN
    assert needed(tmp_path, f"--data.cache={tmp_path}/runs/deep/cache") == RUN


def test_shards_elsewhere_must_be_seen_too(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").touch()
    prepared = f"--data.prepared={tmp_path}/prepared"
    shards = {"prepared/manifest.json": "data.prepared"}
    assert needed(tmp_path, prepared) == RUN | shards
    far = {"memory://bucket/runs/a/config.yaml": "run.storage"}  # its package may be missing
    assert needed(tmp_path, prepared, storage="memory://bucket/runs") == far | shards
    assert needed(tmp_path, "--data.prepared=memory://bucket/prepared") == RUN
    assert needed(tmp_path, f"--data.prepared={tmp_path}/nowhere") == RUN, "that is told elsewhere"


def test_a_folder_for_shards_to_come_has_a_file_to_be_seen(tmp_path: Path) -> None:
    seen = {"cache/.seen": "data.cache"}
    assert needed(tmp_path, f"--data.cache={tmp_path}/cache") == RUN | seen
    (tmp_path / "file").touch()
    assert needed(tmp_path, f"--data.cache={tmp_path}/file/cache") == RUN, "that is told elsewhere"
    # What only looks as if it were below the storage, too.
    (tmp_path / "runs").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs" / "shards").symlink_to(tmp_path / "disk")
    assert needed(tmp_path) == RUN | {"runs/shards/.seen": "data.cache"}


def test_a_run_that_has_begun_needs_the_shards_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "manifest.json").touch()
    began_with = {"before/manifest.json": "data.cache"}
    assert needed(tmp_path, shards=f"{tmp_path}/before") == RUN | began_with
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "manifest.json").touch()
    copied = f"--data.prepared={tmp_path}/copied"
    now = {"copied/manifest.json": "data.prepared"}
    assert needed(tmp_path, copied, shards=f"{tmp_path}/before") == RUN | now


def test_a_run_whose_cache_has_moved_needs_the_shards_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("before", "now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    monkeypatch.setattr("tst_ray.runstore.shards_folder", lambda config: f"{tmp_path}/now")
    moved = {"now/manifest.json": "data.cache"}
    assert needed(tmp_path, shards=f"{tmp_path}/before") == RUN | moved


def test_a_models_folder_must_be_seen_but_not_what_is_fetched(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    assert needed(tmp_path, f"--model={tmp_path}/model") == RUN | {"model": "model.source"}
    assert needed(tmp_path, "--model=paper-270m") == RUN


def test_a_driver_whose_lease_was_taken_says_so_and_does_not_renew_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was suspended, say, for longer than its lease lasts."""
    monkeypatch.setattr("tst_ray.runstore._RENEW_S", 0.01)
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
        monkeypatch.setattr("tst_ray.runstore.time.time", lambda: now + 61.0)
        with pytest.raises(Overtaken, match="another driver"):
            held.check()


def test_what_storage_says_late_is_no_loss_of_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Storage("memory://bucket/late")
    run.remove()
    with hold(run) as held:
        now = time.time()
        monkeypatch.setattr("tst_ray.runstore.time.time", lambda: now + 61.0)
        with monkeypatch.context() as trouble:
            trouble.setattr(Storage, "read", fail)
            held.check()
        held.check()
        assert run.read_json("driver.lock")["renewed"] == now + 61.0


def fail(*args: Any) -> None:
    raise OSError("503")
