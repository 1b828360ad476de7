"""The rows of files that hold many documents: JSON in lines or in one piece, and tables of CSV.

    stream of UTF-8 ── json_rows | csv_rows ──> Row | BadRow, …

JSON is a value a line; or, if the first value goes over several lines or is an array, values one
after the other, and of an array its elements. Of such a file what was read is in memory, as long as
a value does not end; so a value has at most MAX_VALUE_BYTES.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.errors import one_line

MAX_VALUE_BYTES = 2**26
_HEAD_BYTES = 2**12
_JSON_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Row:
    """One document's row; `where` names it, and `index` counts lines, values or rows."""

    index: int
    where: str
    value: Any


@dataclass(frozen=True)
class BadRow:
    """What is no row, and why; with `is_rest` nothing after it can be read either."""

    reason: str
    is_rest: bool = False


def json_rows(stream: Any, chunk_bytes: int) -> Iterator[Row | BadRow]:
    """The values of a JSON file, whichever way they are laid out."""
    lines = io.BufferedReader(stream, max(chunk_bytes, _HEAD_BYTES))
    if _goes_on(lines.peek(_HEAD_BYTES)):
        return _json_values(io.TextIOWrapper(lines, "utf-8-sig"), chunk_bytes)
    return _json_lines(lines)


def _goes_on(head: bytes) -> bool:
    """Whether a file's first value goes on after its first line, or is an array of rows."""
    text = head.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
    if text.startswith("["):
        return text[1:].lstrip()[:1] in ("", "{", "]")
    first, newline, _ = text.partition("\n")
    first = first.rstrip()
    try:
        json.loads(first)
    except json.JSONDecodeError as error:
        # A string cannot go on in the next line: that is a line that was cut.
        return bool(newline) and first.startswith("{") and error.pos >= len(first)
    except RecursionError:
        pass
    return False


def _json_lines(lines: Iterable[bytes]) -> Iterator[Row | BadRow]:
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"line {index + 1}"
        try:
            yield Row(index, where, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{where}: not JSON ({one_line(error)})")


def _json_values(stream: io.TextIOBase, chunk_chars: int) -> Iterator[Row | BadRow]:
    """Values one after the other, and the elements of an array, as far as they can be read."""
    values = _Values(stream, chunk_chars)
    index = 0
    try:
        while (char := values.peek()) != "":
            in_array = char == "["
            if in_array:
                values.skip()
            while not in_array or values.peek() != "]":
                yield Row(index, f"value {index + 1}", values.next())
                index += 1
                if not in_array:
                    break
                if values.peek() != ",":
                    break
                values.skip()
            if in_array:
                if values.peek() != "]":
                    raise ValueError("an array that does not end")
                values.skip()
    except (ValueError, RecursionError) as error:
        yield BadRow(f"value {index + 1}: not JSON ({one_line(error)})", is_rest=True)


class _Values:
    """The JSON values of a stream. Raises ValueError for what is none, or too large."""

    def __init__(self, stream: io.TextIOBase, chunk_chars: int) -> None:
        self._stream, self._chunk_chars = stream, chunk_chars
        self._text, self._at, self._at_end = "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def _read(self, num_chars: int) -> None:
        more = self._stream.read(num_chars)
        self._at_end = not more
        self._text, self._at = self._text[self._at :] + more, 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _JSON_SPACE:
                self._at += 1
            if self._at < len(self._text) or self._at_end:
                return self._text[self._at : self._at + 1]
            self._read(self._chunk_chars)

    def skip(self) -> None:
        self._at += 1

    def next(self) -> Any:
        """The value that comes next. Each time that it is not whole, as much again is read."""
        self.peek()
        while True:
            try:
                value, stop = self._decode(self._text, self._at)
                if stop < len(self._text) or self._at_end:  # of a number, more may follow
                    self._at = stop
                    return value
            except json.JSONDecodeError:
                if self._at_end:
                    raise
            held = len(self._text) - self._at
            if held > MAX_VALUE_BYTES:
                raise ValueError(f"more than {MAX_VALUE_BYTES:,} characters without an end")
            self._read(max(held, self._chunk_chars))


def csv_rows(stream: Any, delimiter: str) -> Iterator[Row | BadRow]:
    """The rows of a table whose first line names the columns, each as a mapping."""
    csv.field_size_limit(MAX_VALUE_BYTES)
    table = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter)
    index = 0
    try:
        for index, row in enumerate(table):
            yield Row(index, f"row {index + 1}", row)
    except (csv.Error, UnicodeDecodeError) as error:
        yield BadRow(f"after row {index + 1}: no table ({one_line(error)})", is_rest=True)
