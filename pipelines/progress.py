"""What is told while something takes long: that it goes on, and how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_TOLD_S, MOST_PAUSE_S = 15.0, 600.0


@contextmanager
def told_while(log: Callable[[str], None], what: Callable[[], str]) -> Iterator[None]:
    """While the block takes long, the log is told of it, ever more rarely.

    Args:
        what: what is told each time, before the seconds so far.
    """
    ended = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        pause_s = FIRST_TOLD_S
        while not ended.wait(pause_s):
            log(f"{what()} ({time.monotonic() - started:.0f} s so far)")
            pause_s = min(2 * pause_s, MOST_PAUSE_S)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def shown_bytes(done: int, total: int) -> str:
    """How many bytes of how many, as "1.5 of 20.0 MB"."""
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / unit:,.1f} of {total / unit:,.1f} {name}"
