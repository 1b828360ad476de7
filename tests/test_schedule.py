"""Fault schedules: functions of their seed, and chains."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.chaos import (
    KINDS,
    Fault,
    Faults,
    schedule,
)
from tst_ray.errors import ConfigError

GOLDEN = [("freeze", 2), ("drain", 14), ("kill_worker", 25), ("kill_node", 39)]
GOLDEN_CHOICE = 0.6509344730398537


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert schedule(7, 20, 50, 2000) == schedule(7, 20, 50, 2000)
    assert len({schedule(seed, 20, 50, 2000) for seed in range(50)}) == 50


def test_a_schedule_of_today_is_a_schedule_of_tomorrow() -> None:
    """Reports name seeds: another Python or another release must give the same faults."""
    assert [(fault.kind, fault.at_step) for fault in schedule(7, 4, 1, 40)] == GOLDEN
    assert schedule(7, 4, 1, 40)[0].choice == pytest.approx(GOLDEN_CHOICE, abs=1e-12)


@pytest.mark.parametrize(("num_faults", "first", "last"), [(1, 3, 3), (20, 5, 24), (20, 5, 2000)])
def test_each_fault_has_a_step_of_its_own_within_bounds(
    num_faults: int, first: int, last: int
) -> None:
    for seed in range(30):
        steps = [fault.at_step for fault in schedule(seed, num_faults, first, last)]
        assert steps == sorted(set(steps))
        assert len(steps) == num_faults
        assert first <= steps[0] and steps[-1] <= last


def test_steps_are_spread() -> None:
    for seed in range(30):
        steps = [fault.at_step for fault in schedule(seed, 10, 1, 1000)]
        assert [(step - 1) // 100 for step in steps] == list(range(10))


def test_every_kind_comes_equally_often() -> None:
    kinds = [fault.kind for fault in schedule(3, 2 * len(KINDS), 1, 1000, KINDS)]
    assert sorted(kinds) == sorted(2 * KINDS)
    assert kinds[: len(KINDS)] != list(KINDS)


def test_choices_and_durations_have_their_range() -> None:
    faults = [fault for seed in range(20) for fault in schedule(seed, 16, 1, 100, KINDS)]
    assert all(0 <= fault.choice < 1 for fault in faults)
    assert len({fault.choice for fault in faults}) == len(faults)
    lasting = {fault.kind for fault in faults if fault.seconds is not None}
    assert lasting == {"drain", "fill_disk"}
    assert all(5 <= fault.seconds <= 30 for fault in faults if fault.seconds is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 21, 5, 24), "21 faults need as many steps, and from 5 to 24 there are 20"),
        ((0, 1, 5, 4), "there are 0"),
        ((0, -1, 5, 9), "-1 faults"),
        ((0, 1, 1, 9, ()), "no kinds"),
        ((0, 1, 1, 9, ("meteor",)), "'meteor': use one of kill_worker"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        schedule(*arguments)


def test_faults_are_chained_and_come_in_the_order_of_their_steps() -> None:
    faults = (
        Faults()
        .kill_node_at(step=12)
        .fail_at(rank=1, step=7)
        .freeze_at(rank=0, step=20, seconds=3)
        .drain_at(step=21, deadline_s=5)
        .add_node_at(step=22)
        .damage_checkpoint_at(step=23, how="cut")
        .fill_disk_at(step=24, seconds=2)
        .kill_driver_at(step=25)
    )
    assert faults == (
        Fault("kill_worker", 7, rank=1),
        Fault("kill_node", 12),
        Fault("freeze", 20, rank=0, seconds=3),
        Fault("drain", 21, seconds=5),
        Fault("add_node", 22),
        Fault("damage_checkpoint", 23, how="cut"),
        Fault("fill_disk", 24, seconds=2),
        Fault("kill_driver", 25),
    )
    assert Faults() == ()


def test_a_fault_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="'bend': use one of cut, flip, remove, unmark"):
        Faults().damage_checkpoint_at(step=1, how="bend")
    with pytest.raises(ConfigError, match="fill_disk needs `seconds`"):
        Fault("fill_disk", 1)
