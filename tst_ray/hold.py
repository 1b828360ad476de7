"""Who drives a run: one driver at a time, however many start.

    driver.lock     who drives it now: locked on a local disk, elsewhere leased and renewed

A lock ends with its driver, whatever ends it. A lease does not: a driver that was suspended for
long finds that another one has taken the run, and must not write any more.
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

from tst_ray.errors import RunError
from tst_ray.storage import Storage, patiently

LOCK = "driver.lock"
_LEASE_S = 60.0  # a driver on remote storage that has not renewed for so long is taken for dead
_RENEW_S = 15.0
_SETTLE_S = 1.0
_LET_GO_S = 10.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

log = logging.getLogger(__name__)


class Overtaken(RunError):
    """Another driver has taken the run: this one must neither go on nor write any more."""


class Hold:
    """A driver's hold on a run directory: a lock's lasts as long as the driver."""

    def check(self) -> None:
        """Raises Overtaken where another driver has taken the run meanwhile."""


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


def _owner() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pids": pid_namespace(),
        "since": round(time.time(), 1),
    }


def pid_namespace() -> str:
    """Where this process has its number: a container's processes have numbers of their own."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _refusal(run: Storage, owner: dict[str, Any], remedy: str) -> RunError:
    if not owner:
        return RunError(f"{run.url}: another driver is just starting or ending; try again")
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
        try:
            yield Hold()
        finally:  # a machine that has no file locks sees only what is written
            with contextlib.suppress(OSError):  # the disk is full, or away
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), b"{}")


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
