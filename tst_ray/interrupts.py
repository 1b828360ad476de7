"""Ctrl-C and SIGTERM: the first asks a run to stop, a second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class Interrupts:
    """SIGINT and SIGTERM while a stage trains: the first asks for a checkpoint and an end.

    A second SIGINT stops at once. Main thread only.
    """

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.by: int | None = None
        self._on_first = on_first

    def _handle(self, number: int, frame: Any) -> None:
        if self.by is None:
            self.by = number
            self._on_first()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch both signals while the block runs."""
        before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
