"""Checkpoints: commit, verify, fall back, keep. One process; test_runs has several ranks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tst_ray.checkpoint import (
    MARKER,
    META,
    committed,
    find_good,
    folder_name,
    read_meta,
)
from tst_ray.checkpointer import Checkpointer
from tst_ray.errors import RunError
from tst_ray.sharded import read_full, write
from tst_ray.storage import Storage
from tst_ray.timeouts import STORAGE_S


class Events(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, **details: Any) -> None:
        self.append((kind, details))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


def make_state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((40, 3), float(step)), "b": torch.arange(5) + step}}


def checkpointer(root: Storage, events: Events, **options: Any) -> Checkpointer:
    return Checkpointer(root, **{"keep": 3, "background": True, "on_event": events, **options})


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints"))


def save_steps(root: Storage, *steps: int, **options: Any) -> Events:
    events = Events()
    saver = checkpointer(root, events, **options)
    for step in steps:
        saver.save(step, make_state(step), {"data_tokens": step * 7})
    saver.wait()
    return events


def restored(root: Storage, events: Events) -> tuple[int, dict[str, Any]]:
    state = make_state(0)
    saver = checkpointer(root, events)
    info = find_good([root], events)
    if info is None:
        return 0, state
    saver.load(info, state)
    return info.step, state


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_restored(root: Storage, background: bool) -> None:
    events = save_steps(root, 10, background=background)
    step, state = restored(root, Events())
    assert step == 10
    assert torch.equal(state["model"]["w"], make_state(10)["model"]["w"])
    assert torch.equal(state["model"]["b"], make_state(10)["model"]["b"])
    assert events.kinds() == ["checkpoint"]
    assert events[0][1]["bytes"] > 0
    assert read_meta(committed(root)[0]).meta["data_tokens"] == 70


def test_the_state_may_change_once_save_returns(root: Storage) -> None:
    state = make_state(10)
    saver = checkpointer(root, Events())
    saver.save(10, state, {})
    state["model"]["w"].fill_(-1.0)
    saver.wait()
    assert torch.equal(restored(root, Events())[1]["model"]["w"], make_state(10)["model"]["w"])


def test_nothing_committed_is_step_0(root: Storage) -> None:
    assert restored(root, Events())[0] == 0


def test_without_its_marker_a_checkpoint_does_not_exist(root: Storage) -> None:
    save_steps(root, 10, 20)
    (root / folder_name(20)).remove(MARKER)
    assert [info.step for info in committed(root)] == [10]
    assert restored(root, Events())[0] == 10


def data_file(folder: Storage) -> Path:
    return next(Path(folder.path).glob("*.distcp"))


def cut(folder: Storage) -> None:
    path = data_file(folder)
    path.write_bytes(path.read_bytes()[:-3])


def flip(folder: Storage) -> None:
    path = data_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def lose(folder: Storage) -> None:
    data_file(folder).unlink()


def forge(folder: Storage) -> None:
    path = Path(folder.at(META))
    path.write_text(path.read_text().replace('"world_size": 1', '"world_size": 2'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "bytes instead of"),
        (flip, "another checksum"),
        (lose, "is missing"),
        (forge, "not the one that was committed"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    root: Storage, damage: Callable[[Storage], None], said: str
) -> None:
    save_steps(root, 10, 20)
    damage(root / folder_name(20))
    events = Events()
    step, state = restored(root, events)
    assert step == 10
    assert torch.equal(state["model"]["w"], make_state(10)["model"]["w"])
    assert events.kinds() == ["checkpoint_damaged"]
    assert events[0][1]["step"] == 20
    assert said in events[0][1]["problem"]


def test_a_damaged_one_that_cannot_be_marked_is_passed_by_all_the_same(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(root, 10, 20)
    flip(root / folder_name(20))
    events = Events()

    def full(self: Storage, *args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Storage, "write", full)
    monkeypatch.setattr(Storage, "remove", full)
    info = find_good([root], events)
    assert info is not None and info.step == 10
    assert events.kinds() == ["checkpoint_damaged"]


def test_all_damaged_is_an_error_never_step_0(root: Storage) -> None:
    save_steps(root, 10, 20)
    for step in (10, 20):
        flip(root / folder_name(step))
    with pytest.raises(RunError, match=r"all 2 checkpoints .* damaged, 20 steps would be lost"):
        find_good([root], Events())


def test_damaged_copies_alone_are_told_and_done_without(root: Storage) -> None:
    """Before the first checkpoint in storage a run has nothing to lose but its copies in memory."""
    save_steps(root, 10)
    flip(root / folder_name(10))
    events = Events()
    assert find_good([root, Storage(f"{root.url}-in-storage")], events) is None
    assert events.kinds() == ["checkpoint_damaged"]
    with pytest.raises(RunError, match="all 1 checkpoints"):
        find_good([Storage(f"{root.url}-in-storage"), root], Events())


def test_the_last_ones_are_kept(root: Storage) -> None:
    save_steps(root, 10, 20, 30, 40, keep=2)
    assert root.names() == [folder_name(30), folder_name(40)]


def test_the_last_ones_are_kept_where_the_steps_get_a_digit_more(root: Storage) -> None:
    save_steps(root, 99_999_999, 100_000_000, 100_000_001, keep=2)
    assert root.names() == [folder_name(100_000_000), folder_name(100_000_001)]


def test_leftovers_of_an_interrupted_save_go(root: Storage) -> None:
    (root / folder_name(5)).write("half.distcp", b"x")
    save_steps(root, 10)
    assert root.names() == [folder_name(10)]


def test_the_same_step_can_be_saved_again_after_an_interruption(root: Storage) -> None:
    (root / folder_name(10)).write("__0_0.distcp", b"half")
    save_steps(root, 10)
    assert restored(root, Events())[0] == 10


def test_files_that_storage_does_not_have_are_not_committed(
    root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose node has not mounted the shared folder writes to one of its own."""
    save_steps(root, 10)
    own = tmp_path / "own"
    own.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(
            "tst_ray.sharded.write", lambda staged, folder, group: write(staged, own, group)
        )
        (told,) = save_steps(root, 20, keep=1)
    assert told[0] == "checkpoint_failed" and "is missing" in told[1]["error"]
    assert restored(root, Events())[0] == 10
    assert save_steps(root, 20).kinds() == ["checkpoint"]


def test_a_failed_save_is_an_event_and_the_next_one_works(root: Storage) -> None:
    events = Events()
    saver = checkpointer(root, events)
    saver.save(10, make_state(10), {})
    saver.wait()
    blocker = Path(root.path) / folder_name(20)
    saver.root = Storage(str(Path(root.path) / folder_name(10) / MARKER))  # a file, not a folder
    saver.save(20, make_state(20), {})
    saver.wait()
    assert saver.failed_saves == 1
    saver.root = root
    saver.save(30, make_state(30), {})
    saver.wait()
    assert events.kinds() == ["checkpoint", "checkpoint_failed", "checkpoint"]
    assert saver.failed_saves == 0
    assert not blocker.exists()
    assert restored(root, Events())[0] == 30


def test_a_remote_filesystem_works_the_same() -> None:
    root = Storage("memory://bucket/checkpoints")
    root.remove()
    save_steps(root, 10, 20)
    assert restored(root, Events())[0] == 20
    state = make_state(0)
    read_full(committed(root)[0].folder, state)
    assert torch.equal(state["model"]["w"], make_state(20)["model"]["w"])
    root.remove()


def unreadable(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Storage fails whenever a file of these checkpoints is to be read."""
    original = Storage.sha256

    def sha256(self: Storage, name: str) -> str:
        if any(self.url.endswith(folder_name(step)) for step in steps):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, name)

    monkeypatch.setattr(Storage, "sha256", sha256)
    for name in ("_PATIENCE_S", "_SHORT_PATIENCE_S"):
        monkeypatch.setattr(f"tst_ray.checkpoint.{name}", 0.0)


def test_one_that_cannot_be_read_now_is_passed_by_and_not_called_damaged(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(root, 10, 20)
    events = Events()
    with monkeypatch.context() as trouble:
        unreadable(trouble, 20)
        info = find_good([root], events)
    assert info is not None and info.step == 10
    assert events.kinds() == ["checkpoint_unreadable"]
    assert [info.step for info in committed(root)] == [20, 10]
    info = find_good([root], Events())
    assert info is not None and info.step == 20


def test_only_rank_0_lists(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds would ask storage for the same; and what they see may be older."""

    class Second:
        rank, size = 1, 2

        def gather(self, value: Any) -> list[Any]:
            return [([], 0), value]

    def names(storage: Storage) -> list[str]:
        raise AssertionError("lists")

    monkeypatch.setattr(Storage, "names", names)
    assert find_good([root], Events(), Second()) is None  # type: ignore[arg-type]


def test_one_that_can_be_read_after_a_while_is_taken(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(root, 10)
    original, failures = Storage.sha256, [OSError(errno.EIO, "Input/output error")] * 2

    def sha256(self: Storage, name: str) -> str:
        if failures:
            raise failures.pop()
        return original(self, name)

    monkeypatch.setattr(Storage, "sha256", sha256)
    events = Events()
    info = find_good([root], events)
    assert info is not None and info.step == 10
    assert (failures, events) == ([], [])


def test_one_in_storage_is_waited_for_as_long_as_a_run_waits_for_storage(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To go on from the one before repeats steps; copies in memory are only a shorter way."""
    save_steps(root, 10, 20)
    waited: list[float] = []

    def ask(action: Callable[[], Any], patience_s: float) -> Any:
        waited.append(patience_s)
        return action()

    copies = Storage(f"{root.url}-copies")
    save_steps(copies, 20, 30)
    unreadable(monkeypatch, 10, 20, 30)
    for name, patience_s in (("_PATIENCE_S", STORAGE_S), ("_SHORT_PATIENCE_S", 15.0)):
        monkeypatch.setattr(f"tst_ray.checkpoint.{name}", patience_s)
    monkeypatch.setattr("tst_ray.checkpoint.patiently", ask)
    with pytest.raises(OSError, match="no good checkpoint can be read now"):
        find_good([copies, root], Events())
    assert waited == [15.0, 15.0, STORAGE_S, 15.0]


def test_storage_that_is_down_is_no_reason_to_give_checkpoints_up(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RunError would end the run; another attempt may find storage well."""
    save_steps(root, 10, 20)
    flip(root / folder_name(20))
    unreadable(monkeypatch, 10)
    with pytest.raises(OSError, match=r"no good checkpoint can be read now.*Input/output error"):
        find_good([root], Events())


def test_a_save_may_leave_the_older_ones_alone(root: Storage) -> None:
    saver = checkpointer(root, Events(), keep=1)
    saver.save(10, make_state(10), {})
    saver.save(20, make_state(20), {}, prune=False)
    saver.wait()
    assert [info.step for info in committed(root)] == [20, 10]
