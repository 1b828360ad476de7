"""The run directory: opening it once, for one driver, and only for the run it belongs to.

    config.yaml  plan.json     written before the first step: the run's identity
    manifest.json              the shards that it began with
    driver.lock                who drives it now

`open_run` checks all of that before anything starts. See "The run directory" in the README.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, TextIO

import yaml

from pipelines.errors import DataError
from tst_ray.config import Config, diff
from tst_ray.corpus import cache_folder, shards_folder
from tst_ray.errors import ConfigError, RunError
from tst_ray.metrics import EVENTS
from tst_ray.storage import Storage, patiently

CONFIG, PLAN, MANIFEST = "config.yaml", "plan.json", "manifest.json"
LOCK = "driver.lock"
_SEEN = ".seen"  # stands for shards that are still to come
_LEASE_S = 60.0  # a driver on remote storage that has not renewed for so long is taken for dead
_RENEW_S = 15.0
_SETTLE_S = 1.0
_LET_GO_S = 10.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


def run_storage(config: Config) -> Storage:
    """The run directory that a config names: <run.storage>/<run.name>."""
    return Storage(config.run.storage) / config.run.name


def check_same_run(run: Storage, config: Config) -> None:
    """Refuse a directory that holds a run with another config.

    Raises:
        ConfigError: one line a differing field that would change the run.
    """
    if not run.exists(PLAN):
        return  # nothing was trained under another config yet
    theirs = yaml.safe_load(run.read(CONFIG))
    lines = diff(theirs, config.dump())
    if lines:
        raise ConfigError(
            f"run.name = {config.run.name}: {run.url} holds a run with another config; use another "
            "run.name, or the run's own settings:\n" + "\n".join(f"  {line}" for line in lines)
        )


class Overtaken(RunError):
    """Another driver has taken the run: this one must neither go on nor write any more."""


class Hold:
    """A driver's hold on a run directory: a lock's lasts as long as the driver."""

    def check(self) -> None:
        """Raises Overtaken where another driver has taken the run meanwhile."""


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[tuple[Storage, Hold]]:
    """The run directory, writable, of this config, and held by this driver alone.

    Raises:
        ConfigError: it belongs to another config (nothing is overwritten).
        RunError: it cannot be written, or another driver holds it.
    """
    run = run_storage(config)
    run.check_writable()
    with hold(run) as held:
        check_same_run(run, config)
        if not run.exists(PLAN):
            run.write(CONFIG, config.to_yaml())
        yield run, held


@contextlib.contextmanager
def hold(run: Storage) -> Iterator[Hold]:
    """Hold the run directory against every other driver while the block runs.

    On a local disk by a file lock, which the kernel lifts however the driver ends; elsewhere, and
    on a shared filesystem that has no locks, by a lease that is renewed while the driver lives.

    Raises:
        RunError: another driver holds it; says which.
    """
    holder = _locked_file(run) if run.is_local and _has_locks(run) else _leased(run)
    with holder as held:
        yield held


def read_events(run: Storage) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return run.read_lines(EVENTS)


def _owner() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": round(time.time(), 1),
    }


def _refusal(run: Storage, owner: dict[str, Any], remedy: str) -> RunError:
    return RunError(f"{run.url}: another driver holds this run ({_who(owner)}); {remedy}")


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"


def _has_locks(run: Storage) -> bool:
    """Whether files in a folder can be locked; on NFS and Lustre that is not certain."""
    import fcntl

    with tempfile.TemporaryFile(dir=run.path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False
            raise
    return True


@contextlib.contextmanager
def _locked_file(run: Storage) -> Iterator[Hold]:
    import fcntl

    with open(run.at(LOCK), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _refusal(run, _read_owner(file), _gone(run)) from None
        _refuse_living(run, _read_owner(file))  # one that has no locks where it runs
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        yield Hold()


def _gone(run: Storage) -> str:
    return f"stop it, or, if its machine is gone, remove {run.at(LOCK)}"


def _read_owner(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except ValueError:
        return {}


class _Lease(Hold):
    """A hold that lasts while it is renewed.

    Args:
        mine: who holds it, as written.
    """

    def __init__(self, run: Storage, mine: dict[str, Any]) -> None:
        self._run, self._mine, self._renewed_at = run, mine, time.time()
        self._taken_by: dict[str, Any] | None = None

    def renew(self) -> None:
        """Renew it, unless another driver has taken it. Raises OSError."""
        lease = _lease(self._run)
        if lease and lease.get("id") != self._mine["id"]:
            self._taken_by = lease
            return
        now = time.time()
        self._run.write_json(LOCK, {**self._mine, "renewed": now})
        self._renewed_at = now

    def check(self) -> None:
        """Raises Overtaken where another driver has taken the run meanwhile.

        One may have where this process was stopped for a while (a machine that was suspended), or
        where storage did not take what it wrote.
        """
        if self._taken_by is None and time.time() - self._renewed_at > _LEASE_S:
            with contextlib.suppress(OSError):  # then nobody can take it now, either
                self.renew()
        if self._taken_by is not None:
            raise Overtaken(
                f"{self._run.url}: another driver has taken this run ({_who(self._taken_by)}): "
                f"this one had not renewed its lease for {_LEASE_S:.0f} s; it goes on there"
            )


@contextlib.contextmanager
def _leased(run: Storage) -> Iterator[Hold]:
    mine, theirs = _owner(), patiently(lambda: _lease(run))
    if theirs and "renewed" not in theirs:  # it holds a lock, which is not seen from here
        raise _refusal(run, theirs, _gone(run))
    _refuse_living(run, theirs)
    patiently(lambda: run.write_json(LOCK, {**mine, "renewed": time.time()}))
    # Another driver may have written in the same moment; the last to write holds the lease.
    time.sleep(_SETTLE_S)
    lease = patiently(lambda: _lease(run))
    if lease.get("id") != mine["id"]:
        _refuse_living(run, lease)
    held, stop = _Lease(run, mine), threading.Event()
    thread = threading.Thread(target=_renew, args=(run, held, stop), name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):  # who comes next may have to wait until it is over
            patiently(lambda: _let_go(run, mine), _LET_GO_S)


def _let_go(run: Storage, mine: dict[str, Any]) -> None:
    if _lease(run).get("id") == mine["id"]:
        run.remove(LOCK)


def _lease(run: Storage) -> dict[str, Any]:
    """The lease on a run; empty where there is none, or one that cannot be read."""
    try:
        return dict(run.read_json(LOCK) or {})
    except RunError:
        return {}


def _refuse_living(run: Storage, lease: dict[str, Any]) -> None:
    left = _LEASE_S - (time.time() - float(lease.get("renewed", 0.0)))
    if left > 0:
        remedy = f"stop it, or if it is dead already try again in {left:.0f} seconds"
        raise _refusal(run, lease, remedy)


def _renew(run: Storage, held: _Lease, stop: threading.Event) -> None:
    """Renew the lease until told to stop; a failed write is tried again."""
    while not stop.wait(_RENEW_S):
        try:
            held.renew()
        except Exception as error:
            log.warning("%s: the lease could not be renewed yet: %s", run.url, error)


# -- what a run needs on every node ---------------------------------------------------------------


def needed_everywhere(run: Storage, config: Config) -> dict[str, str]:
    """Files that all nodes must see, by path or URL, and the setting that says where each is.

    One in each folder: that of the run, that of the shards where it is not below `run.storage`, and
    the model's. A node may lack an object store's package or credentials as well as a mount. For
    shards that are still to come, the folder is made and gets an empty file; where it cannot be
    written, those who prepare them say so.
    """
    needed = {run.at(CONFIG) if run.is_local else run.location(CONFIG): "run.storage"}
    if config.model.source is not None and os.path.isdir(config.model.source):
        needed[config.model.source] = "model.source"
    begun_with = (run.read_json(PLAN) or {}).get("shards")
    shards = Storage(_place_of_shards(config, begun_with))
    if shards.is_local and not _is_below(shards.path, Storage(config.run.storage)):
        if shards.exists(MANIFEST):
            needed[shards.at(MANIFEST)] = "data.prepared" if config.data.prepared else "data.cache"
        elif not begun_with and not config.data.prepared:
            with contextlib.suppress(OSError):
                shards.write(_SEEN, "")
                needed[shards.at(_SEEN)] = "data.cache"
    return needed


def _place_of_shards(config: Config, begun_with: str | None) -> str:
    """The folder of the shards, or the one that it will be in; see `corpus.corpus_begun_with`."""
    if config.data.prepared:
        return config.data.prepared
    if begun_with is None:
        return cache_folder(config)
    with contextlib.suppress(DataError, RunError):  # that is told elsewhere
        now = shards_folder(config)
        if Storage(now).exists(MANIFEST):
            return now
    return begun_with


def _is_below(path: str, storage: Storage) -> bool:
    """Whether a folder is there wherever storage is: below it, and on the same filesystem."""
    real, above = os.path.realpath(path), os.path.realpath(storage.path)
    if not storage.is_local or not real.startswith(f"{above}/"):
        return False
    return not os.path.exists(real) or os.stat(real).st_dev == os.stat(above).st_dev
