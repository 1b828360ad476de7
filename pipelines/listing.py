"""What files there are at a path, and what tells whether one has changed.

path ── list_files ──> TextFile, …, and links that lead nowhere
path ── file_info ───> what is there
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.errors import DataError, Unreadable, one_line
from pipelines.storage import locate, os_errors

# What filesystems call that of a file which is another once its content is.
_TELLS_A_CHANGE = re.compile(
    "etag|md5|sha|hash|digest|crc|checksum|blob_id|generation|version"
    "|modif|mtime|updated|created|write_time"
)


@dataclass(frozen=True)
class TextFile:
    """A file, or for a big Parquet file some of its row groups; `path` is relative to the root.

    `version` is what its storage tells of the content, where that does not tell when it changed.
    """

    path: str
    size: int
    modified_ns: int | None
    row_groups: tuple[int, int] | None = None
    version: str | None = None


def file_info(
    filesystem: pafs.FileSystem, inner: str, path: str
) -> tuple[pafs.FileInfo, str | None]:
    """What is at a path, and of a file without a time of change, what else tells of one."""
    try:
        with os_errors():
            info = filesystem.get_file_info([inner])[0]
            if info.type != pafs.FileType.File or info.mtime_ns is not None:
                return info, None
            return info, _versions(filesystem, inner, None, is_folder=False).get(inner)
    except (OSError, pa.ArrowException) as error:
        raise Unreadable(f"source {path}: cannot be reached ({one_line(error)})") from error


def list_files(
    path: str, root: str, enters: Callable[[str], bool] = lambda folder: True, is_deep: bool = True
) -> tuple[list[TextFile], list[str]]:
    """Every file at or below a path, with its path below the root; and of a local folder the links
    that lead nowhere.

    On a local disk only those folders are looked into that `enters` wants, by their paths below the
    root. Elsewhere one listing of all is much faster; without `is_deep` it stays in one folder.
    """
    filesystem, inner = locate(path)
    prefix = len(locate(root)[1].rstrip("/")) + 1
    try:
        with os_errors():
            infos: Iterable[pafs.FileInfo] = [info := filesystem.get_file_info(inner)]
            if info.type == pafs.FileType.Directory:
                if isinstance(filesystem, pafs.LocalFileSystem):
                    infos = _walk(filesystem, inner, lambda folder: enters(folder[prefix:]))
                else:
                    infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=is_deep))
            infos = list(infos)
            found = [info for info in infos if info.type == pafs.FileType.File]
            versions: dict[str, str | None] = {}
            if any(info.mtime_ns is None for info in found):
                is_folder = info.type == pafs.FileType.Directory
                depth = None if is_deep else 1
                versions = _versions(filesystem, inner, depth, is_folder=is_folder)
        files = [
            TextFile(info.path[prefix:], info.size, info.mtime_ns, version=versions.get(info.path))
            for info in found
        ]
        nowhere = (info for info in infos if info.type == pafs.FileType.NotFound)
        return files, [info.path[prefix:] for info in nowhere if len(info.path) > prefix]
    except UnicodeDecodeError as error:
        name = error.object.decode("utf-8", "backslashreplace")
        raise DataError(f"source {path}: {name}: a name that is not UTF-8; rename it") from error
    except (OSError, pa.ArrowException) as error:
        raise Unreadable(f"source {path}: cannot be listed ({one_line(error)})") from error


def _versions(
    filesystem: pafs.FileSystem, inner: str, depth: int | None, *, is_folder: bool
) -> dict[str, str | None]:
    """What fsspec knows of the contents of a file, or of the files in a folder, by their paths.

    Of all that fsspec tells, Arrow hands on a time of change only, and under one of its names.
    """
    handler = getattr(filesystem, "handler", None)
    if not isinstance(handler, pafs.FSSpecHandler):
        return {}
    if not is_folder:
        return {inner: _version(handler.fs.info(inner))}
    found = handler.fs.find(inner, maxdepth=depth, detail=True)
    return {path: _version(info) for path, info in found.items()}


def _version(info: dict[str, Any]) -> str | None:
    """Checksums, tags and times of a file, by whatever names its filesystem has for them."""
    told = {name: str(info[name]) for name in sorted(info) if _TELLS_A_CHANGE.search(name.lower())}
    return json.dumps(told) if told else None


def _walk(
    filesystem: pafs.LocalFileSystem,
    folder: str,
    enters: Callable[[str], bool],
    above: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[pafs.FileInfo]:
    """Every file at or below a local folder, and every link that leads nowhere, as not found; a
    link to a folder above is not followed in a circle.

    Args:
        above: the device and inode of each folder on the way here.
    """
    stat = os.stat(folder)
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and not os.path.exists(entry.path):  # which Arrow does not list
                shown = entry.path.encode("utf-8", "backslashreplace").decode()
                yield pafs.FileInfo(shown, pafs.FileType.NotFound)
    for info in filesystem.get_file_info(pafs.FileSelector(folder)):
        if info.type != pafs.FileType.Directory:
            yield info
        elif enters(info.path):
            yield from _walk(filesystem, info.path, enters, above | {here})
