"""The texts in a source's files.

    Unit ── read_unit ──> Text | LeftOut, …         in the files' order
    Corpora ── sample_texts ──> str, …                 what a tokenizer is trained on

What a document is: a text file, a value of a JSON file, a row of a Parquet file or of a table.
Files may be compressed (compression.py) and in any Unicode encoding (encodings.py). A document
longer than PIECE_BYTES comes in pieces cut at line ends: a tokenizer takes some 150 times the size
of what it is given at once. A text file is read so, too: it is never whole in memory, and each
piece counts for the hold-out as a document would. The pieces of a row are held out together.
Text is kept byte for byte as UTF-8; only a byte-order mark is dropped. A file that has NUL bytes
near its beginning is no text; later on, and in rows, they are characters like others.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.compression import open_stored
from pipelines.corpus import Corpus, TextFile, Unit, draw
from pipelines.encodings import as_utf8
from pipelines.errors import DataError, one_line
from pipelines.kinds import JSON_LINES, PARQUET, TABLES, file_kind
from pipelines.rows import BadRow, csv_rows, json_rows
from pipelines.storage import below, locate, os_errors

PIECE_BYTES = 2**20
SALVAGE_BYTES = 2**12  # read at a time where the rest is damaged; up to so many before it are lost
MOST_UNREAD = 4_000  # texts in vain before a source is given up


@dataclass(frozen=True)
class Text:
    """A document, or a piece of a long one; `index` counts its file's pieces, lines or rows.

    The pieces of a line or a row all have its index.
    """

    path: str
    index: int
    content: str
    num_bytes: int
    ends_document: bool = True


@dataclass(frozen=True)
class LeftOut:
    """A text that cannot be used, or all the texts that are left in a file, and why."""

    path: str
    reason: str
    is_rest: bool = False
    lacks_field: bool = False  # as all of a source do, where its text_field is wrong


def read_unit(unit: Unit) -> Iterator[Text | LeftOut]:
    """Every text of a unit's files, in order. Raises DataError where the storage fails."""
    for file in unit.files:
        yield from read_file(unit.root, file, unit.text_field)


def read_file(root: str, file: TextFile, text_field: str) -> Iterator[Text | LeftOut]:
    """The texts of one file; what storage delivers but cannot be decoded is LeftOut.

    Raises DataError where the storage fails: that is never a reason to leave out a text.
    """
    filesystem, inner = locate(root)
    path, where = below(inner, file.path), below(root, file.path)
    last: Text | None = None
    try:
        for text in _decoded(filesystem, path, file, text_field):
            last = text if isinstance(text, Text) else last
            yield text
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({one_line(error)})") from error
    except MemoryError as error:
        raise DataError(
            f"{where}: does not fit into memory ({one_line(error)}); split the file"
        ) from error
    if last and not last.ends_document:  # the rest was unreadable; the document ends all the same
        yield Text(file.path, last.index + 1, "", 0)


def _decoded(
    filesystem: pafs.FileSystem, path: str, file: TextFile, text_field: str
) -> Iterator[Text | LeftOut]:
    """The texts of a file; where reading fails, read once more, from the same text on.

    Whether the file is damaged or the storage failed for a moment, the error alone does not tell.
    Storage that delivers all its bytes, of which a copy (here, the file itself) fails too, does.
    """
    num_given = 0
    try:
        with os_errors():
            for text in _texts(filesystem, path, file, text_field):
                yield text
                num_given += 1
        return
    except (OSError, pa.ArrowException):
        pass
    with tempfile.TemporaryDirectory() as folder:
        is_here = isinstance(filesystem, pafs.LocalFileSystem)
        copy = path if is_here else f"{folder}/{os.path.basename(path)}"
        _fetch(filesystem, path, os.devnull if is_here else copy)
        try:
            salvaged = _texts(pafs.LocalFileSystem(), copy, file, text_field, SALVAGE_BYTES)
            for number, text in enumerate(salvaged):
                if number >= num_given:
                    yield text
        except MemoryError:  # Arrow's is one of its exceptions, too
            raise
        except (OSError, pa.ArrowException) as error:
            yield LeftOut(file.path, f"damaged or cut short ({one_line(error)})", is_rest=True)


def _texts(
    filesystem: pafs.FileSystem,
    path: str,
    file: TextFile,
    text_field: str,
    chunk_bytes: int | None = None,
) -> Iterator[Text | LeftOut]:
    """The texts of a file. Where that is told, it is read so many bytes at a time, and what comes
    before an error is given before it is raised."""
    kind = file_kind(file.path)
    if kind in PARQUET:
        return _parquet_rows(filesystem, path, file, text_field)
    if kind in JSON_LINES or kind in TABLES:
        return _rows(filesystem, path, file, text_field, chunk_bytes or PIECE_BYTES)
    return _pieces(filesystem, path, file, chunk_bytes)


def _fetch(filesystem: pafs.FileSystem, path: str, copy: str) -> None:
    """Copy a file as it is stored. Raises OSError where the storage fails."""
    with (
        os_errors(),
        filesystem.open_input_stream(path, compression=None) as stream,
        open(copy, "wb") as target,
    ):
        while chunk := stream.read(2**22):
            target.write(chunk)


# ── text files ───────────────────────────────────────────────────────────────────────────────────


def _pieces(
    filesystem: pafs.FileSystem, path: str, file: TextFile, chunk_bytes: int | None
) -> Iterator[Text | LeftOut]:
    """A text file as its pieces; only the last one ends the document."""
    index = 0
    pending = b""
    with open_stored(filesystem, path) as stored:
        stream, is_text = as_utf8(stored)
        if not is_text:
            yield LeftOut(file.path, "has NUL bytes, as no text has (a binary file)", is_rest=True)
            return
        while True:
            try:
                chunk = stream.read(chunk_bytes or PIECE_BYTES)
            except (OSError, pa.ArrowException):
                if chunk_bytes and (whole := _whole_characters(pending)):
                    yield _decode(file.path, index, whole, ends_document=False)
                raise
            if not chunk:
                break
            pending += chunk
            while len(pending) > PIECE_BYTES:
                cut = _cut(pending)
                yield _decode(file.path, index, pending[:cut], ends_document=False)
                pending = pending[cut:]
                index += 1
    if pending:
        yield _decode(file.path, index, pending, ends_document=True)


def _cut(pending: bytes) -> int:
    """Where a piece ends: after its last line, or for want of one between two characters."""
    after_line = pending.rfind(b"\n", 0, PIECE_BYTES) + 1
    if after_line:
        return after_line
    cut = PIECE_BYTES
    while cut > PIECE_BYTES - 4 and pending[cut] & 0xC0 == 0x80:  # inside a UTF-8 character
        cut -= 1
    return cut


def _whole_characters(raw: bytes) -> bytes:
    """Without the part of a character that may be at its end."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return raw[: error.start]
    return raw


def _decode(path: str, index: int, raw: bytes, *, ends_document: bool) -> Text | LeftOut:
    if index == 0:
        raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not text
    try:
        return Text(path, index, raw.decode("utf-8"), len(raw), ends_document)
    except UnicodeDecodeError as error:
        piece = f"piece {index + 1}: " if index or not ends_document else ""
        return LeftOut(path, f"{piece}not UTF-8 at byte {error.start} ({error.reason})")


# ── files of many documents ──────────────────────────────────────────────────────────────────────


def _rows(
    filesystem: pafs.FileSystem, path: str, file: TextFile, field: str, chunk_bytes: int
) -> Iterator[Text | LeftOut]:
    kind = file_kind(file.path)
    with open_stored(filesystem, path) as stored:
        stream, _ = as_utf8(stored)
        is_table = kind in TABLES
        rows = csv_rows(stream, TABLES[kind]) if is_table else json_rows(stream, chunk_bytes)
        for row in rows:
            if isinstance(row, BadRow):
                yield LeftOut(file.path, row.reason, row.is_rest)
            elif isinstance(row.value, dict) and field in row.value:
                yield from _field_text(file.path, row.index, row.value[field], row.where, field)
            elif is_table:
                names = ", ".join(map(str, row.value))
                yield LeftOut(file.path, _no_column(field, names), is_rest=True, lacks_field=True)
                return
            else:
                reason = f"{row.where}: no text in field {field!r} (text_field)"
                yield LeftOut(file.path, reason, lacks_field=True)


def _no_column(field: str, names: str) -> str:
    return f"no column {field!r} (text_field); it has {names[:200]}"


def _parquet_rows(
    filesystem: pafs.FileSystem, path: str, file: TextFile, field: str
) -> Iterator[Text | LeftOut]:
    with filesystem.open_input_file(path) as stream:
        parquet = pq.ParquetFile(stream)
        names = parquet.schema_arrow.names
        start, stop = file.row_groups or (0, parquet.num_row_groups)
        if field not in names:
            if start == 0:  # of a file that is read in parts, the first one says so
                reason = _no_column(field, ", ".join(names))
                yield LeftOut(file.path, reason, is_rest=True, lacks_field=True)
            return
        index = sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        groups = range(start, stop)
        for batch in parquet.iter_batches(256, groups, [field], use_threads=False):
            for value in _undecoded(batch.column(0)).to_pylist():
                yield from _field_text(file.path, index, value, f"row {index + 1}", field)
                index += 1


def _undecoded(column: pa.Array) -> pa.Array:
    """A column of strings as bytes: Arrow does not check them, and one bad row is not all.

    Of a type of somebody's own only what is stored is looked at, and of what is neither text nor
    bytes nothing: to make a value of Ray's type for objects, known wherever Ray Data is, runs the
    pickle that it is.
    """
    while isinstance(column, pa.ExtensionArray | pa.DictionaryArray):
        is_own = isinstance(column, pa.ExtensionArray)
        column = column.storage if is_own else column.dictionary_decode()
    strings = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }
    if column.type in strings:
        return column.cast(strings[column.type])
    is_bytes = column.type in strings.values() or pa.types.is_fixed_size_binary(column.type)
    return column if is_bytes else pa.nulls(len(column))


def _field_text(
    path: str, index: int, value: object, where: str, field: str
) -> Iterable[Text | LeftOut]:
    """The text of one line or row, or its pieces: nothing for an empty one."""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return [LeftOut(path, f"{where}: not UTF-8 at byte {error.start} ({error.reason})")]
    if not isinstance(value, str):
        return [LeftOut(path, f"{where}: no text in field {field!r} (text_field)")]
    try:
        raw = value.encode("utf-8")
    except UnicodeEncodeError:
        return [LeftOut(path, f"{where}: a lone surrogate, which is not text")]
    return _cut_up(path, index, raw) if raw else []


def _cut_up(path: str, index: int, raw: bytes) -> Iterator[Text]:
    """The pieces of a document that is in memory; only the last one ends it."""
    start = 0
    while len(raw) - start > PIECE_BYTES:
        stop = start + _cut(raw[start : start + PIECE_BYTES + 1])
        yield Text(path, index, raw[start:stop].decode(), stop - start, ends_document=False)
        start = stop
    yield Text(path, index, raw[start:].decode(), len(raw) - start)


# ── a sample, to train a tokenizer on ────────────────────────────────────────────────────────────


def sample_texts(corpora: Sequence[Corpus], limit: int) -> Iterator[str]:
    """About `limit` characters of text, equally from each source, in a hash's order of its files.

    A file gives at most what each would give if all gave the same, but at least 64 Ki: of many
    small files some are taken whole, of a few big ones each gives its beginning.

    Raises DataError for a source none of whose first texts have the field `text_field`, thousands,
    from several files where it has them: the whole of it would tell no more.
    """
    for corpus in corpora:
        yield from _sample(corpus, limit // len(corpora))


def _sample(corpus: Corpus, left: int) -> Iterator[str]:
    quota = max(2**16, left // len(corpus.files))
    files = sorted(corpus.files, key=lambda file: draw("sample", file.path))
    is_any_good = False
    # A file that begins badly is left for another; where none is better, it is read further.
    for patience in (math.ceil(MOST_UNREAD / min(len(files), 8)), MOST_UNREAD):
        num_lacking, left_early = 0, []
        for file in files:
            if left <= 0:
                break
            taken = num_here = 0
            for text in read_file(corpus.root, file, corpus.text_field):
                if isinstance(text, Text):
                    is_any_good = True
                    content = text.content[: quota - taken]
                    taken += len(content)
                    yield content
                    if taken >= quota:
                        break
                elif text.lacks_field and not is_any_good:
                    num_here, num_lacking = num_here + 1, num_lacking + 1
                    if num_lacking >= MOST_UNREAD:
                        raise DataError(
                            f"source {corpus.root}: none of the first {num_lacking:,} texts can be "
                            f"read, such as {text.path}: {text.reason}; correct its text_field in "
                            "data.sources"
                        )
                    if num_here >= patience:
                        left_early.append(file)
                        break
            left -= taken
        if is_any_good or not left_early:
            return
        files = left_early
