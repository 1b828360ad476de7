"""Text in any Unicode encoding as UTF-8.

    stream of bytes ── as_utf8 ──> stream of UTF-8, and whether it is text at all

An encoding is told by its byte-order mark. Without one, text of UTF-16 and UTF-32 is known by its
NUL bytes, which text in UTF-8 has none of. What has NULs and is neither is no text.
"""

from __future__ import annotations

import codecs
import io
import unicodedata
from typing import Any

HEAD_BYTES = 2**13
# The mark of UTF-32 in little-endian order begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NO_TEXT = {"Cc", "Cn", "Co", "Cs"}  # categories of characters that a text seldom has


def encoding_of(head: bytes) -> str | None:
    """The encoding of a text that begins so: "utf-8", or of UTF-16 and UTF-32 the one that fits.

    None for what is no text.
    """
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return "utf-8"
    low, high = head[0::2].count(0), head[1::2].count(0)
    is_sure = 8 * max(low, high) > len(head)  # a quarter of the characters have a NUL byte
    if not is_sure and _decoded(head.replace(b"\0", b""), "utf-8"):
        return None
    encodings = ("utf-32-le", "utf-32-be", "utf-16-le" if high > low else "utf-16-be")
    return next((encoding for encoding in encodings if _is_plain(head, encoding)), None)


def _decoded(head: bytes, encoding: str) -> str | None:
    """The text that bytes are in an encoding; its last character may be cut."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return None


def _is_plain(head: bytes, encoding: str) -> bool:
    """Whether bytes are plain characters in an encoding."""
    text = _decoded(head, encoding) or ""
    return text != "" and all(c.isspace() or unicodedata.category(c) not in _NO_TEXT for c in text)


class _Utf8(io.RawIOBase):
    """A stream's text in UTF-8, without a byte-order mark. Raises OSError for what is no text."""

    def __init__(self, stream: Any, head: bytes, encoding: str) -> None:
        self._stream, self._head, self._encoding = stream, head, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._num_read, self._content, self._at_end = 0, b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and not self._at_end:
            data = self._head or self._stream.read(len(buffer))
            self._head, self._at_end = b"", not data
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = f"after byte {self._num_read}"
                raise OSError(f"not {self._encoding.upper()} {where} ({error.reason})") from error
            if not self._num_read:
                text = text.removeprefix("\ufeff")
            self._num_read += len(data)
            self._content = text.encode()
        length = min(len(buffer), len(self._content))
        buffer[:length] = self._content[:length]
        self._content = self._content[length:]
        return length


class _Whole(io.RawIOBase):
    """A stream of which the head was read already."""

    def __init__(self, stream: Any, head: bytes) -> None:
        self._stream, self._head = stream, head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] if self._head else self._stream.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


def as_utf8(stream: Any) -> tuple[io.RawIOBase, bool]:
    """A stream's text in UTF-8, and whether it is text; if not, the stream stays what it is."""
    head = b""
    while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES - len(head))):
        head += more
    encoding = encoding_of(head)
    if encoding in (None, "utf-8"):
        return _Whole(stream, head), encoding is not None
    return _Utf8(stream, head, encoding), True
