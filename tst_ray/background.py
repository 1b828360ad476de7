"""A thread beside the loop, for what the loop must not wait for: storage may take a minute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Value = TypeVar("Value")


class Background:
    """Does one thing after another in a thread of its own.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._last: Future[Any] | None = None

    def start(self, action: Callable[[], Any]) -> bool:
        """Start an action, unless the one that was started last is not done; whether it was.

        Raises:
            Exception: what that last one raised.
        """
        if self._last is not None:
            if not self._last.done():
                return False
            self._last.result()
        self._last = self._pool.submit(action)
        return True

    def run(self, action: Callable[[], Value]) -> Value:
        """Wait for an action, after all before it; what it returns or raises. From any thread."""
        return self._pool.submit(action).result()

    def close(self) -> None:
        """Return when all is done; nothing may be started after."""
        self._pool.shutdown()
