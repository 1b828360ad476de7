"""The curves in TensorBoard: event files in the run directory.

    add ──> points that wait ──> publish: drawn into an event file in the run directory

An object store cannot append, and TensorBoard's own writer asks it for every point: there, the file
is written on this machine and put into the run directory as a whole.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tst_ray.storage import Storage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD = "tensorboard"
_AGAIN_S = 60.0  # after points could not be drawn: each try begins a file, on a full disk too

_EVENT_FILE = "events.out."
Draw = Callable[["SummaryWriter"], None]


def curves_folder(run: Storage) -> Storage:
    """The folder of a run's event files: TensorBoard calls a run's curves by their folder's name.

    A run goes on in the folder that it began with: under its former name if its directory was
    renamed, and in `tensorboard/` itself if an older version wrote its event files there.
    """
    above = run / TENSORBOARD
    names = above.names()
    if any(name.startswith(_EVENT_FILE) for name in names):
        return above
    return above / (names[0] if names else run.url.rstrip("/").rpartition("/")[2])


class Curves:
    """Writes points to TensorBoard. `add` may be called beside the rest, which is one thread's.

    Args:
        run: the run directory.
        step: that of the first point; what an earlier attempt drew from there on is purged. None
            purges nothing.
    """

    def __init__(self, run: Storage, step: int | None = None) -> None:
        self._run, self._purge_step = run, step
        self._folder: Storage | None = None  # looked up with the first point
        self._points: list[tuple[int, Draw]] = []
        self._board: SummaryWriter | None = None
        self._scratch: Path | None = None
        self._is_behind = False  # whether what was drawn does not stand in the run directory yet
        self._again_at = 0.0

    def add(self, step: int, draw: Draw) -> None:
        """Have something drawn at a step, once it is published."""
        self._points.append((step, draw))

    def publish(self) -> None:
        """Make what was added stand; for a minute after it could not be drawn, it waits.

        Raises:
            OSError: storage does not take it; it waits.
        """
        if time.monotonic() < self._again_at:
            return
        points = self._points[:]
        try:
            if points:
                board = self._board or self._open()
                for _, draw in points:
                    draw(board)
                board.flush()
                del self._points[: len(points)]
                self._is_behind = True
        except Exception as error:  # whatever the writer's own thread met, it has ended with it
            if self._purge_step is not None:
                self._purge_step = points[0][0]
            self._again_at = time.monotonic() + _AGAIN_S
            self._board = None  # its file may end in half a point: the next try is in another
            what = f"the curves' points of {len(points)} steps wait for storage"
            raise OSError(f"{what}: {error}") from error
        if self._is_behind and self._scratch is not None and self._folder is not None:
            for file in self._scratch.iterdir():
                self._folder.upload(str(file), file.name)
        self._is_behind = False

    def _open(self) -> SummaryWriter:
        """Begin an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder = self._folder or curves_folder(self._run)
        _wait_for_a_later_name(folder)
        if not folder.is_local and self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="tst_ray-curves-"))
        if self._scratch is None:
            (self._run / TENSORBOARD).make(private=True)  # they show the config, too
            folder.make()
        self._board = SummaryWriter(str(self._scratch or folder.path), purge_step=self._purge_step)
        return self._board

    def close(self) -> None:
        """Publish what waits, and close; nothing may follow.

        Raises:
            OSError: storage does not take it; it is lost.
        """
        self._again_at = 0.0
        try:
            self.publish()
            if self._board is not None:
                self._board.close()
        finally:
            self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None


def _wait_for_a_later_name(folder: Storage) -> None:
    """Let the second pass in which the newest event file was opened, if it is this one.

    TensorBoard reads event files by name, and a name starts with whole seconds: two of one second
    may be read the wrong way round, and the older attempt's points would stand.
    """
    stamps = [name.split(".")[3] for name in folder.names() if name.startswith(_EVENT_FILE)]
    while str(int(time.time())).zfill(10) in stamps:
        time.sleep(0.02)
