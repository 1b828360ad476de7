"""What is wrong with somebody's text or shards, told in one line."""


class DataError(ValueError):
    """A corpus, tokenizer or shard that cannot be used; the message names it and the remedy."""


class Missing(DataError):
    """A folder that should hold shards has none."""


class BadInput(DataError):
    """A setting names text, a tokenizer or shards that are not there or cannot be used.

    The message begins with the setting.
    """

    exit_status = 2  # bad usage, as that of a bad config


class Unreadable(DataError):
    """Storage did not let it be read; another try may go well."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, short enough for a terminal."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
