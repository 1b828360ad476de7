"""A terminal of its own for a command: what a person would see of it, and Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import time
from collections.abc import Sequence

CTRL_C = b"\x03"
_CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(
    arguments: Sequence[str], *, keys: dict[str, bytes] | None = None, columns: int = 160,
    patience_s: float = 240.0, **environment: str,
) -> tuple[int, str]:  # fmt: skip
    """Run a command on a pseudo-terminal of 40 lines.

    Args:
        keys: what is typed once a text is first seen.

    Returns:
        the exit status, and all lines ever shown, without colours and cursor movements.
    """
    waiting = dict(keys or {})
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        ours = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        env = {**ours, "TERM": "xterm-256color", **environment}
        os.execvpe(arguments[0], list(arguments), env)
    shown, deadline = b"", time.monotonic() + patience_s
    try:
        while time.monotonic() < deadline:
            if not select.select([terminal], [], [], 1.0)[0]:
                continue
            try:
                read = os.read(terminal, 1 << 16)
            except OSError:  # its last process has closed it
                break
            shown += read
            for text in [text for text in waiting if text.encode() in shown]:
                os.write(terminal, waiting.pop(text))
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, _CONTROLS.sub("", shown.decode(errors="replace")).replace("\r", "\n")
