"""Checkpoints in the memory of the cluster: a filesystem over a vault on each node of its workers.

    tst-memory://<key>/checkpoints/step-00001200/…   the same files as on a disk (checkpoint.py)

    writer ── ray.put ──> its node's vault ──> file: an object in that node's object store
                     └──> the next node's ───> a second copy there

A vault is an actor that owns what it holds: an object goes when the process that owns it does, so
a vault puts again what it is handed, and files outlive the worker that wrote them. With two copies
on two nodes, one lost node loses nothing. Vaults are the driver's, and end with it.

A vault that does not answer is ended by whoever asked. Were it only passed over, it could come back
with files that have been replaced or removed since; and every process would wait for it anew until
Ray has noticed that its node is gone, some 15 s after. The driver starts an empty one in its place.

Importing this module is what makes the addresses known to fsspec, and so to `Storage`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np

from pipelines.errors import one_line
from tst_ray.errors import RunError
from tst_ray.nodes import living_nodes

log = logging.getLogger(__name__)

PROTOCOL = "tst-memory"

_NAMESPACE = "tst-memory"  # of the actors' names, whatever the namespace of who asks for them
_KEY = re.compile(r"[A-Za-z0-9._-]+")
_THREADS = 32  # of a vault: a node's writers may hand over files at once, and names stay quick

_ANSWER_S = 30.0  # a vault's own start on a busy node; less than a hang (fault.hang_s)
_TRANSFER_S = 300.0  # one file, between two nodes: 30 GB at 1 Gb/s
_SETTLE_S = 60.0  # a node that lost its vault may be gone, and Ray not yet know
_GRACE_S = 1.0  # for an answer that has come while another was waited for


class Vault:
    """The files of one node, by path; an actor (of several threads), and the owner of the files."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Any, int]] = {}  # path -> object, bytes

    def put(self, path: str, content: np.ndarray) -> None:
        """Keep a file, in place of what was there; `content` is uint8 [bytes]."""
        import ray

        self._files[path] = (ray.put(content), content.nbytes)

    def get(self, path: str) -> list[Any]:
        """The file's object, in a list so that it is not fetched on the way; or an empty one."""
        found = self._files.get(path)
        return [found[0]] if found else []

    def under(self, path: str) -> dict[str, int | None]:
        """The file of that path, or what is directly in that folder: paths, bytes; None: folder."""
        start, found = f"{path}/" if path else "", {}
        for name, (_, num_bytes) in list(self._files.items()):
            if name == path:
                return {name: num_bytes}
            if name.startswith(start):
                child, _, rest = name[len(start) :].partition("/")
                found[start + child] = None if rest else num_bytes
        return found

    def remove(self, path: str, recursive: bool) -> int:
        """Forget a file, or all in a folder; how many there were."""
        gone = [name for name in list(self._files) if _is_at(name, path, recursive)]
        return sum(self._files.pop(name, None) is not None for name in gone)


def _is_at(name: str, path: str, recursive: bool) -> bool:
    return name == path or (recursive and name.startswith(f"{path}/"))


class Vaults:
    """The vaults of a run, one a node. The driver's: they live as long as it does.

    Args:
        key: tells them from another run's: letters, digits, '.', '_' and '-'.

    Raises:
        ValueError: the key has other characters.
    """

    def __init__(self, key: str) -> None:
        if not _KEY.fullmatch(key):
            raise ValueError(f"key = {key!r}: give letters, digits, '.', '_' and '-' only")
        self.key = key
        self._handles: dict[str, Any] = {}  # by name
        self._ended: dict[str, float] = {}  # when a node's was found to have, by node id

    @property
    def url(self) -> str:
        """The folder that they are."""
        return f"{PROTOCOL}://{self.key}"

    def cover(self, node_ids: Collection[str]) -> None:
        """Start a vault on each of these nodes that has none; does not wait for it to be there.

        Where one ended, the next one starts a minute later. Cheap where nothing changed: two
        questions to the head node, about 1 ms.

        Raises:
            RunError: there is no Ray session.
        """
        listed, now = _names(self.key), time.monotonic()
        for name in set(self._handles) - set(listed.values()):
            del self._handles[name]
            self._ended[name.split("/")[1]] = now
        for node_id in {node.node_id for node in living_nodes()}.intersection(node_ids):
            since_s = now - self._ended.get(node_id, -math.inf)
            if node_id not in listed and since_s > _SETTLE_S:
                self._start(node_id)

    def keep_to(self, node_ids: Collection[str]) -> None:
        """End the vaults of all other nodes, and with them what they hold."""
        for name in [name for name in self._handles if name.split("/")[1] not in node_ids]:
            _end(self._handles.pop(name))

    def close(self) -> None:
        """End them, and with them all that they hold."""
        for handle in self._handles.values():
            _end(handle)
        self._handles = {}

    def _start(self, node_id: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # A name of its own each time: nobody takes it for the one that was there before.
        name = f"{self.key}/{node_id}/{uuid.uuid4().hex[:8]}"
        options = {
            "name": name,
            "namespace": _NAMESPACE,
            "num_cpus": 0,
            "max_concurrency": _THREADS,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        self._handles[name] = ray.remote(Vault).options(**options).remote()


def _names(key: str) -> dict[str, str]:
    """The names of a run's living vaults, by node id; one question to the head node.

    Raises:
        RunError: there is no Ray session.
    """
    import ray

    if not ray.is_initialized():
        raise RunError(f"{PROTOCOL}://{key}: is in the memory of a Ray cluster, and Ray is not on")
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == _NAMESPACE and actor["name"].startswith(f"{key}/"):
            found[actor["name"].split("/")[1]] = actor["name"]
    return found


def _end(handle: Any) -> None:
    import ray

    with contextlib.suppress(Exception):  # it has ended, or Ray has
        ray.kill(handle)


# ---- asking vaults -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Door:
    """A vault as other processes see it."""

    node_id: str
    name: str

    def ask(self, method: str, *args: Any) -> Any:
        """Put a question; `answer` waits for what it says. None where the vault has ended."""
        try:
            return getattr(_handle(self.name), method).remote(*args)
        except ValueError:
            return None

    def answer(self, asked: Any, timeout_s: float) -> Any:
        """The answer to a question.

        Raises:
            OSError: there is none; a vault that could give none is ended.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        if asked is None:
            raise OSError(f"the vault of node {self.node_id} has ended")
        try:
            return ray.get(asked, timeout=timeout_s)
        except RayTaskError as error:  # it is there, and cannot: its node's memory is full
            raise OSError(f"the vault of node {self.node_id}: {one_line(error.cause)}") from error
        except RayError as error:
            _end(_handle(self.name))
            reason = one_line(error)
            raise OSError(f"the vault of node {self.node_id} does not answer: {reason}") from error


def _doors(key: str) -> tuple[list[_Door], list[_Door]]:
    """The vault of this node, if it has one, and the others: the next node's first, in a ring."""
    import ray

    names = _names(key)
    own_id = ray.get_runtime_context().get_node_id()
    in_ring = sorted(names, key=lambda node_id: (node_id < own_id, node_id))
    doors = [_Door(node_id, names[node_id]) for node_id in in_ring]
    return (
        [door for door in doors if door.node_id == own_id],
        [door for door in doors if door.node_id != own_id],
    )


@lru_cache(maxsize=4096)
def _handle(name: str) -> Any:
    """A vault by its name, of which there is never another; a question to the head node, once.

    Raises:
        ValueError: it has ended.
    """
    import ray

    return ray.get_actor(name, namespace=_NAMESPACE)


def _ask_all(doors: Sequence[_Door], method: str, *args: Any) -> list[Any]:
    """What vaults answer, asked at the same time; those that do not are left out."""
    asked = [(door, door.ask(method, *args)) for door in doors]
    deadline = time.monotonic() + _ANSWER_S
    answers = []
    for door, question in asked:
        try:
            answers.append(door.answer(question, max(deadline - time.monotonic(), _GRACE_S)))
        except OSError as error:
            log.warning("%s", error)
    return answers


# ---- the filesystem ----------------------------------------------------------------------------


class ClusterMemory(fsspec.AbstractFileSystem):
    """The files of all living vaults; the first part of a path is the key of a run.

    Folders are there when they have files. A file is replaced as a whole, never changed. Nothing is
    remembered from one call to the next: each asks which vaults there are.

    Every method raises RunError where there is no Ray session.
    """

    protocol = PROTOCOL
    cachable = False  # one costs nothing; fsspec would keep one for each thread that ever was

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size in bytes and type ("file", "directory"). Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        for doors in _doors(_key(path)):  # the other nodes only where this one doesn't have it
            found = _union(_ask_all(doors, "under", path))
            if found:
                return _entry(path, found.get(path))
        raise _missing(path)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether the file, or a file in the folder, is in some vault."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What is directly in a folder, or the file itself. Raises FileNotFoundError."""
        path = self._strip_protocol(path)
        own, others = _doors(_key(path))
        found = _union(_ask_all([*own, *others], "under", path))
        if not found:
            raise _missing(path)
        return [_entry(name, found[name]) if detail else name for name in sorted(found)]

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        """The bytes of a file from `start` to `end`. Raises FileNotFoundError."""
        return _content(self._strip_protocol(path))[start:end].tobytes()

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        """Write a file. Raises OSError where this node's vault cannot take it."""
        path = self._strip_protocol(path)
        if mode == "create" and self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        _write(path, np.frombuffer(value, np.uint8))

    def put_file(
        self,
        lpath: str,
        rpath: str,
        callback: Any = None,
        mode: str = "overwrite",
        **kwargs: Any,
    ) -> None:
        """Copy a local file here; it is mapped, so it takes no memory on the way to Ray's."""
        is_empty = os.path.getsize(lpath) == 0  # which cannot be mapped
        self.pipe_file(rpath, b"" if is_empty else np.memmap(lpath, np.uint8, "r"), mode)

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: Any = None) -> None:
        """Remove files or, if `recursive`, folders, from all vaults. Raises FileNotFoundError."""
        for one in [path] if isinstance(path, str) else path:
            name = self._strip_protocol(one)
            own, others = _doors(_key(name))
            if not any(_ask_all([*own, *others], "remove", name, recursive)):
                raise _missing(name)

    def _rm(self, path: str) -> None:
        self.rm(path)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing to do."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing to do."""

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        path = self._strip_protocol(path)
        if mode == "rb":
            import pyarrow

            # Over the object store's own memory: reading copies only what is asked for.
            return io.BufferedReader(pyarrow.BufferReader(pyarrow.py_buffer(_content(path))))
        if mode == "wb":
            return _Writer(path)
        raise ValueError(f"{path}: mode {mode!r} is not there; files are read ('rb') or replaced")


class _Writer(io.BytesIO):
    """A new file; it is there once closed, and not at all if the block that writes it fails."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path: str | None = path

    def close(self) -> None:
        path, self._path = self._path, None
        try:
            if path is not None and not self.closed:
                _write(path, np.frombuffer(self.getvalue(), np.uint8))
        finally:
            super().close()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self._path = None
        self.close()


def _write(path: str, content: np.ndarray) -> None:
    """Put a file, uint8 [bytes], into this node's vault and the next one's.

    Raises:
        OSError: this node's cannot take it; then nothing has changed.
    """
    import ray
    from ray.exceptions import RayError

    own, others = _doors(_key(path))
    if not own:
        raise OSError(f"{path}: this node has no vault")
    try:
        handed = ray.put(content)  # once for both vaults
    except RayError as error:
        raise OSError(f"{path}: {one_line(error)}") from error
    own[0].answer(own[0].ask("put", path, handed), _TRANSFER_S)
    stale = others
    if others:
        try:
            others[0].answer(others[0].ask("put", path, handed), _TRANSFER_S)
            stale = others[1:]
        except OSError as error:
            log.warning("%s is in the memory of this node only: %s", path, error)
    # After nodes came or went, a copy of what was here before may be on others than these two.
    _ask_all(stale, "remove", path, False)


def _content(path: str) -> np.ndarray:
    """A file, uint8 [bytes], read-only, in this node's object store. Raises FileNotFoundError."""
    import ray
    from ray.exceptions import RayError

    for doors in _doors(_key(path)):
        for handed in _ask_all(doors, "get", path):
            for content in handed:
                try:
                    return ray.get(content, timeout=_TRANSFER_S)
                except RayError as error:  # its node went just now; another may have it
                    log.warning("%s: %s", path, one_line(error))
    raise _missing(path)


def _key(path: str) -> str:
    return path.partition("/")[0]


def _union(answers: Sequence[dict[str, int | None]]) -> dict[str, int | None]:
    return {name: num_bytes for found in answers for name, num_bytes in found.items()}


def _entry(name: str, num_bytes: int | None) -> dict[str, Any]:
    kind = "directory" if num_bytes is None else "file"
    return {"name": name, "size": num_bytes or 0, "type": kind}


def _missing(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


fsspec.register_implementation(PROTOCOL, ClusterMemory, clobber=True)
