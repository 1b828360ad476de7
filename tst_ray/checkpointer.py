"""Saving without stopping the loop, and loading at any number of workers.

`Checkpointer.save` stages the state to host memory and returns; a thread then writes, hashes and
commits over a process group of its own, so its collectives never meet the loop's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import one_line
from tst_ray import sharded
from tst_ray.checkpoint import (
    MARKER,
    META,
    CheckpointInfo,
    OnEvent,
    Ranks,
    committed,
    folder_name,
    marker,
    remove,
    step_of,
    verify_file,
)
from tst_ray.storage import Storage

log = logging.getLogger(__name__)

FORMAT = 2  # 1: the files held the optimizer's settings as well, pickled


class Checkpointer:
    """Saves and restores a run's state; every rank holds one and calls it in the same order.

    Args:
        root: the folder of checkpoints: of the run, or in the memory of the cluster.
        keep: how many committed checkpoints stay; older ones are removed.
        background: stage, then write while training goes on; otherwise write before returning.
        on_event: told of "checkpoint", "checkpoint_failed" (rank 0 only).
        is_current: whether this attempt is still the run's; another's checkpoints are not touched.
        key: signs them; None leaves them unsigned.

    Attributes:
        failed_saves: how many in a row failed; rank 0's counts.
        save_s: seconds that the last whole save took, from the copy to the commit.
    """

    def __init__(
        self,
        root: Storage,
        *,
        keep: int,
        background: bool,
        on_event: OnEvent,
        is_current: Callable[[], bool] = lambda: True,
        key: bytes | None = None,
    ) -> None:
        self.root, self.keep, self.background = root, keep, background
        self._ranks = Ranks()  # the checkpoint thread's own
        self._on_event = on_event if self._ranks.rank == 0 else (lambda kind, **details: None)
        self._is_current, self._key = is_current, key
        self._stager = sharded.Stager()
        self._thread: threading.Thread | None = None
        self.failed_saves = 0
        self.save_s = 0.0

    def holds(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint is one of this folder."""
        return info.folder.url.startswith(f"{self.root.url}/")

    def reserve(self, state: dict[str, Any]) -> None:
        """Begin to get the memory that `save` copies such a state to, where that takes long."""
        self._stager.reserve(state)

    def load(self, info: CheckpointInfo, state: dict[str, Any]) -> None:
        """Load a checkpoint into `state`: tensors in place, resharded to how they are here."""
        sharded.read(info.folder, state, self._ranks.group)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        meta: dict[str, Any],
        *,
        first: Callable[[], None] = lambda: None,
        prune: bool = True,
    ) -> None:
        """Start saving the state after `step` steps; a save still under way is waited for.

        A failure is an event and a warning, not an exception: training goes on.

        Args:
            state: tensors and DTensors by name; may change once this returns.
            meta: what meta.json says besides step, world size and files; plain values.
            first: done before it is written, in its thread; where it raises, all ranks fail.
            prune: whether older checkpoints may go once this one is committed.
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
        args = (step, staged, problem, meta, first, told, prune)
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
        first: Callable[[], None],
        told: dict[str, Any],
        prune: bool,
    ) -> None:
        """In the checkpoint thread: write, hash, commit, clear old ones; all ranks end together.

        Else the others would go on into the next step, and wait there for rank 0 as for a hang.
        """
        started, scratch = time.perf_counter(), None
        folder = self.root / folder_name(step)
        try:
            scratch = self._agree(lambda: self._make_place(folder, staged, problem, first))
            entries = self._agree(lambda: self._write(staged, folder, scratch))
            gathered = self._ranks.gather(entries)
            if self._ranks.rank == 0:
                num_bytes = self._commit(step, folder, gathered, meta)
                seconds = round(time.perf_counter() - started, 3)
                self._on_event("checkpoint", bytes=num_bytes, seconds=seconds, **told)
            self.failed_saves = 0
            if self._ranks.rank == 0 and prune:
                self._prune(step)
        except Exception as error:
            self._failed(step, error)
        finally:
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)
            with contextlib.suppress(Exception):  # a rank has died; the attempt ends anyway
                self._ranks.gather(None)
            self.save_s = time.perf_counter() - started

    def _agree(self, action: Callable[[], Any]) -> Any:
        """Do something on every rank; raises on all where any rank cannot.

        A rank that went on alone would wait for the others for ever.
        """
        result, problem = None, None
        try:
            result = action()
        except Exception as error:
            problem = one_line(error)
        problems = [other for other in self._ranks.gather(problem) if other]
        if problems:
            raise OSError(problems[0])
        return result

    def _make_place(
        self, folder: Storage, staged: Any, problem: Exception | None, first: Callable[[], None]
    ) -> Path | None:
        """An empty folder for the checkpoint; a local one to upload from where it is remote."""
        if problem is not None:
            raise problem
        first()
        if self._ranks.rank == 0:
            if not self._is_current():
                raise OSError("another attempt of this run has taken over")
            folder.remove()  # what an interrupted save left, or a damaged one that is done again
            folder.make()
        return None if self.root.is_local else sharded.make_scratch(sharded.num_bytes(staged))

    def _write(self, staged: Any, folder: Storage, scratch: Path | None) -> list[dict[str, Any]]:
        """Write this rank's files, where they are to be; their names, sizes and checksums."""
        entries = sharded.write(staged, scratch or Path(folder.path), self._ranks.group)
        if scratch:
            for entry in entries:
                folder.upload(str(scratch / entry["name"]), entry["name"])
        return entries

    def _commit(
        self, step: int, folder: Storage, gathered: Sequence[Any], meta: dict[str, Any]
    ) -> int:
        files = [entry for entries in gathered for entry in entries]
        content = json.dumps(
            {
                "format": FORMAT,
                "step": step,
                "world_size": self._ranks.size,
                **meta,
                "files": files,
            },
            indent=2,
        )
        for entry in files if self.root.is_local else ():
            # Each rank hashed what it wrote; where it has not mounted the shared folder, that is
            # in one of its own, of the same name.
            if (problem := verify_file(folder, entry, contents=False)) is not None:
                raise OSError(f"{folder.url}: {problem}")
        folder.write(META, content)
        if not self._is_current():
            raise OSError("another attempt of this run has taken over")
        folder.write(MARKER, marker(content.encode(), self._key))
        return sum(entry["bytes"] for entry in files)

    def _prune(self, newest: int) -> None:
        """Remove what is older than the last `keep`, and what was never committed."""
        try:
            kept = {folder_name(info.step) for info in committed(self.root)[: self.keep]}
            for name in self.root.names():
                step = step_of(name)
                if step is not None and step < newest and name not in kept:
                    remove(self.root / name)
        except Exception as error:
            log.warning("old checkpoints under %s stay: %s", self.root.url, error)

    def _failed(self, step: int, error: Exception) -> None:
        self.failed_saves += 1
        log.warning("checkpoint of step %d failed, training goes on: %s", step, error)
        self._on_event("checkpoint_failed", step=step, error=one_line(error))
