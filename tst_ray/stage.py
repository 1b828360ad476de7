"""One stage of a run, from where it stands to its last step, over as many attempts as that takes.

    WAIT for room ──> ATTEMPT: one worker group ──> Ended or failed ──> WAIT …
      (says so)          │ supervised: growth, preemption, interrupts
                         └──> done │ interrupted │ gave up

    how an attempt ended                 what comes next
    -----------------------------------  -----------------------------------------------------------
    done                                 the stage is over
    grow, preemption: stopped with a     the next attempt, on the nodes that are there then; 0 steps
      checkpoint, because we asked         are repeated
    rollback                             the next attempt, from the checkpoint before the trouble
    a worker died, failed or hung        the next attempt, from the newest committed checkpoint; the
                                           run ends after `fault.max_failures` without progress, and
                                           may leave out a node that ended many (suspects.py)
    no room: others use the nodes        the next attempt, with fewer workers where that is allowed;
                                           no failure: a run waits for nodes as long as it takes
    interrupt: SIGTERM, Ctrl-C, or a     the run ends, to be resumed by the same command
      notice to the driver's own node
    failed_saves                         the run ends, its last good checkpoint intact

An attempt makes progress when it starts at a later step than the one before it did.

While a group trains, storage or the head node may fail for a while without harm: the supervisor
looks again. Between two groups it waits for them, as long as `timeouts.STORAGE_S`.
"""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from pipelines.errors import DataError, one_line
from tst_ray.checkpoint import newest_step
from tst_ray.elastic import Growth
from tst_ray.errors import Interrupted, RunError, UserError
from tst_ray.group import Group, GroupFailed
from tst_ray.growth import Growing
from tst_ray.hold import Hold
from tst_ray.interrupts import Interrupts
from tst_ray.job import DONE, FAILED_SAVES, GROW, INTERRUPT, PREEMPTION, Ended, Job, Place
from tst_ray.journal import charge, clear_stop, read_state, request_stop
from tst_ray.metrics import EVENT_FIELDS, EVENTS, try_event
from tst_ray.nodes import ASK_AGAIN_S, draining_nodes, lost_nodes, own_node
from tst_ray.plan import Phase
from tst_ray.room import Room, steadily
from tst_ray.sight import Sight
from tst_ray.storage import Storage, patiently
from tst_ray.suspects import LEFT_OUT, laid_to

Say = Callable[[str], None]

log = logging.getLogger(__name__)

_SUPERVISE_S = 0.5
_LOOK_FOR_NODES_S = 5.0
_FOLD_EVERY_S = 600.0  # an object store holds an object for each event, and a reader reads them all
_EVENTS_BYTES = 1 << 20  # of some days


class Stage:
    """Trains one stage.

    Args:
        job: what workers are told; of the run, all that the stage needs.
        phases: those of the stage; all have the same allowed world sizes.
        say: tells the user a line.
        vaults: the memory of the cluster (`memory.Vaults`); None for none.
        sight: which nodes see what the run needs; None where all do.
        held: the driver's hold on the run directory; None where nobody could take it.
    """

    def __init__(
        self,
        job: Job,
        phases: tuple[Phase, ...],
        say: Say,
        vaults: Any = None,
        sight: Sight | None = None,
        held: Hold | None = None,
    ) -> None:
        self.job, self.phases, self.say, self._vaults = job, phases, say, vaults
        self.run, self.config = Storage(job.run_url), job.config
        self._held = held or Hold()
        self.failures = 0
        self._attempts = self._before = 0
        self._trains = False  # whether the group at work has finished a step
        self._interrupts = Interrupts(self._on_interrupt)
        self._asked: str | None = None  # why the group at work was asked to stop
        self._asked_at = 0.0
        self._looked_at = 0.0
        self._folded_at = time.monotonic()
        self._blind: set[str] = set()  # the nodes that were said not to see all
        # more workers than a step has sequences would have fillers alone
        most = min(phases[0].max_workers, *(phase.num_sequences for phase in phases))
        self.room = Room(self.config, phases[0].min_workers, most, sight or Sight())
        self._growing = Growing(job, self.room)
        self._trouble = ""  # what the supervisor met last

    def train(self) -> None:
        """Train to the stage's last step.

        Raises:
            Interrupted: on request; the same command resumes.
            RunError: it cannot go on.
        """
        with self._interrupts.caught():
            while newest_step(self.run) < self.job.last_step:
                self._take(self._attempt())
            self._heed_interrupt()

    # -- attempts --------------------------------------------------------------------------------

    def _attempt(self) -> Ended | None:
        """One attempt; None where it failed and another may follow."""
        self._held.check()
        before = patiently(lambda: read_state(self.run))
        patiently(lambda: clear_stop(self.run))
        self._heed_interrupt()  # one that came before would be forgotten
        self._asked = None
        try:
            return self._one_attempt()
        except GroupFailed as failure:
            if failure.no_room:
                self._heed_interrupt()
            else:
                self._count(failure, before)
            return None

    def _one_attempt(self) -> Ended:
        if self.config.cluster.backend == "inline":
            return self._inline()
        self._trains = False
        world_size = self._wait_for_room()
        self._held.check()
        self._attempts += 1
        self._before = patiently(lambda: read_state(self.run)).get("attempt", 0)
        started = time.monotonic()
        readers = self.room.sight.where()
        group = Group(self.job, world_size, self.room.without, readers)
        while not group.wait(_SUPERVISE_S):
            self._held.check()
            try:
                self._supervise(world_size, started)
            except Exception as error:  # the group trains on, whatever keeps us from seeing it
                self._note_trouble(error)
        self._held.check()
        if self._asked:
            self._growing.stopped(self._asked_at)
        try:
            ended = group.outcome()
        except GroupFailed as failure:
            if failure.no_room:
                self._note_no_room(world_size)
            elif failure.started:
                self.room.ran(world_size)
            raise
        self.room.ran(world_size)
        return ended

    def _inline(self) -> Ended:
        """Train in this process: one worker, no Ray.

        Raises:
            RunError: training failed; its traceback is an event, since nothing else logs it.
        """
        from pipelines.ingest import read_inline
        from tst_ray.worker import train

        device = "cuda" if self.config.cluster.gpus_per_worker else "cpu"
        feeds = self.job.feeds
        try:
            return train(
                self.job,
                Place(device=device),
                lambda phase, step: read_inline(feeds[phase.index], step),
            )
        except (UserError, DataError, OSError):  # told in a line as they are
            raise
        except Exception as error:
            try_event(self.run, "error", traceback=traceback.format_exc())
            raise RunError(
                f"{self.run.url}: {type(error).__name__}: {one_line(error)}; see events.jsonl "
                "there for where; the same command tries again"
            ) from error
        finally:
            gc.collect()  # the trainer is in a cycle, and what is built next needs its model's room

    def _take(self, ended: Ended | None) -> None:
        """Act on how an attempt ended; return where the next one, if any, may start."""
        if ended is None:
            return
        self.failures = 0
        if ended.reason == INTERRUPT:
            raise self._interrupted()
        if ended.reason == FAILED_SAVES:
            raise RunError(
                f"{self.run.url}: {self.config.fault.max_failed_saves} checkpoints in a row could "
                "not be saved (fault.max_failed_saves); the newest good one is of step "
                f"{newest_step(self.run):,}; make room in run.storage, then run the same command"
            )
        if ended.reason == DONE and newest_step(self.run) < self.job.last_step:
            raise RunError(
                f"{self.run.url}: training reached step {ended.step}, but its checkpoint was not "
                "committed; see events.jsonl there, and run the same command again"
            )
        if ended.reason != DONE:
            self.say(f"step {ended.step:,}: {ended.reason}; going on from a checkpoint")

    def _count(self, failure: GroupFailed, before: dict[str, Any]) -> None:
        """Note a failure; too many in a row end the run.

        Raises:
            RunError: they are; or the run was interrupted anyway.
        """
        now = patiently(lambda: read_state(self.run))
        progress = now.get("attempt_from", 0) > before.get("attempt_from", -1)
        begun = now.get("attempt", 0) > before.get("attempt", 0)
        nodes = now.get("nodes", ()) if begun else ()
        self.failures = 1 if failure.started and progress else self.failures + 1
        try_event(
            self.run,
            "failure",
            error=str(failure),
            started=failure.started,
            attempt=now.get("attempt", 0),
            step=now.get("step", 0),
            in_a_row=self.failures,
            node=laid_to(failure.ranks, nodes, lost_nodes(nodes)),
            costs_s=round(self._growing.start_s, 1),
        )
        charge(self.run, "restart")
        if self._interrupts.by is not None:
            raise self._interrupted()
        most = self.config.fault.max_failures
        if self.failures > most:
            raise RunError(
                f"{self.run.url}: {failure}; the run gave up after {self.failures} failures in a "
                "row without progress (fault.max_failures); the same command tries again"
            )
        what = str(failure) if failure.started else f"the workers did not start: {failure}"
        self.say(f"step {now.get('step', 0):,}: {what}; going on from the newest checkpoint")

    def _note_trouble(self, error: Exception) -> None:
        """Say once what keeps the supervisor from its work; it goes on looking."""
        trouble = f"{type(error).__name__}: {error}"
        if trouble != self._trouble:
            self._trouble = trouble
            log.warning("the workers go on, unwatched for now: %s", trouble)

    def _heed_interrupt(self) -> None:
        """End a run that was interrupted while a group ended for another reason, or was done."""
        if self._interrupts.by is not None and newest_step(self.run) < self.job.plan.total_steps:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        step = newest_step(self.run)  # not where the group ended: that may not have been saved
        at = f"with a checkpoint of step {step:,}" if step else "before the first checkpoint"
        by = self._interrupts.by or signal.SIGTERM  # as for a driver whose node goes
        return Interrupted(f"{self.run.url}: stopped, {at}; the same command resumes", by)

    def _on_interrupt(self) -> None:
        """The first signal. A group is asked by the supervisor; this process itself, here."""
        if self.config.cluster.backend == "inline":
            request_stop(self.run, INTERRUPT)
        line = "stopping: finishing the step, then a checkpoint (Ctrl-C again stops at once)"
        # A thread: the terminal may stand still, and the supervisor must not.
        threading.Thread(target=self.say, args=(line,), daemon=True).start()

    # -- room --------------------------------------------------------------------------------------

    def _wait_for_room(self) -> int:
        """How many workers to start: as many as fit, once that is enough; says so when it waits."""
        least = self.room.least
        steadily(self.room.sight.look)
        self._leave_out()
        self.room.ask(self.room.most)
        steadily(lambda: self.room.sight.settle(self._need_not_wait))
        self._heed_interrupt()
        room = steadily(self.room.now)
        self._tell_of_the_blind()
        if room < least:
            self.say(f"waiting for nodes: room for {room} of at least {least} workers")
            try_event(self.run, "waiting", room=room, min_workers=least)
            charge(self.run, "restart")
            asked_at = time.monotonic()
            while (room := steadily(self.room.now)) < least:
                if self._interrupts.by is not None:
                    raise self._interrupted()
                self._held.check()
                time.sleep(_SUPERVISE_S)
                charge(self.run, "waiting_for_nodes")
                self._tell_of_the_blind()
                if time.monotonic() - asked_at > ASK_AGAIN_S:
                    asked_at = time.monotonic()
                    self._leave_out()  # fewer others may be left, and the node do after all
                    self.room.ask(self.room.most)
        before = patiently(lambda: read_state(self.run)).get("world_size")
        if self._attempts and before != room:
            try_event(self.run, "resize", step=newest_step(self.run), workers=room, before=before)
            self._growing.resized()
        steadily(self._place_vaults)
        return room

    def _place_vaults(self) -> None:
        """Keep checkpoints in the memory of nodes that may have workers; once workers have written
        there, of theirs alone: a vault keeps an autoscaler from taking its node.

        One node has no other for its second copies: nothing is ended then.
        """
        if self._vaults is None:
            return
        nodes, at_work = self.room.nodes(), set()
        every = self.config.checkpoint.memory_every
        if self._trains and every is not None and self._steps_of_group() >= 2 * every:
            at_work = self._nodes_at_work()
        if len(at_work) > 1:
            nodes = at_work
            self._vaults.keep_to(nodes)
        self._vaults.cover(nodes)

    def _need_not_wait(self) -> bool:
        """Whether there is room for all workers, or a reason to end."""
        return self._interrupts.by is not None or self.room.now() >= self.room.most

    def _tell_of_the_blind(self) -> None:
        """Tell of each node that does not see what the run needs, once until it does."""
        problems = self.room.sight.problems()
        for node in problems.keys() - self._blind:
            try_event(self.run, "unseen", node=node, why=problems[node])
            self.say(f"{problems[node]}: going on without it until that is mended")
        self._blind = set(problems)

    def _leave_out(self) -> None:
        """Go on without a node that ended one attempt after another, where that pays."""
        if self.config.fault.max_node_failures is None:
            return
        events = patiently(lambda: self.run.tail_records(EVENTS, _EVENTS_BYTES, EVENT_FIELDS))
        if suspect := steadily(lambda: self.room.leave_out(events)):
            try_event(self.run, LEFT_OUT, **suspect)
            self.say(
                f"{suspect['failures']} attempts ended on node {suspect['address']}: going on "
                "without it (fault.max_node_failures)"
            )

    def _note_no_room(self, world_size: int) -> None:
        """So many workers were not given a place; the next attempt is with fewer, or waits."""
        is_news = self.room.lacked(world_size)
        charge(self.run, "waiting_for_nodes")
        if is_news:
            try_event(self.run, "no_room", workers=world_size, left=self.room.left)
            self.say(f"others use the nodes: no room for {world_size} workers; trying again")

    # -- supervision -------------------------------------------------------------------------------

    def _supervise(self, world_size: int, started: float) -> None:
        """One look at a group at work, and a request to stop where there is reason."""
        if not self._trains and self._steps_of_group():
            self._trains = True
            self._growing.begun(started)
        if time.monotonic() - self._folded_at > _FOLD_EVERY_S:
            self._folded_at = time.monotonic()
            self.run.fold(EVENTS)
        if self._asked is not None:
            return
        if self._interrupts.by is not None:
            self._ask(INTERRUPT)
        elif (leaving := draining_nodes()) and (own := own_node()) in leaving:
            self._ask(INTERRUPT)
            try_event(self.run, "preemption", nodes=[own], driver=True)
            self.say("the node of this driver will be taken away: a checkpoint, then the end")
        elif leaving := leaving & self._nodes_at_work():
            self._ask(PREEMPTION)
            try_event(self.run, "preemption", nodes=sorted(leaving))
            self.say(f"{len(leaving)} node(s) will be taken away: checkpoint, then off them")
        elif self.room.sight.is_looking or time.monotonic() - self._looked_at > _LOOK_FOR_NODES_S:
            self._looked_at = time.monotonic()
            self.room.sight.look()
            self._tell_of_the_blind()
            self._place_vaults()
            if growth := self._growing.worth(world_size, self._nodes_at_work()):
                self._tell_of_growth(growth)
                self._ask(GROW)

    def _steps_of_group(self) -> int:
        """Steps that the group at work has finished, as run.json has it."""
        state = read_state(self.run)
        begun = state.get("attempt", 0) > self._before
        return int(state["step"] - state["attempt_from"]) if begun else 0

    def _nodes_at_work(self) -> set[str]:
        """The nodes of the group at work; none while it starts: run.json is of the one before."""
        state = read_state(self.run)
        return set(state.get("nodes", ())) if state.get("attempt", 0) > self._before else set()

    def _ask(self, reason: str) -> None:
        request_stop(self.run, reason)
        self._asked, self._asked_at = reason, time.monotonic()

    def _tell_of_growth(self, growth: Growth) -> None:
        try_event(
            self.run,
            "grow",
            step=self.job.last_step - growth.steps_left,
            workers=growth.possible,
            before=growth.world_size,
            saves_s=round(growth.saved_s, 1),
            costs_s=round(growth.restart_s, 1),
        )
        self.say(
            f"{growth.possible} workers fit now, {growth.world_size} train: growing saves about "
            f"{growth.saved_s:.0f} s and costs {growth.restart_s:.0f} s"
        )
