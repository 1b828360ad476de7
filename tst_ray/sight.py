"""Which nodes see a run's folder: a task on each has looked before anything of the run goes there.

    Sight ── look ──> a task on every node that is new ──> unseen │ where │ problems

A node that joins without the mount would find no shards there, and take every checkpoint for
damaged: a healthy run would end with it. What is remote is there for all nodes; then nobody looks,
and work may go anywhere.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from tst_ray.session import ASK_AGAIN_S, address_of, living_nodes, only_on, own_node

_LOOK_S = 120.0  # for a node to start a process and look
_PAUSE_S = 0.1


@dataclass(frozen=True)
class _Look:
    """One that is under way: the task, and since when."""

    task: Any
    since: float


@dataclass(frozen=True)
class _Found:
    """What was wrong on a node, None for nothing, and when that was so."""

    problem: str | None
    at: float


class Sight:
    """The nodes that see a folder, and those that do not, or have not said so yet.

    Args:
        path: a file in it, on this machine; None where nobody needs to look.
    """

    def __init__(self, path: str | None = None) -> None:
        self._path = path
        self._living: frozenset[str] = frozenset()
        self._looks: dict[str, _Look] = {}
        self._found: dict[str, _Found] = {}

    def look(self) -> None:
        """Take in what was found, and begin to look where nobody has; waits for nothing.

        Where something was wrong it is looked again after a while: somebody may have mended it.
        """
        if self._path is None:
            return
        now = time.monotonic()
        self._living = frozenset(node.node_id for node in living_nodes())
        self._found.setdefault(own_node(), _Found(None, now))
        for node, look in list(self._looks.items()):
            if _is_done(look.task):
                del self._looks[node]
                self._found[node] = _Found(_problem(look.task, node, self._path), now)
        for node in self._living - self._looks.keys():
            found = self._found.get(node)
            if found is None or (found.problem and now - found.at > ASK_AGAIN_S):
                self._looks[node] = _Look(_begin(node, self._path), now)

    def settle(self) -> None:
        """Look, and wait for every node that was not looked at before; not for ever."""
        self.look()
        while any(
            time.monotonic() - self._looks[node].since < _LOOK_S
            for node in (self._living & self._looks.keys()) - self._found.keys()
        ):
            time.sleep(_PAUSE_S)
            self.look()

    def unseen(self) -> frozenset[str]:
        """The living nodes that are not to be used (yet)."""
        seeing = {node for node, found in self._found.items() if found.problem is None}
        return self._living - seeing

    def problems(self) -> dict[str, str]:
        """What is wrong on which living nodes."""
        found = {node: self._found[node].problem for node in self._living & self._found.keys()}
        return {node: problem for node, problem in sorted(found.items()) if problem}

    def where(self) -> dict[str, str]:
        """The label selector for work that may go to any node that sees the folder."""
        return {} if self._path is None else only_on(self._living - self.unseen())


def sees(path: str) -> bool:
    """Whether there is a file of that path where this runs."""
    return os.path.exists(path)


def _begin(node: str, path: str) -> Any:
    """Begin to look on a node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(sees).options(num_cpus=0, scheduling_strategy=there).remote(path)


def _is_done(task: Any) -> bool:
    import ray

    return bool(ray.wait([task], timeout=0)[0])


def _problem(task: Any, node: str, path: str) -> str | None:
    """What a look that is done has found to be wrong."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        if ray.get(task):
            return None
        what = f"does not see {path}"
    except RayTaskError as error:  # the look itself cannot fail
        what = f"cannot import this package ({str(error).strip().splitlines()[-1][:300]})"
    except RayError as error:
        what = f"does not answer ({type(error).__name__})"
    return f"node {address_of(node)} {what}"
