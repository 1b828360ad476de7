"""Runs on an object store: one that works, and one that fails now and then."""

from __future__ import annotations

import errno
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tst_ray.cli import main
from tst_ray.storage import Storage

STEPS = 30


class ServiceUnavailable(Exception):
    """What clients of object stores raise is often no OSError."""


class Reader(io.RawIOBase):
    """An object that is read; in the middle of it, too, a request may be refused."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._content.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        Flaky._maybe_refuse()
        return self._content.readinto(buffer)


class Flaky(MemoryFileSystem):
    """Objects in memory; a share of all requests is refused."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    share = 0.0
    refused = 0
    draw = random.Random(7)

    @classmethod
    def _maybe_refuse(cls) -> None:
        if cls.draw.random() < cls.share:
            cls.refused += 1
            raise ServiceUnavailable("503 slow down")

    def pipe_file(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_refuse()
        return super().pipe_file(*args, **kwargs)

    def cat_file(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_refuse()
        return super().cat_file(*args, **kwargs)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        file = super()._open(path, mode, **kwargs)
        if mode != "rb":
            return file
        return io.BufferedReader(Reader(file.getvalue()), 1 << 24)

    def info(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe_refuse()
        return super().info(*args, **kwargs)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    texts = Path(__file__).parent.parent / "pipelines"
    return [
        "run", "--run.name=far", f"--data.sources=['{texts}']", "--data.vocab_size=300",
        f"--data.cache={folder / 'shards'}", "--cluster.backend=inline", "--train.threads=1",
        f"--train.steps={STEPS}", "--train.sequence_length=16", "--train.batch_size=4",
        "--checkpoint.every=5", "--metrics.val_every=100", "--fault.max_failed_saves=100",
        "--fault.hang_s=null",
        "--model.config={model_type: llama, hidden_size: 16, intermediate_size: 32, "
        "num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}",
    ]  # fmt: skip


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr("tst_ray.storage._PAUSES_S", (0.001, 0.001))
    monkeypatch.setattr("tst_ray.storage._FIRST_PAUSE_S", 0.001)
    yield Flaky
    Flaky.share, Flaky.store, Flaky.pseudo_dirs = 0.0, {}, [""]


def columns(run: Storage) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["data_digest"]) for r in run.read_lines("metrics.jsonl")]


def test_a_run_whose_storage_refuses_one_request_in_seven_loses_nothing(
    command: list[str], flaky: type[Flaky], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--run.storage=memory://calm/"]) == 0
    calm = Storage("memory://calm/far")
    events = calm.read_lines("events.jsonl")
    assert [e["event"] for e in events if e["event"] != "checkpoint"] == [
        "attempt", "phase_start", "phase_start", "finish",
    ]  # fmt: skip
    assert (calm / "events.jsonl.d").names() == []
    assert main(["status", calm.url]) == 0
    assert main(["checkpoints", f"{calm.url}/", "--verify"]) == 0

    flaky.share = 0.15
    tries = 0
    while main([*command, "--run.storage=flaky://bucket"]) != 0:
        tries += 1
        assert "503 slow down" in capsys.readouterr().err
        assert tries < 60
    assert flaky.refused > 20
    flaky.share = 0.0
    run = Storage("flaky://bucket/far")
    assert columns(run) == columns(calm)
    assert {name for name in (run / "model").names()} == {n for n in (calm / "model").names()}
    assert (run / "model").read("model.safetensors") == (calm / "model").read("model.safetensors")
    told = {event["event"] for event in run.read_lines("events.jsonl")}
    assert "checkpoint_damaged" not in told


def test_a_last_checkpoint_that_cannot_be_read_is_not_waited_for_in_a_loop(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one before is no model of this run, and the steps to the last are not lost either."""
    original = Storage.sha256

    def sha256(self: Storage, name: str) -> str:
        if self.url.endswith(f"{STEPS:08d}"):
            raise OSError(errno.EIO, "Input/output error")
        return original(self, name)

    with monkeypatch.context() as trouble:
        trouble.setattr(Storage, "sha256", sha256)
        trouble.setattr("tst_ray.checkpoint._PATIENCE_S", 0.0)
        assert main([*command, f"--run.storage={tmp_path}"]) == 1
    assert "the last checkpoint cannot be read now" in capsys.readouterr().err
    assert main([*command, f"--run.storage={tmp_path}"]) == 0
    assert len(columns(Storage(str(tmp_path / "far")))) == STEPS
