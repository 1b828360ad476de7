"""What is wrong with somebody's text or shards, told in one line."""


class DataError(ValueError):
    """A corpus, tokenizer or shard that cannot be used; the message names it and the remedy."""


class Unreadable(DataError):
    """Storage did not let it be read; another try may go well."""
