"""Which node a failure is laid to, and when a run goes on without one; pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tst_ray.suspects import MEMORY_S, laid_to, left_out, to_leave_out

NOW = 1e9
HOUR = 3600.0


@pytest.mark.parametrize(
    ("failed", "nodes", "laid"),
    [
        ({2: None}, ["a", "a", "b", "b"], "b"),
        ({2: None, 3: None}, ["a", "a", "b", "b"], "b"),
        ({1: None, 2: None}, ["a", "a", "b", "b"], None),
        ({}, ["a", "b"], None),
        ({1: None}, [], None),
        ({1: "b"}, [], "b"),
        ({0: None, 1: "b"}, [], None),
    ],
    ids=["one", "all of a node", "of two", "none", "too early", "it says", "one of two says"],
)
def test_a_failure_is_laid_to_the_one_node_where_all_that_failed_were(
    failed: dict[int, str | None], nodes: list[str], laid: str | None
) -> None:
    assert laid_to(failed, nodes) == laid


def test_a_node_that_was_lost_is_to_blame_rather_than_who_waited_for_it() -> None:
    """Rank 0's collective fails first, on a node that is well."""
    assert laid_to({0: "a"}, ["a", "b"], lost={"b"}) == "b"
    assert laid_to({0: "a"}, ["a", "b", "c"], lost={"b", "c"}) is None
    assert laid_to({0: "a"}, ["a", "b"], lost=()) == "a"


def failures(*ages_s: float, node: str | None = "bad", costs_s: float = 60.0) -> list[Any]:
    """Failures so many seconds ago, each in an attempt of its own."""
    return [
        {"event": "failure", "time": NOW - age, "node": node, "costs_s": costs_s, "attempt": age}
        for age in ages_s
    ]


def holding(most: int, **workers: int) -> Callable[[frozenset[str]], int]:
    """Nodes that hold so many workers each, of which so many are wanted."""
    return lambda without: min(
        most, sum(number for name, number in workers.items() if name not in without)
    )


def all_there() -> set[str]:
    return {"bad", "good", "other"}


SPARE = holding(8, bad=4, good=4, other=4)
NO_SPARE = holding(8, bad=4, good=4)


def test_with_nodes_to_spare_a_node_is_left_out_when_it_has_ended_enough_attempts() -> None:
    told = to_leave_out(failures(9 * HOUR, 5 * HOUR, 0), NOW, 3, 1, all_there, SPARE)
    assert told == {"node": "bad", "failures": 3, "costs_s": 180.0, "workers": 8}
    assert to_leave_out(failures(9 * HOUR, 0), NOW, 3, 1, all_there, SPARE) is None
    assert to_leave_out(failures(9 * HOUR, 0), NOW, 2, 1, all_there, SPARE) is not None


def test_without_any_to_spare_only_when_its_restarts_cost_more_than_it_computes() -> None:
    assert to_leave_out(failures(9 * HOUR, 5 * HOUR, 0), NOW, 3, 1, all_there, NO_SPARE) is None
    # Of the node's half of all, its restarts take 45 % of the time, then 60 %.
    assert to_leave_out(failures(400, 200, 0), NOW, 3, 1, all_there, NO_SPARE) is None
    told = to_leave_out(failures(300, 150, 0), NOW, 3, 1, all_there, NO_SPARE)
    assert told is not None
    assert told["workers"] == 4


def test_a_node_that_is_gone_is_not_left_out() -> None:
    assert to_leave_out(failures(400, 200, 0), NOW, 3, 1, lambda: {"good", "other"}, SPARE) is None


def test_enough_workers_are_left() -> None:
    soon = failures(30, 20, 10, 0)
    assert to_leave_out(soon, NOW, 3, 4, all_there, NO_SPARE) is not None
    assert to_leave_out(soon, NOW, 3, 5, all_there, NO_SPARE) is None
    assert to_leave_out(soon, NOW, 3, 1, all_there, holding(8, bad=4)) is None


def test_what_is_laid_to_no_node_or_was_a_hang_counts_for_none() -> None:
    events = failures(400, 200, 0)
    assert to_leave_out(failures(400, 200, 0, node=None), NOW, 3, 1, all_there, SPARE) is None
    older = {"event": "failure", "time": NOW, "attempt": 1}  # of a version that laid it to none
    assert to_leave_out([older] * 3, NOW, 3, 1, all_there, SPARE) is None
    hang = {"event": "hang", "time": NOW, "attempt": events[1]["attempt"], "rank": 0}
    assert to_leave_out(events, NOW, 3, 1, all_there, SPARE) is not None
    assert to_leave_out([*events, hang], NOW, 3, 1, all_there, SPARE) is None


def test_a_day_later_it_is_forgotten() -> None:
    events = [*failures(400, 200, 0), {"event": "left_out", "time": NOW, "node": "bad"}]
    assert left_out(events, NOW + 1) == {"bad"}
    assert to_leave_out(events, NOW + 1, 3, 1, all_there, SPARE) is None  # it is out
    later = NOW + MEMORY_S + 1
    assert left_out(events, later) == frozenset()
    assert to_leave_out(events, later, 3, 1, all_there, SPARE) is None


def test_a_second_node_is_judged_by_what_is_left() -> None:
    out = {"event": "left_out", "time": NOW, "node": "other"}
    rare = failures(9 * HOUR, 5 * HOUR, 0)
    assert to_leave_out(rare, NOW, 3, 1, all_there, SPARE) is not None
    assert (
        to_leave_out([out, *rare], NOW, 3, 1, all_there, SPARE) is None
    )  # none is to spare any more
