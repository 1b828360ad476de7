"""What is done to a run's files: a damaged checkpoint, and a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

from cluster.faults import DAMAGES, pick
from tst_ray.storage import Storage

_CHECKPOINTS = "checkpoints"
_SMALLEST_BYTES = 4096


def newest_checkpoint(run: Storage) -> Storage | None:
    """The folder of the newest committed checkpoint; None where there is none."""
    from tst_ray.checkpoint import committed

    found = committed(run / _CHECKPOINTS)
    return found[0].folder if found else None


def damage(folder: Storage, how: str | None = None, choice: float = 0.0) -> str:
    """Damage a committed checkpoint; what was done, in words.

    Args:
        how: cut (a file ends early), flip (a bit of a file), remove (a file), or unmark (the marker
            that commits it goes); by `choice` unless given.
        choice: in [0, 1): picks the file, and the bit.

    Raises:
        FileNotFoundError: the checkpoint is gone, or is going.
    """
    from tst_ray.checkpoint import DAMAGED, MARKER

    if how is None:
        index, choice = pick(choice, len(DAMAGES))
        how = DAMAGES[index]
    if how == "unmark":
        folder.size(MARKER)  # it must be there
        folder.remove(MARKER)
        return f"removed {MARKER}"
    names = [name for name in folder.names() if name not in (MARKER, DAMAGED)]
    if not names:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder.path)
    index, choice = pick(choice, len(names))
    name = names[index]
    size = folder.size(name)
    if how == "remove" or size == 0:
        folder.remove(name)
        return f"removed {name}"
    if how == "cut":
        folder.truncate(name, size // 2)
        return f"cut {name} from {size} to {size // 2} bytes"
    index, choice = pick(choice, size)
    _flip(folder, name, index, pick(choice, 8)[0])
    return f"flipped a bit of byte {index} of {name}"


def _flip(folder: Storage, name: str, index: int, bit: int) -> None:
    if not folder.is_local:
        content = bytearray(folder.read(name))
        content[index] ^= 1 << bit
        folder.write(name, bytes(content))
        return
    with open(folder.at(name), "r+b") as file:  # in place: the file may be large
        file.seek(index)
        (byte,) = file.read(1)
        file.seek(index)
        file.write(bytes([byte ^ 1 << bit]))


class Ballast:
    """A file that takes the space left on a folder's filesystem, until released.

    It has no name, so the space comes back however this process ends.

    Args:
        folder: a local folder.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, folder: str) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open until released)
        self.num_bytes = 0
        step = _free_bytes(folder)
        while step >= _SMALLEST_BYTES:
            try:
                os.posix_fallocate(self._file.fileno(), self.num_bytes, step)
                self.num_bytes += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    self.release()
                    raise
                step //= 2  # a filesystem keeps some of its free space for itself

    def release(self) -> None:
        """Give the space back; again without harm."""
        with contextlib.suppress(OSError):
            self._file.close()


def _free_bytes(folder: str) -> int:
    space = os.statvfs(folder)
    return space.f_frsize * (space.f_bfree if os.geteuid() == 0 else space.f_bavail)


def free_bytes(run: Storage) -> int | None:
    """The space left for a run's files; None where its filesystem does not say."""
    return _free_bytes(run.path) if run.is_local and os.path.isdir(run.path) else None
