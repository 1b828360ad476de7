"""The guard: what is marked, when it is too much, and that a restart changes no decision."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tst_ray.guard import NOT_FINITE, PASSED_OVER, SPIKE, Guard, Rollback, is_finite
from tst_ray.settings import FaultConfig


def settings(**changes: Any) -> FaultConfig:
    thresholds = {"max_skipped": 3, "spike_z": 10.0, "spike_window": 16, "spike_steps": 4}
    return FaultConfig(**(thresholds | changes))


def calm(seed: int, count: int) -> list[float]:
    draw = random.Random(seed)
    return [3.0 + 0.05 * draw.random() for _ in range(count)]


def run(guard: Guard, losses: list[float], first: int = 0) -> tuple[list[str | None], list[int]]:
    """The marks, and the steps after which the guard wanted to go back."""
    marks, wanted = [], []
    for step, loss in enumerate(losses, start=first):
        marks.append(guard.observe(step, loss, 1.0))
        if guard.rollback(step):
            wanted.append(step)
    return marks, wanted


@pytest.mark.parametrize(
    ("loss", "norm", "finite"),
    [(1.0, 1.0, True), (math.nan, 1.0, False), (1.0, math.inf, False), (-math.inf, 1.0, False)],
)
def test_both_numbers_must_be_finite(loss: float, norm: float, finite: bool) -> None:
    assert is_finite(loss, norm) == finite
    assert (Guard(settings()).observe(0, loss, norm) == NOT_FINITE) == (not finite)


def test_few_steps_that_are_not_finite_are_waited_out() -> None:
    guard = Guard(settings())
    marks, wanted = run(guard, [3.0, math.nan, math.inf, 3.0, math.nan, 3.0])
    assert marks == [None, NOT_FINITE, NOT_FINITE, None, NOT_FINITE, None]
    assert wanted == []
    assert not guard.suspicious


def test_too_many_in_a_row_name_all_of_them() -> None:
    guard = Guard(settings())
    run(guard, [3.0, 3.0, math.nan, math.nan, math.nan])
    assert guard.rollback(4) == Rollback(2, 4, "loss nan and gradient norm 1.0, 3 steps in a row")
    assert guard.suspicious


def test_a_lasting_spike_is_gone_back_for_and_a_short_one_is_not() -> None:
    short = [*calm(0, 30), 5.0, 5.0, 5.0, *calm(1, 10)]
    guard = Guard(settings())
    marks, wanted = run(guard, short)
    assert [step for step, mark in enumerate(marks) if mark == SPIKE] == [30, 31, 32]
    assert wanted == []
    guard = Guard(settings())
    assert run(guard, [*calm(0, 30), 5.0, 5.0, 5.0, 5.0])[1] == [33]
    rollback = guard.rollback(33)
    assert rollback is not None
    assert (rollback.first_step, rollback.last_step) == (30, 33)


def test_a_step_that_is_not_finite_within_a_spike_does_not_hide_where_it_began() -> None:
    guard = Guard(settings())
    assert run(guard, [*calm(0, 30), 5.0, 5.0, math.nan, 5.0, 5.0])[1] == [34]
    rollback = guard.rollback(34)
    assert rollback is not None
    assert (rollback.first_step, rollback.last_step) == (30, 34)


def test_a_loss_that_falls_or_wobbles_is_no_spike() -> None:
    falling = [10.0 * 0.97**step for step in range(100)]
    assert run(Guard(settings()), falling)[0] == [None] * 100
    still = [3.0] * 40 + [3.05] * 20  # a spread of 0 must not make every wobble a spike
    assert run(Guard(settings()), still)[0] == [None] * 60


def test_around_the_switch_there_are_no_spikes() -> None:
    """1–2 nats are normal there: the window starts anew with the phase."""
    guard = Guard(settings())
    run(guard, calm(0, 30))
    guard.start_phase()
    assert run(guard, [5.0 - 0.05 * n for n in range(30)], first=30)[0] == [None] * 30
    unaware = Guard(settings())
    run(unaware, calm(0, 30))
    assert run(unaware, [5.0] * 4, first=30)[1] == [33]


def test_the_spike_guard_can_be_switched_off() -> None:
    assert run(Guard(settings(spike_z=None)), [*calm(0, 30), *[9.0] * 20])[1] == []


@pytest.mark.parametrize("killed_at", range(63))
def test_a_guard_rebuilt_from_the_log_decides_as_the_one_that_lived(killed_at: int) -> None:
    losses = [*calm(2, 25), 6.0, 6.0, *calm(3, 10), math.nan, math.nan, *calm(4, 20), *[6.0] * 4]
    whole = Guard(settings())
    marks, wanted = run(whole, losses)
    assert wanted == [len(losses) - 1]

    first = Guard(settings())
    run(first, losses[:killed_at])
    second = Guard(settings())
    told = zip(losses[:killed_at], marks[:killed_at], strict=True)
    second.resume(
        (step, None if math.isnan(loss) else loss, mark) for step, (loss, mark) in enumerate(told)
    )
    assert second.suspicious == first.suspicious
    rest = run(second, losses[killed_at:], first=killed_at)
    assert rest == (marks[killed_at:], wanted)
    assert second.rollback(wanted[0]) == whole.rollback(wanted[0])


def test_a_guard_rebuilt_within_a_phase_decides_as_the_one_that_lived() -> None:
    """What was not finite before the switch counts for neither: the log is read from there on."""
    whole, rebuilt = Guard(settings()), Guard(settings())
    most = settings().max_skipped
    assert run(whole, [*calm(0, 30), *[math.nan] * (most - 1)])[1] == []
    whole.start_phase()
    assert not whole.suspicious
    assert whole.observe(40, math.nan, 1.0) == NOT_FINITE
    rebuilt.resume([(40, None, NOT_FINITE)])
    assert whole.rollback(40) == rebuilt.rollback(40) is None


def test_steps_passed_over_tell_nothing() -> None:
    guard = Guard(settings())
    guard.resume([(0, 3.0, None), *((step, None, PASSED_OVER) for step in (1, 2, 3))])
    assert not guard.suspicious
    assert guard.rollback(3) is None
