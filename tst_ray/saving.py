"""When a worker saves, and what it waits for: checkpoints in storage, and in the memory of nodes.

    after a step ── is one due? ──> memory (checkpoint.memory_every), storage (checkpoint.every, or
                                    every_s, which rank 0 tells the others)
    a stage's end, a request to stop ──> storage, tried again where that fails
    a roll-back ──> what was saved since is removed

The loop waits for the copy of the state; for its way to storage only where another save, or the end
of the group, must come after. The watchdog is told which of the two it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tst_ray.checkpoint import CheckpointInfo, Ranks, committed, find_good, forget_after
from tst_ray.checkpointer import Checkpointer
from tst_ray.estimates import MEMORY_KEEP
from tst_ray.guard import Guard
from tst_ray.job import Job
from tst_ray.journal import Journal
from tst_ray.signing import read_key
from tst_ray.storage import Storage, pauses
from tst_ray.timeouts import COMMIT, STORAGE_S
from tst_ray.watchdog import Unwatched


class Saving:
    """One worker's checkpoints; every rank holds one and calls it in the same order.

    Args:
        job, ranks, journal, watchdog, guard: the worker's.
        state: gives what to save, tensors by name; live.

    Raises:
        RunError: the key of `checkpoint.key_file` cannot be read on this node.

    Attributes:
        storage: saves to the run directory.
        memory: saves to the memory of the cluster; None where there is none.
        wanted: whether all ranks are to save after this step, due or not.
    """

    def __init__(
        self,
        job: Job,
        ranks: Ranks,
        journal: Journal,
        watchdog: Unwatched,
        guard: Guard,
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self._job, self._ranks, self._journal, self._watchdog = job, ranks, journal, watchdog
        self._guard, self._state = guard, state
        self._settings = job.config.checkpoint
        self._key = read_key(self._settings.key_file)
        self.wanted = False
        self._saved_at = time.monotonic()  # to storage; or where it was loaded, for the first
        self._reserved = False
        self.storage = self._checkpointer(
            Storage(job.run_url), self._settings.keep, self._journal.event
        )
        self.memory: Checkpointer | None = None
        if job.memory_url is not None:
            self.memory = self._checkpointer(
                Storage(job.memory_url), MEMORY_KEEP, self._memory_event
            )

    def _checkpointer(
        self, place: Storage, keep: int, on_event: Callable[..., None]
    ) -> Checkpointer:
        return Checkpointer(
            place / "checkpoints",
            keep=keep,
            background=self._settings.async_,
            on_event=on_event,
            is_current=self._journal.is_current,
            key=self._key,
        )

    def _memory_event(self, kind: str, **details: Any) -> None:
        """There is one every hundred steps or so: only what goes wrong is worth a line."""
        if kind != "checkpoint":
            self._journal.event(kind, memory=True, **details)

    @property
    def failed(self) -> int:
        """Checkpoints in a row that storage did not take; rank 0's counts."""
        return self.storage.failed_saves

    # -- back --------------------------------------------------------------------------------------

    def newest_good(self) -> CheckpointInfo | None:
        """The newest checkpoint that verifies, in memory or storage; see `checkpoint.find_good`."""
        roots = [saver.root for saver in self._savers()]
        # Well before the watchdog takes a start for a hang.
        patience_s = min(STORAGE_S, self._job.config.fault.start_s / 2)
        return find_good(roots, self._journal.event, self._ranks, patience_s, self._key)

    def is_in_memory(self, info: CheckpointInfo) -> bool:
        """Whether a checkpoint is one of those in memory."""
        return self.memory is not None and self.memory.holds(info)

    def load(self, info: CheckpointInfo, state: dict[str, Any]) -> None:
        """Load a checkpoint into `state`, in place."""
        self.storage.load(info, state)

    def forget_after(self, step: int) -> int:
        """Remove the checkpoints of more than `step` steps; the newest step that is left.

        Raises:
            RunError: another attempt has taken over, and they are its own.
        """
        self._journal.check_current()
        for saver in self._savers():
            forget_after(saver.root, step)
        left = committed(self.storage.root)
        return left[0].step if left else 0

    # -- on ----------------------------------------------------------------------------------------

    def is_overdue(self) -> bool:
        """Whether the last checkpoint to storage was too long ago; slow storage gets longer."""
        every_s = self._settings.every_s
        if every_s is None:
            return False
        return time.monotonic() - self._saved_at > max(every_s, 2 * self.storage.save_s)

    def if_due(self, step: int) -> None:
        """Save to memory and to storage, each at its own interval; to storage where a stage ends.

        A state that the guard mistrusts is kept only there. After a group's first step, when there
        is all of a state, the host memory for its copies begins to be made.
        """
        if not self._reserved:
            self._reserve(step)
        ends = step == self._job.last_step
        if self._guard.suspicious and not ends:
            return
        every = self._settings.memory_every
        if self.memory is not None and every and step % every == 0 and not ends:
            self._save(step, self.memory)
        if step % self._settings.every == 0 or ends or self.wanted:
            self._save(step, self.storage)

    def _reserve(self, step: int) -> None:
        """Have memory made for the copies that the rest of the stage asks for."""
        self._reserved = True
        self.storage.reserve(self._state())
        every = self._settings.memory_every
        if self.memory is not None and every and step + every <= self._job.last_step:
            self.memory.reserve(self._state())

    def finish(self, step: int, save: bool = False) -> None:
        """Wait for a group's last checkpoint; try it again where storage did not take it, since no
        next one will do better, as long as a run waits for storage.

        Args:
            save: whether to begin one first, whatever is due.
        """
        if save:
            self._save(step, self.storage)

        def has_failed() -> bool:
            self.wait(step)
            return bool(self._ranks.gather(self.failed)[0])

        pauses_s = pauses(STORAGE_S)
        while has_failed():
            # Rank 0's clock for all: they must save together, or not at all.
            pause_s = self._ranks.gather(next(pauses_s, None))[0]
            if pause_s is None:
                return
            time.sleep(pause_s)
            self._save(step, self.storage)

    def wait(self, step: int) -> None:
        """Wait for what is on its way."""
        for saver in self._savers():
            self._wait_for(saver, step)

    def _savers(self) -> list[Checkpointer]:
        """Memory first: of the same step, it is read the faster."""
        return [saver for saver in (self.memory, self.storage) if saver is not None]

    def _save(self, step: int, saver: Checkpointer) -> None:
        """Start a checkpoint of the state after `step` steps, once the one before is done."""
        started = time.perf_counter()
        self._wait_for(saver, step)
        if saver is self.storage:
            self._saved_at = time.monotonic()
        self._watchdog.expect("save" if saver.background else COMMIT, step)
        data_tokens, latent_tokens = self._job.plan.tokens_after(step)
        meta = {
            "attempt": self._journal.attempt,
            "data_tokens": data_tokens,
            "latent_tokens": latent_tokens,
        }
        saver.save(
            step,
            self._state(),
            meta,
            first=self._journal.flush,  # a committed step is not trained again: its line must stand
            prune=not self._guard.suspicious,  # a run may have to go back behind it
        )
        self._journal.timing(stall_s=time.perf_counter() - started)

    def _wait_for(self, saver: Checkpointer, step: int) -> None:
        """Wait until a save is committed, as long as storage was seen to take, and longer."""
        self._watchdog.expect(COMMIT, step)
        saver.wait()
        self._watchdog.bounds.saw(COMMIT, saver.save_s)
