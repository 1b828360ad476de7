"""A folder that some processes do not see, as on a node without the mount."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_CLONE_NEWNS, _CLONE_FS = 0x20000, 0x200
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


@contextlib.contextmanager
def hidden(folder: Path) -> Iterator[None]:
    """Hide a folder from the processes that this thread starts in the block, for good.

    They get a mount namespace of their own with something empty in its place. Skips the test where
    that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    here = Path.cwd()
    ours = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNS):
            pytest.skip("this user may not make mount namespaces")
        _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
        _check(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, None))
        yield
    finally:
        _check(libc.unshare(_CLONE_FS))  # threads that were started here share it, …
        _check(libc.setns(ours, _CLONE_NEWNS))  # … and this is for who has one to itself
        os.close(ours)
        os.chdir(here)


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
