"""A folder on any filesystem that fsspec reaches: local paths, s3://, gs://, memory://, …

The run directory, its checkpoints and its logs are all written through `Storage`, so that what is
atomic, and what survives a crash, is decided in one place:

- `write` replaces a file as a whole: a reader sees the old content or the new, never a part.
- `append` adds lines; where the filesystem cannot append, the file is replaced.
- `add` adds lines to a log that several processes write. Where the filesystem cannot append, each
  is a file of its own beside the log, so that none overwrites another's, until `fold` joins them.

Whatever a filesystem's library raises, `Storage` raises OSError: those who can wait for storage, or
do without it, need to know one kind of error. "Not there" is only what the filesystem says is not
there; one that does not answer is an error.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from pipelines.addresses import REMEDY, has_secret, masked
from pipelines.errors import one_line
from pipelines.storage import absolute
from tst_ray.errors import ConfigError, RunError, UserError
from tst_ray.timeouts import STORAGE_S

Value = TypeVar("Value")

log = logging.getLogger(__name__)

_PAUSES_S = (0.5, 2.0)  # before a remote filesystem is asked again
_ANSWERS = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)
_FIRST_PAUSE_S = 0.5  # of those who wait for storage; each next one is twice as long …
_LONGEST_PAUSE_S = 15.0  # … up to this

_PIECE_BYTES = 4 << 20  # read at a time, of what may be long

_APPEND_LOCK = threading.Lock()  # the loop and the checkpoint thread both add events


class Storage:
    """A folder by its URL or local path. Picklable; what is unpickled opens it anew.

    Args:
        url: a local path or any fsspec URL.

    Raises:
        ConfigError: a secret stands in the URL.
        RunError: the URL's filesystem is unknown, or its package is not installed; or a path
            begins with the home of nobody.
    """

    def __init__(self, url: str) -> None:
        if has_secret(url):
            raise ConfigError(f"{masked(url)}: {REMEDY}")
        self.url = absolute(url) if "://" in url else _local(url)
        self.is_local = "://" not in url or url.startswith("file://")
        try:
            self._fs, self.path = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise RunError(f"{self.url}: cannot be opened ({one_line(error)})") from error
        self.path = self.path.rstrip("/")
        self._pauses_s: tuple[float, ...] = () if self.is_local else _PAUSES_S

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage, (self.url,))

    def __truediv__(self, name: str) -> Storage:
        return Storage(f"{self.url}/{name}")

    def at(self, name: str) -> str:
        """The path of a file in this folder, as the filesystem spells it."""
        return f"{self.path}/{name}"

    def location(self, name: str) -> str:
        """The address of a file in this folder, for those who open it by themselves."""
        return f"{self.url}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether the file or folder is there now (listings are not cached)."""
        # Not the filesystem's own `exists`: fsspec's says no, too, where it could not look.
        self._fs.invalidate_cache()
        try:
            self._ask(self._fs.info, self.at(name) if name else self.path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self) -> list[str]:
        """What is in this folder, sorted; empty where the folder is missing."""
        self._fs.invalidate_cache()
        try:
            found = self._ask(self._fs.ls, self.path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        self._fs.invalidate_cache()
        return int(self._ask(self._fs.size, self.at(name)))

    def read(self, name: str) -> bytes:
        """A file's content. Raises FileNotFoundError."""
        return bytes(self._ask(self._fs.cat_file, self.at(name)))

    def sha256(self, name: str) -> str:
        """The checksum (hex) of a file, which is read in pieces. Raises FileNotFoundError."""
        return str(self._ask(self._sha256, self.at(name)))

    def _sha256(self, path: str) -> str:
        with self._fs.open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, name: str, content: bytes | str, private: bool = False) -> None:
        """Replace a file as a whole; on a local disk it has reached the disk on return.

        Args:
            private: whether it is for this user and group alone, where files have owners.
        """
        data = content.encode() if isinstance(content, str) else content
        if not self.is_local:
            self._ask(self._fs.pipe_file, self.at(name), data)  # object stores put whole objects
            return
        target = Path(self.at(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(scratch, "wb", opener=_open_private if private else None) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    def append(self, name: str, text: str) -> None:
        """Add whole lines to the end of a file, making it if need be.

        After a torn line (its writer was killed) they start on a line of their own. Raises OSError
        where storage takes no more; a local file is then as it was.
        """
        with _APPEND_LOCK:
            if self.is_local:
                with open(self.at(name), "ab+", buffering=0) as file:
                    end = file.tell()
                    torn = end and os.pread(file.fileno(), 1, end - 1) != b"\n"
                    data = b"\n" * bool(torn) + text.encode()
                    if file.write(data) != len(data):  # the disk is full: all lines, or none
                        file.truncate(end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.at(name))
                return
            # Most object stores cannot append.
            before = self.read(name) if self.exists(name) else b""
            gap = b"\n" if before and not before.endswith(b"\n") else b""
            self.write(name, before + gap + text.encode())

    def sync(self, name: str) -> None:
        """Make what was appended to a local file outlast a power cut. Raises OSError."""
        if self.is_local and self.exists(name):
            with open(self.at(name), "rb") as file:
                os.fsync(file.fileno())

    def add(self, name: str, text: str) -> None:
        """Add whole lines to a log that other processes add to as well. Raises OSError."""
        if self.is_local:
            self.append(name, text)
        else:
            (self / f"{name}.d").write(f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", text)

    def fold(self, name: str) -> None:
        """Make one file of a log and what was added beside it; one process at a time.

        Killed in the middle of it, it leaves no line out, and the next one adds none again.
        """
        beside = self._beside(name)
        if beside:
            if new := b"".join(_not_in(self._content(name), beside)):
                self.append(name, new.decode(errors="replace"))
            folder = self / f"{name}.d"
            self._ask(self._fs.rm, [folder.at(part) for part, _ in beside])

    def _beside(self, name: str) -> list[tuple[str, bytes]]:
        """What was added beside a log, oldest first: the files' names, and their lines."""
        if self.is_local:
            return []
        folder = self / f"{name}.d"
        found = []
        for part in folder.names():
            with contextlib.suppress(FileNotFoundError):  # folded just now
                found.append((part, folder.read(part)))
        return found

    def _content(self, name: str) -> bytes:
        """A file's content; empty where it is missing."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return b""

    def make(self, private: bool = False) -> None:
        """Make this folder and those above it.

        Args:
            private: whether it is for this user and group alone, where folders have owners.
        """
        if private and self.is_local:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            Path(self.path).mkdir(mode=0o770, exist_ok=True)
            return
        self._ask(self._fs.makedirs, self.path, exist_ok=True)

    def upload(self, local: str, name: str) -> None:
        """Copy a local file into this folder."""
        self._ask(self._fs.put_file, local, self.at(name))

    def remove(self, name: str = "") -> None:
        """Remove a file, or this folder with all in it; nothing there is no error."""
        if self.exists(name):
            with contextlib.suppress(FileNotFoundError):
                self._ask(self._fs.rm, self.at(name) if name else self.path, recursive=True)

    def read_json(self, name: str) -> Any:
        """A JSON file's value; None where the file is missing.

        Raises:
            RunError: it is damaged; says which.
        """
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunError(
                f"{self.location(name)}: is no JSON ({error}); restore it from a copy"
            ) from error

    def write_json(self, name: str, value: Any, **options: bool) -> None:
        """Replace a JSON file as a whole; the options are those of `write`."""
        self.write(name, json.dumps(value, indent=2) + "\n", **options)

    def read_lines(self, name: str, having: Collection[str] = ()) -> list[dict[str, Any]]:
        """The records of a .jsonl file, as `parse_record` takes them."""
        beside = self._beside(name)  # first: what is folded in this moment is then in the log
        content = self._content(name)
        return _records(b"".join([content, b"\n", *_not_in(content, beside)]), having)

    def tail_records(
        self, name: str, num_bytes: int, having: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """Those within the last bytes of a .jsonl file; cheap however long it is."""
        beside = self._beside(name)
        content = b"".join(self.tail_lines(name, num_bytes)[1])
        return _records(b"".join([content, b"\n", *_not_in(content, beside)]), having)

    def lines(self, name: str) -> Iterator[bytes]:
        """All lines of a file with their ends, of which a few are held at a time; none where it is
        missing."""
        try:
            size = self.size(name)
        except FileNotFoundError:
            return
        torn = b""
        for start in range(0, size, _PIECE_BYTES):
            data = torn + self._part(name, start, min(start + _PIECE_BYTES, size))
            lines = data.splitlines(keepends=True)
            torn = b"" if data.endswith(b"\n") else lines.pop()
            yield from lines
        if torn:
            yield torn

    def tail_lines(self, name: str, num_bytes: int) -> tuple[int, list[bytes]]:
        """The lines that start within the last bytes of a file, and where the first of them does.

        Each line keeps its end; one without (its writer was killed) can only be the last.
        """
        try:
            size = self.size(name)
            start = max(size - num_bytes, 0)
            data = self._part(name, start, size)
        except FileNotFoundError:
            return 0, []
        if start:
            _, _, data = data.partition(b"\n")  # the rest of a line that starts before
        return size - len(data), data.splitlines(keepends=True)

    def truncate(self, name: str, num_bytes: int) -> None:
        """Keep only the first bytes of a file."""
        if self.is_local:
            os.truncate(self.at(name), num_bytes)
        else:
            self.write(name, self._part(name, 0, num_bytes))

    def _part(self, name: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a file."""
        if start == end:
            return b""  # some object stores take an empty range for the whole
        return bytes(self._ask(self._fs.cat_file, self.at(name), start=start, end=end))

    def _ask(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a method of the filesystem returns; a remote one is asked again where it fails.

        Raises:
            OSError: whatever the filesystem's library raised.
        """
        pauses_s = list(self._pauses_s)
        while True:
            try:
                return method(*args, **options)
            except (*_ANSWERS, UserError):
                raise
            except Exception as error:
                if not pauses_s:
                    if isinstance(error, OSError):
                        raise
                    raise OSError(f"{self.url}: {one_line(error)}") from error
            time.sleep(pauses_s.pop(0))

    def check_writable(self) -> None:
        """Make the folder and write to it.

        Raises:
            RunError: naming the folder and the reason.
        """
        probe = f".probe-{uuid.uuid4().hex[:8]}"
        try:
            self.make()
            self.write(probe, b"")
            self.remove(probe)
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise RunError(
                f"run.storage: cannot write to {self.url} ({reason}); give a folder this user may "
                "write to"
            ) from error


def patiently(
    action: Callable[[], Value],
    patience_s: float = STORAGE_S,
    also: tuple[type[Exception], ...] = (),
) -> Value:
    """What `action` returns; while storage does not let it, it is tried again.

    For what a run cannot do without, and may not guess. What is missing is no reason to wait.

    Args:
        also: what else, beside OSError, may be over soon.

    Raises:
        OSError: the last one (or one of `also`), once `patience_s` seconds are over.
    """
    pauses_s = pauses(patience_s)
    passing: tuple[type[Exception], ...] = (OSError, *also)
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except passing as error:
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise
            log.warning("trying again in %.1f s: %s", pause_s, error)
        time.sleep(pause_s)


def pauses(patience_s: float) -> Iterator[float]:
    """Seconds to wait before each next try, longer and longer; the last as time runs out."""
    deadline, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
    while (left_s := deadline - time.monotonic()) > 0:
        yield min(pause_s, left_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _open_private(path: str, flags: int) -> int:
    """Open a file that others than this user and group cannot read; the umask takes more away."""
    return os.open(path, flags, 0o660)


def _local(path: str) -> str:
    """A local path in full."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:
        raise RunError(
            f"{path}: cannot be opened (nobody has the home {Path(path).parts[0]} here); give the "
            "full path"
        ) from error


def _not_in(log: bytes, beside: list[tuple[str, bytes]]) -> list[bytes]:
    """Of the files beside a log, the lines of those that are not in it yet."""
    return [lines for _, lines in beside if lines not in log]


def _records(content: bytes, having: Collection[str]) -> list[dict[str, Any]]:
    return [r for line in content.splitlines() if (r := parse_record(line, having))]


def parse_record(line: bytes, having: Collection[str] = ()) -> dict[str, Any] | None:
    """The record of a line. None for a torn one (its writer was killed), and for a damaged one: no
    JSON, or without a field that all records are to have."""
    try:
        record = json.loads(line.decode(errors="replace"))  # a bad byte may be in a name
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.keys() >= set(having) else None
