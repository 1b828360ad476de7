"""The run directory: opening it once, for one driver, and only for the run it belongs to.

    config.yaml  plan.json     written before the first step: the run's identity
    manifest.json              the shards that it began with
    driver.lock                who drives it now

`open_run` checks all of that before anything starts. See DESIGN of the files in the README.
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

from tst_ray.config import Config, diff
from tst_ray.corpus import cache_folder
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


@contextlib.contextmanager
def open_run(config: Config) -> Iterator[Storage]:
    """The run directory, writable, of this config, and held by this driver alone.

    Raises:
        ConfigError: it belongs to another config (nothing is overwritten).
        RunError: it cannot be written, or another driver holds it.
    """
    run = run_storage(config)
    run.check_writable()
    with hold(run):
        check_same_run(run, config)
        if not run.exists(PLAN):
            run.write(CONFIG, config.to_yaml())
        yield run


@contextlib.contextmanager
def hold(run: Storage) -> Iterator[None]:
    """Hold the run directory against every other driver while the block runs.

    On a local disk by a file lock, which the kernel lifts however the driver ends; elsewhere, and
    on a shared filesystem that has no locks, by a lease that is renewed while the driver lives.

    Raises:
        RunError: another driver holds it; says which.
    """
    holder = _locked_file(run) if run.is_local and _has_locks(run) else _leased(run)
    with holder:
        yield


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
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'another machine')}"
    return RunError(f"{run.url}: another driver holds this run ({who}); {remedy}")


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
def _locked_file(run: Storage) -> Iterator[None]:
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
        yield


def _gone(run: Storage) -> str:
    return f"stop it, or, if its machine is gone, remove {run.at(LOCK)}"


def _read_owner(file: TextIO) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except ValueError:
        return {}


@contextlib.contextmanager
def _leased(run: Storage) -> Iterator[None]:
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
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(run, mine, stop), name="lease", daemon=True)
    thread.start()
    try:
        yield
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
    except ValueError:
        return {}


def _refuse_living(run: Storage, lease: dict[str, Any]) -> None:
    left = _LEASE_S - (time.time() - float(lease.get("renewed", 0.0)))
    if left > 0:
        remedy = f"stop it, or if it is dead already try again in {left:.0f} seconds"
        raise _refusal(run, lease, remedy)


def _renew(run: Storage, mine: dict[str, Any], stop: threading.Event) -> None:
    """Renew the lease until told to stop; a failed write is tried again, one lost is let go."""
    while not stop.wait(_RENEW_S):
        try:
            if _lease(run).get("id") != mine["id"]:
                log.error("%s: another driver has taken the lease", run.url)
                return
            run.write_json(LOCK, {**mine, "renewed": time.time()})
        except Exception as error:
            log.warning("%s: the lease could not be renewed yet: %s", run.url, error)


# -- what a run needs on every node ---------------------------------------------------------------


def needed_everywhere(run: Storage, config: Config) -> dict[str, str]:
    """Files on disks that all nodes must see, and the setting that says where each is.

    One in each folder: that of the run, that of the shards where it is not below `run.storage`, and
    the model's. What is remote is there for all. For shards that are still to come, the folder is
    made and gets an empty file; where it cannot be written, those who prepare them say so.
    """
    needed = {run.at(CONFIG): "run.storage"} if run.is_local else {}
    if config.model.source is not None and os.path.isdir(config.model.source):
        needed[config.model.source] = "model.source"
    begun_with = (run.read_json(PLAN) or {}).get("shards")
    shards = Storage(begun_with or config.data.prepared or cache_folder(config))
    if shards.is_local and not _is_below(shards.path, Storage(config.run.storage)):
        if shards.exists(MANIFEST):
            needed[shards.at(MANIFEST)] = "data.prepared" if config.data.prepared else "data.cache"
        elif not begun_with and not config.data.prepared:
            with contextlib.suppress(OSError):
                shards.write(_SEEN, "")
                needed[shards.at(_SEEN)] = "data.cache"
    return needed


def _is_below(path: str, storage: Storage) -> bool:
    """Whether a folder is there wherever storage is: below it, and on the same filesystem."""
    real, above = os.path.realpath(path), os.path.realpath(storage.path)
    if not storage.is_local or not real.startswith(f"{above}/"):
        return False
    return not os.path.exists(real) or os.stat(real).st_dev == os.stat(above).st_dev
