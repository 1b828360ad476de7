"""Whether a step may change the model: not-finite numbers and lasting spikes of the loss.

    loss, gradient norm of a step ──> Guard.observe ──> a mark │ none
                                            └─ too many ──> Guard.rollback ──> (steps, why)

A pure state machine over numbers that every rank has alike, so that all ranks decide alike. A step
whose loss or gradient norm is not finite never updates the weights; `max_skipped` of them in a row,
or a loss far above its recent median for `spike_steps` in a row, are beyond waiting: the run goes
back to the last checkpoint before them and passes over their data.

What the guard knows is a function of the steps before and their marks, so `resume` rebuilds it from
the log: a run that was killed decides as one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from tst_ray.settings import FaultConfig

NOT_FINITE, SPIKE = "not_finite", "spike"
PASSED_OVER = "passed_over"  # the mark of a step whose data was found offending, and not trained on

_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAST_SIGMA = 0.01  # nats; a loss that hardly moves must not make every wobble a spike


@dataclass(frozen=True)
class Rollback:
    """Go back before `first_step` and pass over the data of [first_step, last_step].

    Steps count finished steps before them: 0 is the first.
    """

    first_step: int
    last_step: int
    why: str


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether a step's numbers allow an update."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


class Guard:
    """Watches one run's losses.

    Args:
        settings: the run's; `spike_z` None switches the spike guard off.

    The window never reaches over the start of a phase: around the switch the loss changes its
    meaning, and 1–2 nats are normal. Until it is full again there are no spikes.
    """

    def __init__(self, settings: FaultConfig) -> None:
        self._settings = settings
        self._window: deque[float] = deque(maxlen=settings.spike_window)
        self._bad = 0  # steps in a row that were not finite …
        self._high = 0  # … and that were spikes
        self._bad_from = self._high_from = 0
        self._why = ""

    @property
    def suspicious(self) -> bool:
        """Whether the last step was not finite, or a spike: no state to keep as a checkpoint."""
        return self._bad > 0 or self._high > 0

    def resume(self, records: Iterable[tuple[int, float | None, str | None]]) -> None:
        """Take up the steps before, in order.

        Args:
            records: of each, the steps finished before it, its loss, and the mark it was given.
        """
        for step, loss, mark in records:
            if mark == NOT_FINITE:
                self._count_bad(step)
            elif mark == SPIKE:
                self._count_high(step)
            elif mark is None and loss is not None:
                self._bad = self._high = 0
                self._window.append(loss)

    def start_phase(self) -> None:
        """A phase begins: the losses so far say nothing about those to come."""
        self._window.clear()
        self._bad = self._high = 0

    def observe(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Take in the step after `step` finished ones; the mark it is given, None for none."""
        if not is_finite(loss, grad_norm):
            self._count_bad(step)
            self._why = f"loss {loss} and gradient norm {grad_norm}"
            return NOT_FINITE
        if self._is_spike(loss):
            self._count_high(step)
            self._why = f"loss {loss:.3f} after a median of {statistics.median(self._window):.3f}"
            return SPIKE
        self._bad = self._high = 0
        self._window.append(loss)
        return None

    def _count_bad(self, step: int) -> None:
        self._bad_from = step if self._bad == 0 else self._bad_from
        self._bad += 1

    def _count_high(self, step: int) -> None:
        self._high_from = step if self._high == 0 else self._high_from
        self._bad, self._high = 0, self._high + 1

    def rollback(self, step: int) -> Rollback | None:
        """What to go back for after the step after `step` finished ones; None to go on."""
        settings = self._settings
        if self._high >= settings.spike_steps:
            return Rollback(self._high_from, step, f"{self._why}, {self._high} such steps")
        if self._bad >= settings.max_skipped:
            return Rollback(self._bad_from, step, f"{self._why}, {self._bad} steps in a row")
        return None

    def _is_spike(self, loss: float) -> bool:
        """Whether the loss is far above the window, by a z-score that outliers do not move."""
        if self._settings.spike_z is None or len(self._window) < self._settings.spike_window:
            return False
        median = statistics.median(self._window)
        deviation = statistics.median(abs(value - median) for value in self._window)
        sigma = max(_MAD_TO_SIGMA * deviation, _LEAST_SIGMA)
        return (loss - median) / sigma > self._settings.spike_z
