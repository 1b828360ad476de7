"""Nodes that end one attempt after another, and when a run is better off without one. Pure.

    "failure" events, each laid to a node ──> to_leave_out ──> a "left_out" event ──> left_out

A GPU that fails each hour costs a run its restarts for weeks. Leaving its node out costs what the
node computes, or nothing where others are free. All of this is decided on the run's events, so the
next driver knows it too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

LEFT_OUT = "left_out"
MEMORY_S = 24 * 3600.0
"""How long a failure is held against a node, and how long a node is left out."""

Events = Sequence[Mapping[str, Any]]


def laid_to(
    failed: Mapping[int, str | None], nodes: Sequence[str], lost: Collection[str] = ()
) -> str | None:
    """The node that a failure is laid to: the one that was lost, if one was; else the one where all
    ranks that failed were, if there is.

    Ranks of other nodes may fail first, of waiting for one on the node that was lost.

    Args:
        failed: of each rank that failed, the node, where the failure says it.
        nodes: each rank's node, as the group told it; empty where it ended before.
        lost: those of these nodes that are lost.
    """
    if lost:
        return next(iter(lost)) if len(lost) == 1 else None
    found = {node or (nodes[rank] if rank < len(nodes) else None) for rank, node in failed.items()}
    return found.pop() if len(found) == 1 else None


def left_out(events: Events, now: float) -> frozenset[str]:
    """The nodes that are left out at a time (seconds since the epoch)."""
    return frozenset(event["node"] for event in _recent(events, LEFT_OUT, now))


def to_leave_out(
    events: Events,
    now: float,
    most: int,
    least: int,
    living: Callable[[], Collection[str]],
    room: Callable[[frozenset[str]], int],
) -> dict[str, Any] | None:
    """A node that is to be left out from now on, and why: the details of its event; None for none.

    It has ended `most` attempts, and since the first of them the restarts took a greater share of
    the time than the node's workers are of all. Hangs count for no node: whom all wait for and who
    waits look alike.

    Args:
        most: how many failures a node is allowed.
        least: how many workers must be left.
        living: the nodes that are there.
        room: how many workers the cluster holds without some nodes.
    """
    out = left_out(events, now)
    hung = {event["attempt"] for event in events if event["event"] == "hang"}
    of_node: dict[str, list[Mapping[str, Any]]] = {}
    for event in _recent(events, "failure", now):
        if event.get("node") and event["node"] not in out and event["attempt"] not in hung:
            of_node.setdefault(event["node"], []).append(event)
    for node, failures in of_node.items():
        if len(failures) < most or node not in living():
            continue
        costs_s = sum(event["costs_s"] for event in failures)
        share = costs_s / max(now - failures[0]["time"], 1.0)
        left, before = room(out | {node}), room(out)
        if left >= least and share > 1 - left / max(before, left):
            return {
                "node": node,
                "failures": len(failures),
                "costs_s": round(costs_s, 1),
                "workers": left,
            }
    return None


def _recent(events: Events, kind: str, now: float) -> Iterable[Mapping[str, Any]]:
    return (e for e in events if e["event"] == kind and now - e["time"] < MEMORY_S)
