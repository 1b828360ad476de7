"""Compressed files as streams of what is in them.

    path ── open_stored ──> the bytes that were compressed

Read is what the formats' own tools read: several members one after the other, padding after the
last one, and windows of any length. Arrow's decompressors refuse the last two.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow.fs as pafs

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_CHUNK_BYTES = 2**18
_MAX_WINDOW_LOG = 31  # of zstd --long=31, the longest that there is


class _Decoder(Protocol):
    """One member's decompressor; those of bz2, lzma and zstd are such."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor of one gzip member, with the methods of the others."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def needs_input(self) -> bool:
        return not self._decoder.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)


def _zstd() -> Any:
    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
    )


@dataclass(frozen=True)
class _Format:
    """How a format's members are read, what each begins with, and what may follow the last one."""

    new: Callable[[], _Decoder]
    begins: re.Pattern[bytes]
    ignores_rest: bool = False  # as gzip and bzip2 do, with a warning


_GZIP = _Format(_Gzip, re.compile(rb"\x1f\x8b"), ignores_rest=True)
_BZIP2 = _Format(bz2.BZ2Decompressor, re.compile(rb"BZh"), ignores_rest=True)
_XZ = _Format(lzma.LZMADecompressor, re.compile(rb"\xfd7zXZ\0"))
_ZSTD = _Format(_zstd, re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL))
_FORMATS = {".gz": _GZIP, ".bz2": _BZIP2, ".xz": _XZ, ".zst": _ZSTD, ".zstd": _ZSTD}
_BEGIN_BYTES = 6  # enough to tell whether a member begins
COMPRESSED = frozenset({*_FORMATS, ".lz4"})


class _Members(io.RawIOBase):
    """The content of a file's members, one after the other. Raises OSError for damage."""

    def __init__(self, stored: Any, of: _Format) -> None:
        self._stored, self._format = stored, of
        self._decoder: _Decoder | None = None
        self._rest = b""
        self._num_members = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stored.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while self._decoder or self._begins_member():
            assert self._decoder is not None
            data, self._rest = self._rest, b""
            if not data and self._decoder.needs_input:
                data = self._stored.read(_CHUNK_BYTES)
                if not data:
                    raise OSError("the compressed data ends too soon")
            try:
                content = self._decoder.decompress(data, len(buffer))
            except (zlib.error, lzma.LZMAError, zstd.ZstdError, ValueError, EOFError) as error:
                raise OSError(str(error)) from error
            if self._decoder.eof:
                self._rest, self._decoder = self._decoder.unused_data, None
            if content:
                buffer[: len(content)] = content
                return len(content)
        return 0

    def _begins_member(self) -> bool:
        """Whether there is one more member; then its decompressor is ready."""
        while True:
            if self._num_members:
                self._rest = self._rest.lstrip(b"\0")  # padding
            if len(self._rest) >= _BEGIN_BYTES:
                break
            if not (more := self._stored.read(_CHUNK_BYTES)):
                break
            self._rest += more
        if not self._rest:
            return False
        if self._num_members and not self._format.begins.match(self._rest):
            if self._format.ignores_rest:
                return False
            raise OSError("what follows the compressed data is none")
        self._decoder = self._format.new()
        self._num_members += 1
        return True


def open_stored(filesystem: pafs.FileSystem, path: str) -> Any:
    """A file's content as a stream of bytes, decompressed as the end of its name says."""
    ending = os.path.splitext(path.lower())[1]
    if ending in _FORMATS:
        stored = filesystem.open_input_stream(path, compression=None)
        return io.BufferedReader(_Members(stored, _FORMATS[ending]))
    return filesystem.open_input_stream(path, compression="lz4" if ending == ".lz4" else None)
