"""Storage: the same promises on a local disk and on a filesystem without folders."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tst_ray.errors import RunError
from tst_ray.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "run"))
    storage = Storage("memory://bucket/run")
    storage.remove()
    return storage


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
