"""Token shards: the format of a prepared corpus, how it is written and how it is read.

    tokens ── ShardWriter.add ──> <source>/<split>-<key>-<part>.parquet
    Manifest ── TokenReader.read(start, stop) ──> tokens         rows and files are kept in Held

A prepared folder, on a local path or any URI that pyarrow or fsspec opens:

    manifest.json                            counts, dtype, tokenizer fingerprint, checksums
    tokenizer/                               an ordinary Hugging Face tokenizer folder
    <source>/train-<key>-00000.parquet       by the unit's key and the part (units.py); a number
    <source>/validation-<key>-00000.parquet  stands for the key in folders of older versions
    units/                                   what is finished; preparation.json: with what settings

A shard is Parquet that any reader opens. Column `tokens` (list<uint16 or uint32>): a row is
`row_tokens` consecutive tokens; only the last row of a shard may be shorter. Column `crc32`: the
CRC-32 of the row's little-endian token bytes. A row group holds one row, so a reader that wants one
row reads only that row. No token is dropped and none is padding: a split is the concatenation of
its shards in the manifest's order, a *linear token space* 0 … N-1.

Encoding: plain values under zstd. Measured on rows of 65,536 Zipf-distributed tokens, one core,
V = 1,024 / 50,000 / 128,256: 1.4 / 1.9 / 2.0 bytes per token, read at 140–147M tokens/s row by row.
Uncompressed reads at 234–249M but takes 4 bytes; lz4 202–208M at 2.0–2.9; dictionaries lose beyond
small vocabularies; byte-stream-split under zstd is smaller and no slower, but older readers refuse
it for integers. Marking lists and values `required` alone saves about a quarter of the read time.
"""

from __future__ import annotations

import hashlib
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import accumulate

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.errors import DataError, Unreadable, one_line
from pipelines.manifest import PREPARE_AGAIN, Manifest, Shard, checksum_problem
from pipelines.storage import locate, os_errors, write_atomically

MAX_SHARD_TOKENS = 2**25


def _type_problem(schema: pa.Schema) -> str | None:
    """What is wrong with the columns of a row; None if nothing is.

    Looked at before a value is made of them: of some types, Ray's for objects among them, that runs
    what is stored.
    """
    tokens, checksum = schema.types
    is_tokens = pa.types.is_list(tokens) and pa.types.is_integer(tokens.value_type)
    if is_tokens and pa.types.is_integer(checksum):
        return None
    return f"has columns of {tokens} and {checksum}, not tokens and a checksum"


def _told(where: str, error: Exception) -> str:
    return f"{where} cannot be read ({one_line(error)}); {PREPARE_AGAIN}"


def _row_crc32(tokens: np.ndarray) -> int:
    """The checksum that a row of tokens carries: CRC-32 of its little-endian bytes."""
    return zlib.crc32(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).data)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────


def _schema(dtype: np.dtype) -> pa.Schema:
    values = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.schema(
        [
            pa.field("tokens", pa.list_(values), nullable=False),
            pa.field("crc32", pa.uint32(), nullable=False),
        ]
    )


class ShardWriter:
    """Cuts a stream of tokens into rows and shards `<name>-00000.parquet`, `<name>-00001…`, ….

    A shard is built in memory (at most `max_shard_tokens` tokens) and then written in one piece.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        *,
        dtype: str,
        row_tokens: int,
        max_shard_tokens: int = MAX_SHARD_TOKENS,
    ) -> None:
        self.filesystem, self.root = locate(folder)
        self.name = name
        self.dtype = np.dtype(dtype)
        self.row_tokens = row_tokens
        self.max_rows = max(1, max_shard_tokens // row_tokens)
        self.shards: list[Shard] = []
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._sink: pa.BufferOutputStream | None = None
        self._start_shard()

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens [n] to the stream."""
        self._pending.append(tokens.astype(self.dtype, copy=False))
        self._num_pending += len(tokens)
        if self._num_pending < self.row_tokens:
            return
        stream = np.concatenate(self._pending)
        num_whole = len(stream) - len(stream) % self.row_tokens
        for row in stream[:num_whole].reshape(-1, self.row_tokens):  # [rows, row_tokens]
            self._write_row(row)
        self._pending = [stream[num_whole:]]
        self._num_pending = len(stream) - num_whole

    def close(self) -> tuple[Shard, ...]:
        """Write what is left, as a shorter last row, and return the shards in order."""
        if self._num_pending:
            self._write_row(np.concatenate(self._pending))
            self._pending, self._num_pending = [], 0
        if self._num_rows:
            self._finish_shard()
        return tuple(self.shards)

    def _start_shard(self) -> None:
        self._sink = pa.BufferOutputStream()
        self._parquet = pq.ParquetWriter(
            self._sink, _schema(self.dtype), compression="zstd", use_dictionary=False
        )
        self._num_rows = self._num_tokens = 0

    def _write_row(self, tokens: np.ndarray) -> None:
        offsets = pa.array([0, len(tokens)], pa.int32())
        schema = _schema(self.dtype)
        lists = pa.ListArray.from_arrays(offsets, pa.array(tokens), type=schema.field(0).type)
        checksums = pa.array([_row_crc32(tokens)], pa.uint32())
        self._parquet.write_batch(pa.record_batch([lists, checksums], schema=schema))
        self._num_rows += 1
        self._num_tokens += len(tokens)
        if self._num_rows == self.max_rows:
            self._finish_shard()
            self._start_shard()

    def _finish_shard(self) -> None:
        assert self._sink is not None
        self._parquet.close()
        content = self._sink.getvalue()
        file = f"{self.name}-{len(self.shards):05d}.parquet"
        write_atomically(self.filesystem, f"{self.root}/{file}", content)
        checksum = hashlib.sha256(content).hexdigest()
        self.shards.append(Shard(file, self._num_tokens, self._num_rows, content.size, checksum))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


class Held:
    """The rows and the open files that readers used last; one may serve many readers.

    Args:
        rows_bytes: of decoded rows, in all.
        num_files: open at once, in all; the footer of one that was closed is read again.
    """

    def __init__(self, rows_bytes: int = 64 * 2**20, num_files: int = 16) -> None:
        self.rows_bytes = rows_bytes
        self.num_files = num_files
        self.rows: OrderedDict[tuple[Hashable, ...], np.ndarray] = OrderedDict()
        self.files: OrderedDict[tuple[Hashable, ...], pq.ParquetFile] = OrderedDict()
        self._bytes = 0

    def row(self, key: tuple[Hashable, ...], decode: Callable[[], np.ndarray]) -> np.ndarray:
        """The row of that key, decoded where it is not held."""
        if key in self.rows:
            self.rows.move_to_end(key)
            return self.rows[key]
        tokens = self.rows[key] = decode()
        self._bytes += tokens.nbytes
        while self._bytes > self.rows_bytes and len(self.rows) > 1:
            self._bytes -= self.rows.popitem(last=False)[1].nbytes
        return tokens

    def file(
        self, key: tuple[Hashable, ...], open_it: Callable[[], pq.ParquetFile]
    ) -> pq.ParquetFile:
        """The file of that key, opened where it is not held."""
        if key in self.files:
            self.files.move_to_end(key)
            return self.files[key]
        parquet = self.files[key] = open_it()
        if len(self.files) > self.num_files:
            self.files.popitem(last=False)[1].close(force=True)
        return parquet


class TokenReader:
    """Random access to the linear token space of one split of one source.

    Reads only the rows that a span touches, checks each row's CRC-32 and token ids as it decodes
    it, and keeps the rows used last in `held`: its own unless given. Not for use by several threads
    at once, nor what they hold: give each its own.
    """

    def __init__(
        self,
        manifest: Manifest,
        source_name: str,
        split: str = "train",
        held: Held | None = None,
    ) -> None:
        shards = manifest.source(source_name).split(split).shards
        self.folder = manifest.folder
        self.dtype = np.dtype(manifest.dtype)
        self.row_tokens = manifest.row_tokens
        self.vocab_size = manifest.vocab_size
        self.shards = shards
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self.held = held or Held()
        self._place: tuple[pafs.FileSystem, str] | None = None

    @property
    def num_tokens(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop-1 of the split: a new array [stop - start] of the shards' dtype.

        Raises IndexError outside 0 … num_tokens, and DataError, naming shard and row, where a row
        is unreadable or is not what was written.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}…{stop} of a split of {self.num_tokens}")
        tokens = np.empty(stop - start, self.dtype)
        position = start
        while position < stop:
            index = bisect_right(self._ends, position)
            offset = position - (self._ends[index] - self.shards[index].tokens)
            row = self._row(index, offset // self.row_tokens)
            piece = row[offset % self.row_tokens :][: stop - position]
            tokens[position - start :][: len(piece)] = piece
            position += len(piece)
        return tokens

    def _row(self, index: int, row: int) -> np.ndarray:
        return self.held.row((*self._key(index), row), lambda: self._decode(index, row))

    def _key(self, index: int) -> tuple[Hashable, ...]:
        """What a shard is held by: a file of the same name may be another in another corpus."""
        shard = self.shards[index]
        return self.folder, shard.file, shard.sha256

    def _decode(self, index: int, row: int) -> np.ndarray:
        shard = self.shards[index]
        where = f"shard {self.folder}/{shard.file}, row {row}"
        parquet = self.held.file(self._key(index), lambda: self._parquet(index))
        try:
            columns = ["tokens", "crc32"]
            with os_errors():
                table = parquet.read_row_group(row, columns=columns, use_threads=False)
            if problem := _type_problem(table.schema):
                raise DataError(f"{where}: {problem}; {PREPARE_AGAIN}")
            lists = table.column(0).combine_chunks()
            tokens = lists.values.to_numpy()
            checksum = table.column(1)[0].as_py()
        except OSError as error:
            raise self._unreadable(shard, where, error) from None
        except DataError:
            raise
        except (pa.ArrowException, KeyError, IndexError, AttributeError, ValueError) as error:
            raise DataError(_told(where, error)) from None
        expected = min(self.row_tokens, shard.tokens - row * self.row_tokens)
        if len(tokens) != expected or tokens.dtype != self.dtype:
            raise DataError(
                f"{where} has {len(tokens)} {tokens.dtype} tokens instead of {expected} "
                f"{self.dtype}; {PREPARE_AGAIN}"
            )
        if (actual := _row_crc32(tokens)) != checksum:
            raise DataError(
                f"{where} has CRC-32 {actual:08x} instead of {checksum:08x}: "
                "it was altered; delete that file and run `tst-ray prepare` again, or restore it "
                "from a copy"
            )
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise DataError(
                f"{where} has token id {largest}, outside the vocabulary of {self.vocab_size}; "
                "the shards belong to another tokenizer: prepare them again with this one"
            )
        return tokens

    def _unreadable(self, shard: Shard, where: str, error: OSError) -> DataError:
        """Arrow says OSError of altered content, too; only the checksum tells what it is."""
        try:
            altered = checksum_problem(self.folder, shard)
        except OSError:
            altered = None
        return (DataError if altered else Unreadable)(_told(where, error))

    def _parquet(self, index: int) -> pq.ParquetFile:
        """A shard's file. Raises DataError where it has other rows than the manifest says."""
        shard = self.shards[index]
        where = f"shard {self.folder}/{shard.file}"
        filesystem, root = self._place = self._place or locate(self.folder)
        try:
            with os_errors():
                file = filesystem.open_input_file(f"{root}/{shard.file}")
                size = file.size()
            if size != shard.bytes:
                raise DataError(
                    f"{where} has {size} bytes instead of {shard.bytes}; {PREPARE_AGAIN}"
                )
            with os_errors():
                parquet = pq.ParquetFile(file)
        except FileNotFoundError:
            raise DataError(f"{where} is missing; {PREPARE_AGAIN}") from None
        except OSError as error:
            raise self._unreadable(shard, where, error) from None
        except pa.ArrowException as error:
            raise DataError(_told(where, error)) from None
        rows = parquet.num_row_groups
        last = parquet.metadata.row_group(rows - 1).column(0).num_values if rows else 0
        # Of a row before the last one, the length is looked at when it is read.
        if (rows - 1) * self.row_tokens + last != shard.tokens:
            raise DataError(
                f"{where} has {rows} rows, the last of {last} tokens, instead of {shard.tokens} "
                f"tokens in rows of {self.row_tokens}; {PREPARE_AGAIN}"
            )
        return parquet
