"""What is wrong with somebody's text or shards, told in one line."""


class DataError(ValueError):
    """A corpus, tokenizer or shard that cannot be used; the message names it and the remedy."""


class Unreadable(DataError):
    """Storage did not let it be read; another try may go well."""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, short enough for a terminal."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
