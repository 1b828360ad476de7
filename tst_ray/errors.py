"""What a user did or met, told in one line; every other exception is a defect of ours."""

from __future__ import annotations

import signal


def last_line(error: BaseException) -> str:
    """An exception's last line, short enough for a terminal: of Ray's, what the task raised."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:300]


class UserError(Exception):
    """A failure whose message is meant for the user: the setting, its value, the remedy."""

    exit_status = 1


class ConfigError(UserError, ValueError):
    """Bad usage or configuration, found before anything starts (exit status 2)."""

    exit_status = 2


class RunError(UserError, RuntimeError):
    """A run that could not start or go on (exit status 1)."""


class Interrupted(UserError):
    """A run that was asked to stop, and did, with a checkpoint.

    Args:
        message: where it stands, and how to resume.
        by: the signal's number; the exit status is 128 more, as a shell would have it.
    """

    def __init__(self, message: str, by: int | None = None) -> None:
        super().__init__(message)
        self.exit_status = 128 + (by or signal.SIGINT)
