"""Files with the same content in a preparation's sources: told, as their text counts twice.

Only files of equal size can be the same; of those the beginnings are compared, and only if these
are equal too, all the rest. Reading them takes a small part of the time that tokenizing them does.
Of files elsewhere than on a disk nothing is told: reading them may take as long as all else.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow.fs as pafs

from pipelines.corpus import Corpus
from pipelines.storage import below, locate

_HEAD_BYTES = 2**14
_LEAST_SHARE = 1e-3  # of the text; all source code has a few small files that are the same


@dataclass(frozen=True)
class _File:
    path: str
    size: int


def told_duplicates(corpora: Sequence[Corpus]) -> str | None:
    """What is told of files that are the same as another one; None if there are next to none."""
    groups = _same(_files(corpora))
    num_more = sum(len(group) - 1 for group in groups)
    size = sum(group[0].size * (len(group) - 1) for group in groups)
    if not num_more or size < _LEAST_SHARE * sum(corpus.size for corpus in corpora):
        return None
    first, second = (file.path for file in groups[0][:2])
    return (
        f"{num_more:,} files ({size / 1e6:,.1f} MB) are the same as others, and are trained on as "
        f"often as they are there, such as {first} and {second}"
    )


def _files(corpora: Sequence[Corpus]) -> list[_File]:
    """The files that lie on a disk."""
    files = []
    for corpus in corpora:
        filesystem, inner = locate(corpus.root)
        if isinstance(filesystem, pafs.LocalFileSystem):
            files += [_File(below(inner, file.path), file.size) for file in corpus.files]
    return [file for file in files if file.size]


def _same(files: Iterable[_File]) -> list[list[_File]]:
    """The groups of files that have the same content, the largest files first."""
    groups = _split(files, lambda file: file.size)
    for key in (partial(_digest, length=_HEAD_BYTES), _digest):
        groups = [part for group in groups for part in _split(group, key)]
    return sorted(groups, key=lambda group: (-group[0].size, group[0].path))


def _split(files: Iterable[_File], key: Callable[[_File], Hashable | None]) -> list[list[_File]]:
    """The groups of at least two files with the same key; those without a key are in none."""
    listed = list(files)
    groups: dict[Hashable, list[_File]] = defaultdict(list)
    with ThreadPoolExecutor(8) as pool:
        for file, found in zip(listed, pool.map(key, listed), strict=True):
            if found is not None:
                groups[found].append(file)
    return [group for group in groups.values() if len(group) > 1]


def _digest(file: _File, length: int | None = None) -> str | None:
    """A hash of a file's content, or of its beginning; None if it cannot be read."""
    digest = hashlib.blake2b()
    try:
        with open(file.path, "rb") as stream:
            if length is not None:
                digest.update(stream.read(length))
                return digest.hexdigest()
            while chunk := stream.read(2**20):
                digest.update(chunk)
    except OSError:  # reading it for its text will say what is wrong
        return None
    return digest.hexdigest()
