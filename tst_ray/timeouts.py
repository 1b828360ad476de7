"""The time-outs by which a run notices trouble, and how they nest.

Where two watch the same thing, the inner one is the shorter: it speaks first, with the most to say,
and the outer one only catches what it cannot. Those of single requests stand in their modules.

    what is waited for                      how long             what happens then
    --------------------------------------  -------------------  ---------------------------------
    a request to stop, seen by rank 0       STOP_POLL_S          all ranks stop after the same step
    a worker's death, seen by Ray Train     GROUP_POLL_S         the attempt ends, the next starts
    one beat of a worker (a batch to come,  `Bounds`: 10 x the   its watchdog writes every thread's
      a step, a piece of an evaluation, a     longest seen, and    stack, then ends the process: the
      copy of the state)                      fault.hang_s at      attempt ends, the next starts
                                              least
    the first beats, of which none is       fault.start_s        the same
      known: imports, compile, load
    a checkpoint to be committed            `Bounds`: 10 x the   the same
                                              longest seen, but
                                              COLLECTIVE_S at most
                                              and fault.start_s at
                                              least
    a worker told to end by its watchdog    ABORT_GRACE_S        it is killed (SIGKILL)
    the ranks of a failed group, to leave   GROUP_END_S          they are killed
      their collectives
    the places of a group, to be given      GROUP_START_S        the nodes are counted again, and
                                                                   so many workers not tried again
                                                                   for NO_ROOM_S, where fewer do
                                                                   (up to an hour, where a group
                                                                   that trained was ended for it)
    a new node, to say whether it sees      LOOK_S               it is left out, and asked again
      what the run needs                                           later
    storage to answer, where a run cannot   STORAGE_S            an error: of a worker, the attempt
      go on without                                                ends; of the driver, the run
    a collective, or a group's rendezvous   COLLECTIVE_S         an error, where no watchdog saw it
    a worker to answer Ray Train            WORKER_ANSWER_S      the attempt ends
    a lease on remote storage               hold._LEASE_S        another driver may take the run

Nothing here limits how long a run waits for nodes: an autoscaler may take hours, and a run that
waits says so.
"""

from __future__ import annotations

from collections import deque

STOP_POLL_S = 0.5
GROUP_POLL_S = 0.25  # Ray Train's default is 2; each poll is one small call a worker
ABORT_GRACE_S = 5.0
GROUP_END_S = 5
GROUP_START_S = 60.0
LOOK_S = 120.0
STORAGE_S = 300.0
NO_ROOM_S = 600.0
COLLECTIVE_S = 1800.0
WORKER_ANSWER_S = 2400.0

COMMIT = "commit"
"""The beat of waiting for a checkpoint: storage that is slow is no hang."""

_FACTOR = 10.0
_KNOWN = 3  # beats of a kind after which its bound is the run's own
_REMEMBERED = 200


class Bounds:
    """How long each kind of beat may take, from how long the run's own have taken.

    Args:
        least_s: no bound is below this; for the pauses of a busy machine.
        unknown_s: the bound of a kind of beat until three were seen.
    """

    def __init__(self, least_s: float, unknown_s: float) -> None:
        self.least_s, self.unknown_s = least_s, max(unknown_s, least_s)
        self._seen: dict[str, deque[float]] = {}

    def saw(self, kind: str, seconds: float) -> None:
        """Note how long a beat took."""
        self._seen.setdefault(kind, deque(maxlen=_REMEMBERED)).append(seconds)

    def forget(self, *kinds: str) -> None:
        """What was seen of these kinds says nothing of those to come."""
        for kind in kinds:
            self._seen.pop(kind, None)

    def bound_s(self, kind: str) -> float:
        """Seconds after which a beat of this kind is taken for a hang."""
        seen = self._seen.get(kind, ())
        if kind == COMMIT:
            return max(self.unknown_s, min(_FACTOR * max(seen, default=0.0), COLLECTIVE_S))
        if len(seen) < _KNOWN:
            return self.unknown_s
        return max(self.least_s, _FACTOR * max(seen))
