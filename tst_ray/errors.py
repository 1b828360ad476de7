"""What a user did or met, told in one line; every other exception is a defect of ours."""


class UserError(Exception):
    """A failure whose message is meant for the user: the setting, its value, the remedy."""

    exit_status = 1


class ConfigError(UserError, ValueError):
    """Bad usage or configuration, found before anything starts (exit status 2)."""

    exit_status = 2


class RunError(UserError, RuntimeError):
    """A run that could not start or go on (exit status 1)."""
