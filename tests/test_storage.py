"""Storage: the same promises on a local disk and on a filesystem without folders."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipelines.storage import absolute
from tst_ray.cli import main
from tst_ray.errors import RunError
from tst_ray.storage import Storage, patiently


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "run"))
    storage = Storage("memory://bucket/run")
    storage.remove()
    return storage


@pytest.mark.parametrize(
    ("url", "spelt"),
    [
        ("s3://bucket/runs/", "s3://bucket/runs"),
        ("memory://bucket//", "memory://bucket"),
        ("file:///runs/", "file:///runs"),
        ("file:///", "file:///"),
        ("/runs/", "/runs"),
    ],
)
def test_a_slash_at_the_end_of_an_address_is_not_part_of_it(url: str, spelt: str) -> None:
    assert absolute(url) == spelt
    if not url.startswith("s3"):  # its package is not installed here
        storage = Storage(url)
        assert storage.url == spelt and storage.location("a") == f"{spelt}/a"
        assert (storage / "a").url == f"{spelt}/a"


def test_the_home_of_nobody_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"^~nosuch/x: cannot be opened \(nobody has the home"):
        Storage("~nosuch/x")
    assert main(["run", "--run.storage=~nosuch/x", "--cluster.backend=inline"]) == 1
    assert capsys.readouterr().err.startswith("tst-ray: ~nosuch/x: cannot be opened")


@pytest.mark.parametrize(
    ("umask", "modes"),
    [
        (0o022, ["0o644", "0o640", "0o755", "0o750"]),
        (0o002, ["0o664", "0o660", "0o775", "0o770"]),
        (0o077, ["0o600", "0o600", "0o700", "0o700"]),
    ],
)
def test_what_is_private_is_for_the_user_and_the_group(
    tmp_path: Path, umask: int, modes: list[str]
) -> None:
    storage, before = Storage(str(tmp_path / "run")), os.umask(umask)
    try:
        storage.write("open", b"")
        storage.write("private", b"")
        storage.write("private", b"again", private=True)
        (storage / "open-folder").make()
        (storage / "private-folder").make(private=True)
        (storage / "private-folder").make(private=True)
    finally:
        os.umask(before)
    names = ("open", "private", "open-folder", "private-folder")
    assert [oct(os.stat(storage.at(name)).st_mode & 0o777) for name in names] == modes
    assert storage.read("private") == b"again"


def test_write_replaces_and_append_adds(storage: Storage) -> None:
    storage.write("a.txt", "one")
    storage.write("a.txt", "two\n")
    storage.append("a.txt", "three\n")
    assert storage.read("a.txt") == b"two\nthree\n"
    assert storage.size("a.txt") == 10
    assert storage.names() == ["a.txt"]


def test_append_makes_the_file(storage: Storage) -> None:
    storage.make()
    storage.append("new.jsonl", '{"a": 1}\n')
    assert storage.read_lines("new.jsonl") == [{"a": 1}]


def test_what_is_missing(storage: Storage) -> None:
    assert storage.names() == []
    assert storage.read_json("run.json") is None
    assert storage.read_lines("metrics.jsonl") == []
    assert storage.tail_records("metrics.jsonl", 100) == []
    assert not storage.exists("x")
    with pytest.raises(FileNotFoundError):
        storage.read("x")


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(storage: Storage) -> None:
    storage.write("m.jsonl", '{"a": 1}\n{"a": 2}\n{"a"')
    assert storage.read_lines("m.jsonl") == [{"a": 1}, {"a": 2}]
    storage.append("m.jsonl", '{"a": 3}\n')
    storage.append("m.jsonl", '{"a": 4}\n')
    assert storage.read_lines("m.jsonl") == [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]


def test_the_tail_holds_whole_records_only(storage: Storage) -> None:
    storage.write("m.jsonl", "".join(f'{{"a": {i}}}\n' for i in range(100)) + '{"a"')
    assert storage.tail_records("m.jsonl", 40) == [{"a": 97}, {"a": 98}, {"a": 99}]
    assert len(storage.tail_records("m.jsonl", 10_000)) == 100


def test_a_damaged_byte_is_of_its_own_line_alone(storage: Storage) -> None:
    lines = [b'{"a": 1, "b": "x"}\n', b'{"a": 2, "b": "\xe5"}\n', b'{"\xe5": 3}\n', b"[4]\n"]
    storage.write("m.jsonl", b"".join([*lines, b'{"a": 5}\n']))
    storage.add("m.jsonl", '{"a": 6}\n')
    for read in (
        storage.read_lines("m.jsonl", ["a"]),
        storage.tail_records("m.jsonl", 1000, ["a"]),
    ):
        assert [record["a"] for record in read] == [1, 2, 5, 6]
    assert storage.read_lines("m.jsonl")[2] == {"\ufffd": 3}
    storage.fold("m.jsonl")
    assert len(storage.read_lines("m.jsonl", ["a"])) == 4


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_lines_are_whole_wherever_the_pieces_end(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("tst_ray.storage._PIECE_BYTES", piece)
    assert list(storage.lines("m.jsonl")) == []
    for end in ("", "torn"):
        storage.write("m.jsonl", f"one\n\nthree\n{end}")
        whole = [b"one\n", b"\n", b"three\n"]
        assert list(storage.lines("m.jsonl")) == whole + [end.encode()] * bool(end)


def test_remove_takes_a_file_or_the_folder(storage: Storage) -> None:
    storage.write("a", b"1")
    (storage / "sub").write("b", b"2")
    storage.remove("a")
    assert storage.names() == ["sub"]
    storage.remove()
    assert not storage.exists()
    storage.remove()


def test_it_travels_to_other_processes(storage: Storage) -> None:
    assert pickle.loads(pickle.dumps(storage / "sub")).url == (storage / "sub").url


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"run\.storage: cannot write to .*/file/run"):
        Storage(str(tmp_path / "file" / "run")).check_writable()


def test_what_cannot_be_looked_at_is_an_error_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write("COMMITTED", "x")

    def stale(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(storage._fs, "info", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        storage.exists("COMMITTED")
    with pytest.raises(OSError, match="Stale file handle"):
        storage.remove("COMMITTED")


def test_what_an_object_stores_library_raises_is_an_oserror(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ServiceUnavailable(Exception):
        pass

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise ServiceUnavailable("503\nand a long story")

    slept: list[float] = []
    monkeypatch.setattr("tst_ray.storage.time.sleep", slept.append)
    for method in ("cat_file", "ls", "size", "makedirs", "put_file", "open"):
        monkeypatch.setattr(storage._fs, method, unavailable)
    for ask in (
        lambda: storage.read("a"),
        lambda: storage.read_json("a"),
        storage.names,
        lambda: storage.size("a"),
        storage.make,
        lambda: storage.upload("a", "b"),
        lambda: storage.sha256("a"),
    ):
        slept.clear()
        with pytest.raises(OSError, match=r"^\S+: 503 and a long story$"):
            ask()
        assert slept == ([] if storage.is_local else [0.5, 2.0])


def test_nothing_is_kept_by_truncating_to_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some object stores take an empty range for the whole object."""
    storage.write("log", "one\ntwo\n")
    cat_file = storage._fs.cat_file

    def ranged(path: str, start: int | None = None, end: int | None = None) -> Any:
        return cat_file(path) if start == end else cat_file(path, start=start, end=end)

    monkeypatch.setattr(storage._fs, "cat_file", ranged)
    storage.truncate("log", 4)
    assert storage.read("log") == b"one\n"
    storage.truncate("log", 0)
    assert storage.read("log") == b""


def test_patience_outlasts_a_failure_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr("tst_ray.storage.time.sleep", sleep)
    monkeypatch.setattr("tst_ray.storage.time.monotonic", lambda: now[0])
    answers: list[Any] = [OSError("503"), OSError("503"), "here"]

    def ask() -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask) == "here"
    assert slept == [0.5, 1.0]
    answers = [OSError("503")] * 1000
    with pytest.raises(OSError, match="503"):
        patiently(ask, patience_s=100.0)
    assert now[0] == 101.5
    slept.clear()
    answers = [FileNotFoundError("gone")]
    with pytest.raises(FileNotFoundError):
        patiently(ask)
    assert slept == []


def test_of_two_who_add_to_a_log_in_the_same_moment_neither_is_lost(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.make()
    storage.add("log.jsonl", '{"n": 1}\n')
    other, original, entered = Storage(storage.url), Storage.write, []

    def write(self: Storage, name: str, content: bytes | str) -> None:
        if not entered:
            entered.append(True)
            other.add("log.jsonl", '{"n": 2}\n')  # after this one has read, and before it writes
        original(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", write)
        storage.add("log.jsonl", '{"n": 3}\n')
    expected = [1, 3] if storage.is_local else [1, 2, 3]  # a local file is opened to append
    for _ in range(2):
        assert sorted(r["n"] for r in storage.read_lines("log.jsonl")) == expected
        assert sorted(r["n"] for r in storage.tail_records("log.jsonl", 1 << 20)) == expected
        storage.fold("log.jsonl")
    assert storage.read("log.jsonl").count(b"\n") == len(expected)
    assert (storage / "log.jsonl.d").names() == []


def test_who_is_killed_while_a_log_is_folded_tells_nothing_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = Storage("memory://killed-while-folding")
    for n in range(3):
        storage.add("log.jsonl", f'{{"n": {n}}}\n')
    with monkeypatch.context() as patch:
        patch.setattr(storage._fs, "rm", Mock(side_effect=PermissionError))  # as good as killed
        with pytest.raises(PermissionError):
            storage.fold("log.jsonl")
    storage.add("log.jsonl", '{"n": 3}\n')
    assert len((storage / "log.jsonl.d").names()) == 4
    for _ in range(2):
        assert [r["n"] for r in storage.read_lines("log.jsonl")] == [0, 1, 2, 3]
        assert [r["n"] for r in storage.tail_records("log.jsonl", 1 << 20)] == [0, 1, 2, 3]
        storage.fold("log.jsonl")
    assert (storage / "log.jsonl.d").names() == []


def test_a_log_keeps_its_order(storage: Storage) -> None:
    storage.make()
    for n in range(5):
        storage.add("log.jsonl", f'{{"n": {n}}}\n')
        if n == 2:
            storage.fold("log.jsonl")
    assert [r["n"] for r in storage.read_lines("log.jsonl")] == list(range(5))
