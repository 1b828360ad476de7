"""The token-shard format: what a prepared corpus looks like on disk, and how to read it.

    manifest.json ── Manifest.load ──> Manifest (sources → splits → shards)
                                          │
        verify_sizes / verify_checksums ──┤
                                          └──> TokenReader.read(start, stop) ──> tokens

A prepared folder, on a local path or any URI that pyarrow or fsspec opens:

    manifest.json                            counts, dtype, tokenizer fingerprint, checksums
    tokenizer/                               an ordinary Hugging Face tokenizer folder
    <source>/train-00000-00000.parquet       unit number, part number
    <source>/validation-00000-00000.parquet

A shard is Parquet that any reader opens. Column `tokens` (list<uint16 or uint32>): a row is
`row_tokens` consecutive tokens; only the last row of a shard may be shorter. Column `crc32`: the
CRC-32 of the row's little-endian token bytes. A row group holds one row, so a reader that wants one
row reads only that row. No token is dropped and none is padding: a split is the concatenation of
its shards in the manifest's order, a *linear token space* 0 … N-1.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.errors import DataError
from pipelines.storage import locate, one_line, read_bytes, write_atomically

FORMAT, VERSION = "token-shards", 1
SPLITS = ("train", "validation")
PREPARE_AGAIN = "run `tst-ray prepare` again, or restore the file from a copy"


# ── the manifest ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shard:
    """One Parquet file of tokens; `file` is relative to the prepared folder."""

    file: str
    tokens: int
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a source: the concatenation of its shards."""

    tokens: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: tuple[Shard, ...]) -> Split:
        return cls(sum(shard.tokens for shard in shards), shards)


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture; `skipped` names the first of `num_skipped` unreadable texts."""

    name: str
    path: str
    documents: int
    text_bytes: int
    num_skipped: int
    skipped: tuple[dict[str, str], ...]
    train: Split
    validation: Split

    def split(self, name: str) -> Split:
        assert name in SPLITS, name
        return self.train if name == "train" else self.validation


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds. `settings` are the choices that its shards were made with."""

    folder: str
    dtype: str
    row_tokens: int
    vocab_size: int
    eot_token: int
    tokenizer_fingerprint: str
    sources: tuple[Source, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str) -> Manifest:
        """Read `folder`/manifest.json. Raises DataError where there is none, or none of ours."""
        filesystem, path = locate(folder)
        where = f"{folder}/manifest.json"
        try:
            content = json.loads(read_bytes(filesystem, f"{path}/manifest.json"))
        except FileNotFoundError:
            raise DataError(
                f"{where}: not found; make the shards with `tst-ray prepare`, "
                "or correct the folder's name"
            ) from None
        except OSError as error:
            raise DataError(f"{where}: cannot be read ({one_line(error)})") from error
        except ValueError as error:
            raise DataError(
                f"{where}: not valid JSON ({one_line(error)}); {PREPARE_AGAIN}"
            ) from None
        found = (content.get("format"), content.get("version")) if isinstance(content, dict) else ()
        if found != (FORMAT, VERSION):
            raise DataError(
                f"{where}: not a manifest of {FORMAT} version {VERSION}; {PREPARE_AGAIN}"
            )
        try:
            return cls._from_json(folder, content)
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: misses or misspells {error}; {PREPARE_AGAIN}") from None

    @classmethod
    def _from_json(cls, folder: str, content: dict[str, Any]) -> Manifest:
        return cls(
            folder=folder,
            dtype=content["dtype"],
            row_tokens=content["row_tokens"],
            vocab_size=content["vocab_size"],
            eot_token=content["eot_token"],
            tokenizer_fingerprint=content["tokenizer"]["fingerprint"],
            sources=tuple(_source_from_json(source) for source in content["sources"]),
            settings=content["settings"],
        )

    def save(self) -> None:
        """Write manifest.json atomically: until then, the folder's previous manifest stands."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            "row_tokens": self.row_tokens,
            "vocab_size": self.vocab_size,
            "eot_token": self.eot_token,
            "tokenizer": {"folder": "tokenizer", "fingerprint": self.tokenizer_fingerprint},
            "settings": self.settings,
            "sources": [asdict(source) for source in self.sources],
        }
        filesystem, path = locate(self.folder)
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(filesystem, f"{path}/manifest.json", text.encode())

    @property
    def tokenizer_folder(self) -> str:
        return f"{self.folder}/tokenizer"

    @property
    def fingerprint(self) -> str:
        """Identifies the corpus: sha256 over the checksums of all shards, in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            for name in SPLITS:
                digest.update(f"{source.name}/{name}\n".encode())
                for shard in source.split(name).shards:
                    digest.update(f"{shard.sha256}\n".encode())
        return digest.hexdigest()

    def source(self, name: str) -> Source:
        """The source of that name. Raises DataError, naming those there are."""
        for source in self.sources:
            if source.name == name:
                return source
        names = ", ".join(source.name for source in self.sources)
        raise DataError(f"{self.folder}: has no source named {name}; it has {names}")

    def shards(self) -> Iterator[Shard]:
        """Every shard of every source and split."""
        for source in self.sources:
            for name in SPLITS:
                yield from source.split(name).shards


def _source_from_json(content: dict[str, Any]) -> Source:
    splits = {
        name: Split(
            content[name]["tokens"], tuple(Shard(**shard) for shard in content[name]["shards"])
        )
        for name in SPLITS
    }
    return Source(**{**content, "skipped": tuple(content["skipped"]), **splits})


# ── verification ─────────────────────────────────────────────────────────────────────────────────


def damaged_shards(folder: str, shards: list[Shard]) -> dict[str, str]:
    """The shards that are missing or of another size, by file name, each with what is wrong.

    Lists each source's folder once instead of asking for every file: one request for thousands.
    """
    filesystem, root = locate(folder)
    sizes: dict[str, int] = {}
    for name in sorted({os.path.dirname(shard.file) for shard in shards}):
        selector = pafs.FileSelector(f"{root}/{name}", allow_not_found=True)
        for info in filesystem.get_file_info(selector):
            sizes[f"{name}/{info.base_name}"] = info.size
    problems = {}
    for shard in shards:
        size = sizes.get(shard.file)
        if size is None:
            problems[shard.file] = "is missing"
        elif size != shard.bytes:
            problems[shard.file] = f"has {size} bytes instead of {shard.bytes}"
    return problems


def verify_sizes(manifest: Manifest) -> None:
    """Check that every shard exists with its size. Raises DataError naming the first that fails."""
    for file, problem in damaged_shards(manifest.folder, list(manifest.shards())).items():
        raise DataError(f"shard {manifest.folder}/{file} {problem}; {PREPARE_AGAIN}")


def verify_checksums(manifest: Manifest) -> None:
    """Check the SHA-256 of every shard: reads the whole corpus. Raises DataError."""
    verify_sizes(manifest)
    filesystem, root = locate(manifest.folder)
    for shard in manifest.shards():
        digest = hashlib.sha256()
        with filesystem.open_input_stream(f"{root}/{shard.file}", compression=None) as stream:
            while chunk := stream.read(2**22):
                digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            raise DataError(
                f"shard {manifest.folder}/{shard.file} has SHA-256 {digest.hexdigest()[:12]}… "
                f"instead of {shard.sha256[:12]}…: it was altered; {PREPARE_AGAIN}"
            )


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def row_crc32(tokens: np.ndarray) -> int:
    """The checksum that a row of tokens carries: CRC-32 of its little-endian bytes."""
    return zlib.crc32(np.ascontiguousarray(tokens, tokens.dtype.newbyteorder("<")).data)


class TokenReader:
    """Random access to the linear token space of one split of one source.

    Reads only the rows that a span touches, checks each row's CRC-32 and token ids as it decodes
    it, and keeps the most recently used rows decoded. Pickles without its open files and cache.
    Not for use by several threads at once: give each its own.
    """

    max_open_shards = 16
    _transient = ("_rows", "_rows_bytes", "_open")

    def __init__(
        self,
        manifest: Manifest,
        source_name: str,
        split: str = "train",
        cache_rows_bytes: int = 64 * 2**20,
    ) -> None:
        shards = manifest.source(source_name).split(split).shards
        self.folder = manifest.folder
        self.dtype = np.dtype(manifest.dtype)
        self.row_tokens = manifest.row_tokens
        self.vocab_size = manifest.vocab_size
        self.cache_rows_bytes = cache_rows_bytes
        self.shards = shards
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._forget()

    def _forget(self) -> None:
        self._rows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._rows_bytes = 0
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {
            k: v for k, v in self.__dict__.items() if k not in ("_rows", "_rows_bytes", "_open")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

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
        if (index, row) in self._rows:
            self._rows.move_to_end((index, row))
            return self._rows[index, row]
        tokens = self._decode(index, row)
        self._rows[index, row] = tokens
        self._rows_bytes += tokens.nbytes
        while self._rows_bytes > self.cache_rows_bytes and len(self._rows) > 1:
            self._rows_bytes -= self._rows.popitem(last=False)[1].nbytes
        return tokens

    def _decode(self, index: int, row: int) -> np.ndarray:
        shard = self.shards[index]
        where = f"shard {self.folder}/{shard.file}, row {row}"
        parquet = self._parquet(index)
        try:
            columns = ["tokens", "crc32"]
            table = parquet.read_row_group(row, columns=columns, use_threads=False)
            lists = table.column(0).combine_chunks()
            tokens = lists.values.to_numpy()
            checksum = table.column(1)[0].as_py()
        except (OSError, pa.ArrowException, KeyError, IndexError, AttributeError) as error:
            raise DataError(
                f"{where} cannot be read ({one_line(error)}); {PREPARE_AGAIN}"
            ) from None
        expected = min(self.row_tokens, shard.tokens - row * self.row_tokens)
        if len(tokens) != expected or tokens.dtype != self.dtype:
            raise DataError(
                f"{where} has {len(tokens)} {tokens.dtype} tokens instead of {expected} "
                f"{self.dtype}; {PREPARE_AGAIN}"
            )
        if (actual := row_crc32(tokens)) != checksum:
            raise DataError(
                f"{where} has CRC-32 {actual:08x} instead of {checksum:08x}: "
                f"it was altered; {PREPARE_AGAIN}"
            )
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise DataError(
                f"{where} has token id {largest}, outside the vocabulary of {self.vocab_size}; "
                "the shards belong to another tokenizer: prepare them again with this one"
            )
        return tokens

    def _parquet(self, index: int) -> pq.ParquetFile:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        shard = self.shards[index]
        where = f"shard {self.folder}/{shard.file}"
        filesystem, root = locate(self.folder)
        try:
            file = filesystem.open_input_file(f"{root}/{shard.file}")
            size = file.size()
            if size != shard.bytes:
                raise DataError(
                    f"{where} has {size} bytes instead of {shard.bytes}; {PREPARE_AGAIN}"
                )
            parquet = pq.ParquetFile(file)
        except FileNotFoundError:
            raise DataError(f"{where} is missing; {PREPARE_AGAIN}") from None
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"{where} cannot be read ({one_line(error)}); {PREPARE_AGAIN}"
            ) from None
        self._open[index] = parquet
        if len(self._open) > self.max_open_shards:
            self._open.popitem(last=False)[1].close(force=True)
        return parquet
