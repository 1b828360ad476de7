"""Files on a local path or on any filesystem that pyarrow or fsspec opens."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.addresses import REMEDY, has_secret, masked
from pipelines.errors import DataError, Unreadable, one_line


def absolute(path: str) -> str:
    """A path that means the same in every process, whatever folder it works in.

    Without a slash at its end: object stores take `folder//name` for another name, or refuse it.
    """
    if "://" not in path:
        return os.path.abspath(os.path.expanduser(path))
    scheme, mark, inner = path.partition("://")
    return scheme + mark + (inner.rstrip("/") or inner)


def below(folder: str, path: str) -> str:
    """The path of what is in a folder; the `?key=value` of a folder's address stays at its end."""
    base, mark, query = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{base.rstrip('/')}/{path}{mark}{query}"


def locate(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path inside it, for a local path or a URI.

    Raises DataError where neither pyarrow nor an installed fsspec package knows the address, or a
    secret stands in it, and Unreadable where its storage does not answer: already opening may ask
    it, for a bucket's region.
    """
    if "://" not in path:
        return pafs.LocalFileSystem(), absolute(path)
    _refuse_what_may_not_be(path)
    try:
        with os_errors():
            return _opened(path)
    except OSError as error:
        remedy = "; for another endpoint than Amazon's, set AWS_ENDPOINT_URL"
        hint = remedy if path.startswith("s3:") else ""
        raise Unreadable(f"{path}: cannot be reached ({one_line(error)}){hint}") from error


def _refuse_what_may_not_be(path: str) -> None:
    """Raises DataError for an address with a secret in it, and for one of which a part would not be
    looked at, and other text read.

    Arrow drops what follows `?` from the path of a local file; no server is sent what follows `#`.
    """
    if has_secret(path):
        raise DataError(f"{masked(path)}: {REMEDY}")
    if path.startswith("file:") and "?" in path:
        raise DataError(f"{path}: no '?' can be in such an address; name the path without file://")
    if path.startswith(("http:", "https:")) and "#" in path:
        raise DataError(f"{path}: what follows '#' is never asked for; write %23, or leave it out")


def _opened(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of an address; that of fsspec only where pyarrow does not know the address.

    The two tell different things of a file, by which shards are known: which of them it is may not
    depend on the network's state.
    """
    try:
        return pafs.FileSystem.from_uri(_quoted(path))
    except (pa.ArrowInvalid, ImportError) as unknown:
        import fsspec

        try:
            filesystem, inner = fsspec.core.url_to_fs(path)
        except (ValueError, ImportError):
            raise DataError(f"{path}: cannot be opened ({one_line(unknown)})") from unknown
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), inner


def _quoted(path: str) -> str:
    """An address whose name may hold `#` and brackets: Arrow drops the one, refuses the others."""
    if path.startswith("hf:"):  # which Arrow hands on as it is
        return path
    scheme, mark, rest = path.partition("://")
    host, slash, inner = rest.replace("#", "%23").partition("/")
    return scheme + mark + host + slash + inner.replace("[", "%5B").replace("]", "%5D")


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """What libraries of object stores raise on a network's errors is often no OSError: now it is.

    Arrow's own exceptions, which tell of content, stay what they are.
    """
    try:
        yield
    except (OSError, MemoryError, pa.ArrowException):
        raise
    except (LookupError, ValueError, TypeError, AttributeError):  # a defect, not the network's
        raise
    except Exception as error:
        raise OSError(one_line(error) or type(error).__name__) from error


def read_bytes(filesystem: pafs.FileSystem, path: str) -> bytes:
    """A whole file, as it is stored. Raises FileNotFoundError when there is none, or OSError."""
    try:
        with os_errors(), filesystem.open_input_stream(path, compression=None) as stream:
            return bytes(stream.read())
    except pa.ArrowInvalid as error:  # of the path: what is in the file, nobody looks at here
        raise OSError(one_line(error)) from error


def listed(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """What is in a folder: nothing where there is none. Raises Unreadable where storage fails."""
    try:
        with os_errors():
            infos = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
            return list(infos)
    except (OSError, pa.ArrowException) as error:
        raise Unreadable(f"{folder}: cannot be listed ({one_line(error)})") from error


def write_atomically(filesystem: pafs.FileSystem, path: str, content: bytes | pa.Buffer) -> None:
    """Write a whole file so that no reader ever sees a part of it. Raises DataError.

    Object stores show a file only once it is closed; a local one is written aside and renamed.
    """
    try:
        with os_errors():
            filesystem.create_dir(os.path.dirname(path), recursive=True)
            if isinstance(filesystem, pafs.LocalFileSystem):
                _replace(path, content)
                return
            with filesystem.open_output_stream(path, compression=None) as stream:
                stream.write(content)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({one_line(error)}); choose a folder you may write to"
        ) from error


def _replace(path: str, content: bytes | pa.Buffer) -> None:
    """Replace a local file; its content is on the disk before it has its name."""
    scratch = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(scratch)
