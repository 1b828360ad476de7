"""A checkpoint's files: what is said of them is what lies on the disk."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import staging

from tst_ray import sharded
from tst_ray.sharded import Stager, make_scratch, num_bytes, read_full, write
from tst_ray.storage import Storage


def make_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(50, 41 + i, generator=generator) for i in range(6)}


@pytest.mark.parametrize("piece_bytes", [1, 5_000, 1 << 30])
def test_files_are_hashed_on_the_way_as_they_lie_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(sharded, "_PIECE_BYTES", piece_bytes)
    entries = write(make_state(), tmp_path)
    assert [entry["name"] for entry in entries] == [".metadata", "__0_0.distcp"]
    assert {entry["name"] for entry in entries} == {path.name for path in tmp_path.iterdir()}
    for entry in entries:
        content = (tmp_path / entry["name"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    state = {name: torch.zeros_like(value) for name, value in make_state().items()}
    read_full(Storage(str(tmp_path)), state)
    assert all(torch.equal(state[name], value) for name, value in make_state().items())


def test_what_is_hashed_has_no_crc_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch makes them again once the last of those that write is done."""
    makes_crc, seen = torch.serialization.get_crc32_options, []
    monkeypatch.setattr(sharded.dcp, "save", lambda *args, **options: seen.append(makes_crc()))
    write(make_state(), tmp_path)
    assert seen == [False]
    assert makes_crc()
    with sharded._without_crc32():
        write(make_state(), tmp_path)
        assert not makes_crc()
    assert makes_crc()


@pytest.mark.parametrize("failing", [0, 2])
def test_what_cannot_be_hashed_fails_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    monkeypatch.setattr(sharded, "_PIECE_BYTES", 20_000)
    real, calls = sharded._HashedFile._hash, iter(range(100))

    def hash_(file: sharded._HashedFile, num_bytes: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(file, num_bytes)

    monkeypatch.setattr(sharded._HashedFile, "_hash", hash_)
    with pytest.raises(OSError, match="Input/output error"):
        write(make_state(), tmp_path)


def test_a_file_that_was_cut_meanwhile_fails_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sharded._HashedFile._hash

    def hash_(file: sharded._HashedFile, num_bytes: int) -> None:
        os.truncate(file.name, 100)
        real(file, num_bytes)

    monkeypatch.setattr(sharded._HashedFile, "_hash", hash_)
    with pytest.raises(OSError, match=r"ended .* bytes early"):
        write(make_state(), tmp_path)


def test_no_thread_stays_behind_a_written_file(tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    write(make_state(), tmp_path)
    assert threading.active_count() == before


def test_what_killed_processes_left_in_memory_is_removed() -> None:
    code = "from tst_ray.sharded import make_scratch; print(make_scratch(1))"
    left = Path(subprocess.check_output([sys.executable, "-c", code], text=True).strip())
    assert left.is_dir()
    mine = make_scratch(1)
    assert not left.exists()
    assert make_scratch(1).parent == mine.parent
    assert mine.is_dir()
    for folder in mine.parent.glob(f"{mine.name.split('-')[0]}-*-{os.getpid()}-*"):
        folder.rmdir()


def test_where_memory_is_short_files_wait_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's /dev/shm may hold 64 MB, and all workers of a node save at once."""
    free, disk = shutil.disk_usage(tmp_path).free, Path(tempfile.gettempdir())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    places = [make_scratch(num_bytes, memory=tmp_path) for num_bytes in (free // 8, free // 3)]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    places.append(make_scratch(free // 8, memory=tmp_path))
    assert [place.parent for place in places] == [tmp_path, disk, disk]
    for place in places:
        place.rmdir()


def test_bytes_of_a_state() -> None:
    state = {"w": torch.zeros(3, 4), "deep": {"b": torch.zeros(5, dtype=torch.bfloat16), "n": 7}}
    assert num_bytes(state) == 3 * 4 * 4 + 5 * 2


def test_memory_for_copies_is_pinned_ahead_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor's own, exactly as large; the copies go there, and none stays pinned."""
    pinned: dict[int, int] = {}
    monkeypatch.setattr(sharded, "pin_memory", pinned.__setitem__)
    monkeypatch.setattr(sharded, "unpin_memory", lambda at: pinned.pop(at))
    monkeypatch.setattr(sharded, "_is_on_gpu", lambda state: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # of no GPU
    state, stager = make_state(), Stager()
    stager.reserve(state)
    for _ in range(2):
        staged = stager.stage(state)
        assert pinned == {t.data_ptr(): t.numel() * 4 for t in staged.values()}
        assert all(torch.equal(staged[name], state[name]) for name in state)
    del stager, staged
    gc.collect()
    assert not pinned


def test_where_nothing_can_be_pinned_ahead_the_copy_makes_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("Registering memory failed with cudaError: 2.")

    made: list[bool] = []
    create_unpinned = staging._create_cpu_state_dict

    def create(state: Any, pin_memory: bool = False) -> Any:
        made.append(pin_memory)
        return create_unpinned(state)

    monkeypatch.setattr(sharded, "pin_memory", full)
    monkeypatch.setattr(sharded, "_is_on_gpu", lambda state: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # of no GPU
    monkeypatch.setattr(staging, "_create_cpu_state_dict", create)
    state, stager = make_state(), Stager()
    stager.reserve(state)
    assert num_bytes(stager.stage(state)) == num_bytes(state)
    assert made == [True]


def test_beside_a_gpu_nothing_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is in host memory: neither DCP's copy ahead nor pinning has work to do."""
    from torch.distributed.checkpoint import filesystem

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the GPU was touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", forbidden)
    create = staging._create_cpu_state_dict

    def unpinned(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        assert not pin_memory
        return create(*args, **options)

    monkeypatch.setattr(staging, "_create_cpu_state_dict", unpinned)
    assert write(Stager().stage(make_state()), tmp_path)


def test_a_process_alone_saves_and_loads_without_a_warning(tmp_path: Path) -> None:
    """It is meant to be alone; and pytest would hide what a user sees."""
    script = (
        "import sys, torch; from pathlib import Path; from tst_ray.sharded import read_full, write;"
        "from tst_ray.storage import Storage; state = {'a': torch.ones(2)};"
        "write(state, Path(sys.argv[1])); read_full(Storage(sys.argv[1]), state)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
