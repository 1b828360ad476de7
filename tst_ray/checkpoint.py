"""Sharded checkpoints: saved without stopping the loop, committed last, verified before use.

    checkpoints/step-00001200/
        __0_0.distcp …  .metadata    written by torch.distributed.checkpoint, each rank its own
        meta.json                    step, world size, and every file's size and SHA-256
        COMMITTED                    the SHA-256 of meta.json; written last, by rank 0
        DAMAGED                      only where a file was once found altered or missing

A checkpoint without COMMITTED does not exist. One whose files do not match meta.json is damaged:
`find_good` says so and takes the one before. DCP stores whole tensors by name and piece, so a
checkpoint of any world size loads at any other.

Saving: `save` stages the state to host memory and returns; a thread then writes, hashes and
commits over a process group of its own, so its collectives never meet the loop's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tst_ray.errors import RunError
from tst_ray.storage import Storage

log = logging.getLogger(__name__)

MARKER, META, DAMAGED = "COMMITTED", "meta.json", "DAMAGED"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_SCRATCH = "tst-ray-checkpoint-"
_HASH_CHUNK_BYTES = 1 << 20

OnEvent = Callable[..., None]  # called as on_event(kind, **details)


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint: where it is, and what its meta.json says."""

    step: int
    folder: Storage
    meta: dict[str, Any]


def folder_name(step: int) -> str:
    """The folder of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for what is no such name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def committed(root: Storage, damaged: bool = False) -> list[CheckpointInfo]:
    """The committed checkpoints under `root`, newest first; not verified.

    Args:
        damaged: whether to list those too that were once found damaged.
    """
    found = []
    for name in root.names():
        step = step_of(name)
        if step is None:
            continue
        folder = root / name
        if folder.exists(MARKER) and (damaged or not folder.exists(DAMAGED)):
            found.append(CheckpointInfo(step, folder, {}))
    return sorted(found, key=lambda info: -info.step)


def read_meta(info: CheckpointInfo) -> CheckpointInfo:
    """The checkpoint with its meta.json, which must be the one its marker committed.

    Raises:
        ValueError: saying what is damaged.
    """
    try:
        content = info.folder.read(META)
        expected = info.folder.read(MARKER).decode().strip()
    except FileNotFoundError as error:
        raise ValueError(f"{META} is missing") from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{META} is not the one that was committed")
    return CheckpointInfo(info.step, info.folder, json.loads(content))


def verify_file(folder: Storage, entry: dict[str, Any], contents: bool = True) -> str | None:
    """What is wrong with a file of a checkpoint; None where nothing is.

    Args:
        contents: whether to read it all and compare its checksum, not only its size.
    """
    name = entry["name"]
    try:
        size = folder.size(name)
    except FileNotFoundError:
        return f"{name} is missing"
    if size != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"
    if not contents:
        return None
    with folder.open(name) as file:
        if _sha256(file) != entry["sha256"]:
            return f"{name} has another checksum than when it was written"
    return None


def verify(
    info: CheckpointInfo, rank: int = 0, world_size: int = 1, contents: bool = True
) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files; None where nothing is."""
    try:
        for entry in read_meta(info).meta["files"][rank::world_size]:
            problem = verify_file(info.folder, entry, contents)
            if problem:
                return problem
    except Exception as error:  # whatever keeps a file from being read, other ranks must hear of it
        return _one_line(error)
    return None


class Ranks:
    """The workers that save and load together, talking over a group of their own (gloo).

    Collective: all make theirs in the same order. One process alone needs no group.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1
        self.group = dist.new_group(backend="gloo") if distributed else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order; collective."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def find_good(
    roots: Sequence[Storage], on_event: OnEvent, ranks: Ranks | None = None
) -> CheckpointInfo | None:
    """The newest checkpoint that verifies; None where none was ever committed to the last folder.

    Every rank calls this; each verifies its share of the files. A damaged checkpoint is marked, so
    that those who do not verify do not count on it; mended, it counts again.

    Args:
        roots: folders of checkpoints; of the same step, one in an earlier folder is preferred. The
            last is storage; what is before it are copies, which a run can do without.
        on_event: told of "checkpoint_damaged" (rank 0 only).
        ranks: who verifies; this process alone unless given.

    Raises:
        RunError: there are committed checkpoints in storage, and all are damaged.
    """
    ranks = ranks or Ranks()
    listed = [committed(root, damaged=True) for root in roots]
    every = sorted((info for infos in listed for info in infos), key=lambda i: -i.step)
    # Rank 0's listing for all: on a shared filesystem another rank's may be older.
    candidates: list[CheckpointInfo]
    candidates, stored = ranks.gather((every, len(listed[-1])))[0]
    for info in candidates:
        problems = ranks.gather(verify(info, ranks.rank, ranks.size))
        problem = next((problem for problem in problems if problem), None)
        if problem is None:
            if ranks.rank == 0:
                _mark(info.folder, None)
            return read_meta(info)
        log.warning(
            "checkpoint %s is damaged (%s); trying the one before", info.folder.url, problem
        )
        if ranks.rank == 0 and not info.folder.exists(DAMAGED):
            _mark(info.folder, problem)
            on_event("checkpoint_damaged", step=info.step, problem=problem)
    if stored:
        raise RunError(
            f"all {stored} checkpoints under {roots[-1].url} are damaged, {candidates[0].step} "
            "steps would be lost; restore one from a copy, or start a new run with another "
            "run.name"
        )
    return None


def _mark(folder: Storage, problem: str | None) -> None:
    """Mark a checkpoint as damaged, or as good again, where storage lets us: a full disk or a
    folder that is only read must not keep a run from the checkpoint before."""
    try:
        if problem is None:
            folder.remove(DAMAGED)
        else:
            folder.write(DAMAGED, problem + "\n")
    except Exception as error:
        log.warning("%s is not marked: %s", folder.url, _one_line(error))


def forget_after(root: Storage, step: int) -> None:
    """Remove the checkpoints of more than `step` steps: what they hold must not come back."""
    for info in committed(root, damaged=True):
        if info.step > step:
            _remove(info.folder)


def _remove(folder: Storage) -> None:
    folder.remove(MARKER)  # first: half a checkpoint must not look like one
    folder.remove()


class Checkpointer:
    """Saves and restores a run's state; every rank holds one and calls it in the same order.

    Args:
        root: the folder of checkpoints: of the run, or in the memory of the cluster.
        keep: how many committed checkpoints stay; older ones are removed.
        background: stage, then write while training goes on; otherwise write before returning.
        on_event: told of "checkpoint", "checkpoint_failed" (rank 0 only).
        is_current: whether this attempt is still the run's; another's checkpoints are not touched.

    Attributes:
        failed_saves: how many in a row failed; rank 0's counts.
    """

    def __init__(
        self,
        root: Storage,
        *,
        keep: int,
        background: bool,
        on_event: OnEvent,
        is_current: Callable[[], bool] = lambda: True,
    ) -> None:
        self.root, self.keep, self.background = root, keep, background
        self._ranks = Ranks()  # the checkpoint thread's own
        self._on_event = on_event if self._ranks.rank == 0 else (lambda kind, **details: None)
        self._is_current = is_current
        self._stager = _Stager()
        self._thread: threading.Thread | None = None
        self.failed_saves = 0

    def holds(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint is one of this folder."""
        return info.folder.url.startswith(f"{self.root.url}/")

    def load(self, info: CheckpointInfo, state: dict[str, Any]) -> None:
        """Load a checkpoint into `state`: tensors in place, resharded to how they are here."""
        import torch.distributed.checkpoint as dcp

        with _ordinary_errors():
            dcp.load(state, storage_reader=_reader(info.folder), process_group=self._ranks.group)

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Start saving the state after `step` steps; a save still under way is waited for.

        A failure is an event and a warning, not an exception: training goes on.

        Args:
            state: tensors, DTensors and plain values by name; may change once this returns.
            meta: what meta.json says besides step, world size and files.
        """
        started = time.perf_counter()
        self.wait()
        staged, problem = None, None
        try:
            staged = self._stager.stage(state)
        except Exception as error:
            problem = error  # the others must hear of it, and the thread tells them
        stall_s = round(time.perf_counter() - started, 4)
        told = {"step": step, "stall_s": stall_s}
        args = (step, staged, problem, meta, told)
        self._thread = threading.Thread(target=self._save, args=args, name="checkpoint")
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(
        self,
        step: int,
        staged: Any,
        problem: Exception | None,
        meta: dict[str, Any],
        told: dict[str, Any],
    ) -> None:
        """In the checkpoint thread: write, hash, commit, clear old ones."""
        started, scratch = time.perf_counter(), None
        folder = self.root / folder_name(step)
        try:
            scratch = self._agree(lambda: self._make_place(folder, problem))
            entries = self._agree(lambda: self._write(staged, folder, scratch))
            gathered = self._ranks.gather(entries)
            if self._ranks.rank == 0:
                num_bytes = self._commit(step, folder, gathered, meta)
                seconds = round(time.perf_counter() - started, 3)
                self._on_event("checkpoint", bytes=num_bytes, seconds=seconds, **told)
            self.failed_saves = 0
        except Exception as error:
            self._failed(step, error)
            return
        finally:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
        if self._ranks.rank == 0:
            self._prune(step)

    def _agree(self, action: Callable[[], Any]) -> Any:
        """Do something on every rank; raises on all where any rank cannot.

        A rank that went on alone would wait for the others for ever.
        """
        result, problem = None, None
        try:
            result = action()
        except Exception as error:
            problem = _one_line(error)
        problems = [other for other in self._ranks.gather(problem) if other]
        if problems:
            raise OSError(problems[0])
        return result

    def _make_place(self, folder: Storage, problem: Exception | None) -> Path | None:
        """An empty folder for the checkpoint; a local one to upload from where it is remote."""
        if problem is not None:
            raise problem
        if self._ranks.rank == 0:
            if not self._is_current():
                raise OSError("another attempt of this run has taken over")
            folder.remove()  # what an interrupted save left, or a damaged one that is done again
            folder.make()
        return None if self.root.is_local else make_scratch()

    def _write(self, staged: Any, folder: Storage, scratch: Path | None) -> list[dict[str, Any]]:
        """Write this rank's files; their names, sizes and checksums."""
        import torch.distributed.checkpoint as dcp

        target = str(scratch) if scratch else folder.path
        writer = dcp.FileSystemWriter(target, single_file_per_rank=True, overwrite=True)
        with _ordinary_errors():
            dcp.save(staged, storage_writer=writer, process_group=self._ranks.group)
        return self._own_files(folder, scratch)

    def _own_files(self, folder: Storage, scratch: Path | None) -> list[dict[str, Any]]:
        """This rank's files with size and checksum; uploaded where storage is not local."""
        where = scratch or Path(folder.path)
        mine = [path for path in where.iterdir() if path.name.startswith(f"__{self._ranks.rank}_")]
        if self._ranks.rank == 0:
            mine.append(where / ".metadata")
        entries = []
        for path in sorted(mine):
            with path.open("rb") as file:
                checksum = _sha256(file)
            entries.append({"name": path.name, "bytes": path.stat().st_size, "sha256": checksum})
            if scratch:
                folder.upload(str(path), path.name)
        return entries

    def _commit(
        self, step: int, folder: Storage, gathered: Sequence[Any], meta: dict[str, Any]
    ) -> int:
        files = [entry for entries in gathered for entry in entries]
        content = json.dumps(
            {"format": 1, "step": step, "world_size": self._ranks.size, **meta, "files": files},
            indent=2,
        )
        folder.write(META, content)
        if not self._is_current():
            raise OSError("another attempt of this run has taken over")
        folder.write(MARKER, hashlib.sha256(content.encode()).hexdigest() + "\n")
        return sum(entry["bytes"] for entry in files)

    def _prune(self, newest: int) -> None:
        """Remove what is older than the last `keep`, and what was never committed."""
        try:
            kept = {folder_name(info.step) for info in committed(self.root)[: self.keep]}
            for name in self.root.names():
                older = _STEP_FOLDER.fullmatch(name) and name < folder_name(newest)
                if older and name not in kept:
                    _remove(self.root / name)
        except Exception as error:
            log.warning("old checkpoints under %s stay: %s", self.root.url, error)

    def _failed(self, step: int, error: Exception) -> None:
        self.failed_saves += 1
        log.warning("checkpoint of step %d failed, training goes on: %s", step, error)
        self._on_event("checkpoint_failed", step=step, error=_one_line(error))


class _Stager:
    """Copies a state to host memory before it changes, each time into the same memory.

    New memory takes longer to get than to fill. It is pinned where there is a GPU to copy from.
    """

    def __init__(self) -> None:
        import torch
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())

    def stage(self, state: dict[str, Any]) -> Any:
        """A copy, which the next call overwrites."""
        staged = self._stager.stage(state)
        if not self._stager.cache_staged_state_dict:
            # On its own, the stager would only pin memory to keep, and that takes a GPU.
            self._stager.cache_staged_state_dict = True
            self._stager.state_dict_cache = staged
        return staged


@contextlib.contextmanager
def _ordinary_errors() -> Iterator[None]:
    """DCP's own exception is a BaseException, which passes by every `except Exception`."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [str(cause) for cause, _ in error.failures.values()]
        raise OSError(causes[0] if causes else "the checkpoint failed") from error


def make_scratch() -> Path:
    """A folder for files that are sent on at once: in memory, where that is possible.

    What processes left there that were killed in the middle of a save is removed first.
    """
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    for left in root.glob(f"{_SCRATCH}*"):
        if not Path(f"/proc/{left.name.removeprefix(_SCRATCH).partition('-')[0]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-", dir=root))


def load_full(info: CheckpointInfo, state: dict[str, Any]) -> None:
    """Load a checkpoint into full tensors in one process, without a process group."""
    import torch.distributed.checkpoint as dcp

    with _ordinary_errors():
        dcp.load(state, storage_reader=_reader(info.folder), no_dist=True)


def _reader(folder: Storage) -> Any:
    import torch.distributed.checkpoint as dcp

    if folder.is_local:
        return dcp.FileSystemReader(folder.path)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(folder.url)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_HASH_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
