"""Which nodes see a run's files: a task on each has looked before workers or readers go there.

    needed_everywhere ──> the files
    Sight ── look ──> a task on every node that is new ──> unseen │ where │ problems

A node that joins without the mount would find no shards there, and take every checkpoint for
damaged; one without an object store's package or credentials could not even say so: a healthy run
would end with it. In a Ray of this machine alone nobody looks, and work may go anywhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pyarrow.fs import FileType

from pipelines.errors import DataError, one_line
from pipelines.storage import absolute, locate, write_atomically
from tst_ray.corpus import cache_folder, shards_folder
from tst_ray.errors import RunError, UserError, last_line
from tst_ray.nodes import address_of, living_nodes, only_on, own_node
from tst_ray.runstore import CONFIG, MANIFEST, PLAN
from tst_ray.settings import Config
from tst_ray.storage import Storage, patiently
from tst_ray.timeouts import LOOK_S

log = logging.getLogger(__name__)

_SEEN = ".seen"  # stands for shards that are still to come
_PAUSE_S = 0.1
_PATIENCE_S = 60.0  # of a look, with storage that does not answer; less than LOOK_S
_FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 600.0
"""Before a node is looked at again, twice as long each time: a look keeps it from being idle, and
an autoscaler from taking it away."""


@dataclass(frozen=True)
class _Look:
    """One that is under way: its task, since when, and how many went before it."""

    task: Any
    since: float
    number: int


@dataclass(frozen=True)
class _Found:
    """What a look found: whether the node sees, what is wrong where that is known, and when."""

    sees: bool
    problem: str | None
    at: float
    number: int

    @property
    def again_at(self) -> float:
        """When to look again: somebody may have mended it."""
        return self.at + min(_FIRST_WAIT_S * 2.0**self.number, _LONGEST_WAIT_S)


class Sight:
    """The nodes that see what a run needs, and those that do not, or have not said so yet.

    Args:
        needed: files that all must see, by path or URL, and the setting that says where each is;
            without any, nobody looks.
    """

    def __init__(self, needed: Mapping[str, str] | None = None) -> None:
        self._needed = dict(needed or {})
        self._living: frozenset[str] = frozenset()
        self._looks: dict[str, _Look] = {}
        self._found: dict[str, _Found] = {}

    def look(self) -> None:
        """Take in what was found, and begin to look where nobody has; waits for nothing."""
        if not self._needed:
            return
        now = time.monotonic()
        nodes = (node for node in living_nodes() if node.resources.get("CPU"))
        self._living = frozenset(node.node_id for node in nodes)
        self._found[own_node()] = _Found(True, None, now, 0)
        for node, look in list(self._looks.items()):
            if _is_done(look.task):
                self._found[node] = _Found(
                    *_answer(look.task, node, self._needed), now, look.number
                )
                del self._looks[node]
            elif now - look.since > LOOK_S:
                log.warning("node %s does not say what it sees", node)
                _give_up(look.task)
                self._found[node] = _Found(False, None, now, look.number)
                del self._looks[node]
        for node in self._living - self._looks.keys():
            found = self._found.get(node)
            if found is None or (not found.sees and now > found.again_at):
                number = found.number + 1 if found else 0
                self._looks[node] = _Look(_begin(node, self._needed), now, number)

    @property
    def is_looking(self) -> bool:
        """Whether a look is under way."""
        return bool(self._looks)

    def settle(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Look, and wait for the nodes that are new, or until there are enough."""
        self.look()
        while (self._living & self._looks.keys()) - self._found.keys() and not enough():
            time.sleep(_PAUSE_S)
            self.look()

    def unseen(self) -> frozenset[str]:
        """The living nodes that are not to be used (yet), as of the last look."""
        return self._living - {node for node, found in self._found.items() if found.sees}

    def blind(self) -> frozenset[str]:
        """The living nodes that were looked at, and do not see: new ones are not among them."""
        return frozenset(node for node in self.unseen() if node in self._found)

    def problems(self) -> dict[str, str]:
        """What is wrong on which living nodes, where that is known."""
        found = {node: self._found[node].problem for node in self._living & self._found.keys()}
        return {node: problem for node, problem in sorted(found.items()) if problem}

    def where(self) -> dict[str, str]:
        """The label selector of the nodes that see all; new ones are not among them."""
        seeing = self._living - self.unseen()
        return only_on(seeing) if seeing else {}


def needed_everywhere(run: Storage, config: Config) -> dict[str, str]:
    """Files that all nodes must see, by path or URL, and the setting that says where each is.

    One in each folder: that of the run, that of the shards where it is not below `run.storage`, and
    the model's. A node may lack an object store's package or credentials as well as a mount. For
    shards that are still to come, the folder is made and gets an empty file; where it cannot be
    written, those who prepare them say so.
    """
    needed = {run.at(CONFIG) if run.is_local else run.location(CONFIG): "run.storage"}
    plan = run.read_json(PLAN) or {}
    source = config.model.source
    reads_source = config.model.pretrained or "model" not in plan  # which has all its fields
    if source is not None and reads_source and os.path.isdir(source):
        needed[source] = "model.source"
    begun_with = plan.get("shards")
    shards = absolute(_place_of_shards(config, begun_with))
    if not _is_below(shards, Storage(config.run.storage)):
        if _may_be_there(f"{shards}/{MANIFEST}"):
            setting = "data.prepared" if config.data.prepared else "data.cache"
            needed[f"{shards}/{MANIFEST}"] = setting
        elif not begun_with and not config.data.prepared:
            with contextlib.suppress(DataError):
                write_atomically(*locate(f"{shards}/{_SEEN}"), b"")
                needed[f"{shards}/{_SEEN}"] = "data.cache"
    return needed


def _place_of_shards(config: Config, begun_with: str | None) -> str:
    """The folder of the shards, or the one that it will be in; see `corpus.corpus_begun_with`."""
    if config.data.prepared:
        return config.data.prepared
    if begun_with is None:
        return cache_folder(config)
    with contextlib.suppress(DataError, RunError, OSError):  # that is told elsewhere
        now = shards_folder(config)
        if patiently(lambda: _is_there(f"{now}/{MANIFEST}"), _PATIENCE_S):
            return now
    return begun_with


def _is_there(path: str) -> bool:
    """Whether readers of shards find a file: many an object store they open by pyarrow alone.

    Raises:
        DataError: nothing opens the address.
        OSError: its filesystem does not answer.
    """
    filesystem, inner = locate(path)
    try:
        return bool(filesystem.get_file_info(inner).type != FileType.NotFound)
    except OSError:
        raise
    except Exception as error:  # whatever the filesystem's library raises
        raise OSError(one_line(error)) from error


def _may_be_there(path: str) -> bool:
    """Whether nodes are to look for a file of the shards; what nothing opens is told elsewhere."""
    try:
        return _is_there(path)
    except DataError:
        return False
    except OSError:  # the nodes have the patience to look again
        return True


def _is_below(place: str, storage: Storage) -> bool:
    """Whether a folder is there wherever storage is: below it, and on the same filesystem."""
    path = place.removeprefix("file://")
    if not storage.is_local or "://" in path:
        return place.startswith(f"{storage.url}/")
    real, above = os.path.realpath(path), os.path.realpath(storage.path)
    if not real.startswith(f"{above}/"):
        return False
    return not os.path.exists(real) or os.stat(real).st_dev == os.stat(above).st_dev


def missing(needed: Mapping[str, str]) -> dict[str, str]:
    """Those of the paths and URLs at which nothing is seen from here; why, where that is known.

    Args:
        needed: and the setting that says where each is.
    """
    found = {path: _why_not_seen(path, setting) for path, setting in needed.items()}
    return {path: why for path, why in found.items() if why is not None}


def _why_not_seen(path: str, setting: str) -> str | None:
    if "://" not in path:
        return None if os.path.exists(path) else ""
    folder, _, name = path.rpartition("/")

    def look() -> str | None:
        """As it will be opened: shards are read in another way than the run."""
        try:
            is_shards = setting.startswith("data.")
            sees = _is_there(path) if is_shards else Storage(folder).exists(name)
            return None if sees else ""
        except (PermissionError, UserError, DataError) as error:  # no credentials, no package
            return one_line(error)

    try:
        return patiently(look, _PATIENCE_S)
    except OSError as error:
        return one_line(error)


def _begin(node: str, needed: Mapping[str, str]) -> Any:
    """Begin to look on a node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return _missing_there().options(num_cpus=0, scheduling_strategy=there).remote(needed)


@cache
def _missing_there() -> Any:
    import ray

    return ray.remote(missing)  # one: each would be sent to the head by itself


def _is_done(task: Any) -> bool:
    import ray

    return bool(ray.wait([task], timeout=0)[0])


def _give_up(task: Any) -> None:
    import ray

    ray.cancel(task, force=True)


def _answer(task: Any, node: str, needed: Mapping[str, str]) -> tuple[bool, str | None]:
    """Whether a node sees all, by a look that is done; and what is wrong, where that is known."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        unseen = ray.get(task)
        if not unseen:
            return True, None
        path, why = next(iter(unseen.items()))
        what = f"does not see {path} ({needed[path]})" + (f": {why}" if why else "")
    except RayTaskError as error:  # the look itself cannot fail
        what = f"cannot import this package ({last_line(error)})"
    except RayError as error:  # the node went, or its memory did
        log.warning("node %s does not say what it sees: %s", node, error)
        return False, None
    return False, f"node {address_of(node)} {what}"
