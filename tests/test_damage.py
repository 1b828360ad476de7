"""What is done to files: damage to checkpoints, disks that fill up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.chaos import (
    DAMAGES,
    Ballast,
    damage,
)
from tests.chaos import (
    ROOT,
    problem,
    save_checkpoint,
    small_filesystem,
)
from tst_ray.checkpoint import MARKER, META, committed, folder_name
from tst_ray.storage import Storage


@pytest.fixture(params=["local", "remote"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A run directory, on a local disk and on a filesystem that can only replace whole files."""
    storage = Storage(str(tmp_path) if request.param == "local" else "memory://chaos")
    storage.make()
    yield storage
    storage.remove()


@pytest.mark.parametrize("choice", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_one_that_verification_finds(run: Storage, how: str, choice: float) -> None:
    folder = save_checkpoint(run, 20)
    assert problem(folder) is None
    assert damage(folder, how, choice)
    assert problem(folder) is not None
    assert bool(committed(run / "checkpoints")) == (how != "unmark")


def test_damage_is_as_small_as_it_says(run: Storage) -> None:
    folder = save_checkpoint(run, 20)
    before = {name: folder.read(name) for name in folder.names()}
    said = damage(folder, "flip", 0.7)
    changed = [name for name in before if folder.read(name) != before[name]]
    assert len(changed) == 1 and changed[0] in said
    old, new = before[changed[0]], folder.read(changed[0])
    assert len(new) == len(old)
    assert sum((a ^ b).bit_count() for a, b in zip(old, new, strict=True)) == 1


def test_choice_decides_what_is_damaged_and_how(run: Storage) -> None:
    said = set()
    for index in range(40):
        said.add(damage(save_checkpoint(run, 20), choice=index / 40))
    assert {words.split()[0] for words in said} == {"cut", "flipped", "removed"}
    assert f"removed {MARKER}" in said
    assert all(any(name in words for words in said) for name in ("__0_0", ".metadata", META))


def test_a_checkpoint_that_is_gone_cannot_be_damaged(run: Storage) -> None:
    for how in DAMAGES:
        with pytest.raises(FileNotFoundError):
            damage(run / "checkpoints" / folder_name(5), how)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_filesystem(tmp_path / "small", 4) as folder:
        yield folder


def test_ballast_fills_a_disk_and_gives_it_back(small_disk: Path) -> None:
    (small_disk / "before").write_bytes(b"x")
    ballast = Ballast(str(small_disk))
    assert ballast.num_bytes > 3 << 20
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "more").write_bytes(b"x" * 5000)
    (small_disk / "more").unlink()
    assert [path.name for path in small_disk.iterdir()] == ["before"]
    ballast.release()
    ballast.release()
    (small_disk / "more").write_bytes(b"x" * (3 << 20))


def test_ballast_fills_a_disk_that_has_less_than_it_says(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem may keep some of its free space for itself."""
    monkeypatch.setattr("cluster.damage._free_bytes", lambda folder: 7 << 20)
    ballast = Ballast(str(small_disk))
    assert os.statvfs(small_disk).f_bfree == 0
    ballast.release()


def test_ballast_ends_with_its_process(small_disk: Path) -> None:
    code = (
        "import sys, time; from cluster.chaos import Ballast; b = Ballast(sys.argv[1])\n"
        "print('full', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(small_disk)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "full\n"
        assert os.statvfs(small_disk).f_bfree == 0
    finally:
        process.kill()
        process.communicate()
    assert os.statvfs(small_disk).f_bfree > 0
