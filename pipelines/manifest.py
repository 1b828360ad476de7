"""What a prepared folder holds, and whether it still does.

manifest.json ── Manifest.load ──> Manifest: sources → splits → shards
                                      └── verify_shards
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.errors import DataError, Missing, Unreadable, one_line
from pipelines.storage import listed, locate, os_errors, read_bytes, write_atomically

FORMAT, VERSION = "token-shards", 1
SPLITS = ("train", "validation")
PREPARE_AGAIN = "run `tst-ray prepare` again, or restore the file from a copy"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # as a source's name has it: no `..`, nothing hidden
_SHARD_NAME = re.compile(f"{_NAME}(/{_NAME})*")


@dataclass(frozen=True)
class Shard:
    """One Parquet file of tokens; `file` is relative to the prepared folder.

    Raises DataError where `file` may lie outside of it: whoever can write a manifest would choose
    what is opened.
    """

    file: str
    tokens: int
    rows: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not (isinstance(self.file, str) and _SHARD_NAME.fullmatch(self.file)):
            raise DataError(f"shard {self.file!r}: is no name of a file in the prepared folder")


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
    """One corpus of the mixture; `skipped` names the first of `num_skipped` unreadable texts.

    `cut` names the first of `num_cut` files of which all or the rest was left out, however many
    texts that were.
    """

    name: str
    path: str
    documents: int
    text_bytes: int
    num_skipped: int
    skipped: tuple[dict[str, str], ...]
    train: Split
    validation: Split
    num_cut: int = 0
    cut: tuple[dict[str, str], ...] = ()

    @property
    def left_out(self) -> str:
        """What could not be read, with examples; empty where all could."""
        kinds = (
            ("texts", self.num_skipped, self.skipped[:1]),
            ("files, or the rest of them", self.num_cut, self.cut[:3]),
        )
        return " and ".join(
            f"{number:,} {kind} ({_examples(entries)})" for kind, number, entries in kinds if number
        )

    def split(self, name: str) -> Split:
        assert name in SPLITS, name
        return self.train if name == "train" else self.validation


def _examples(entries: tuple[dict[str, str], ...]) -> str:
    return "; ".join(f"{entry['path']}: {entry['reason']}" for entry in entries)


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
    def load(cls, folder: str, copy: str | None = None) -> Manifest:
        """Read `folder`/manifest.json, or a copy of it that `save` put elsewhere.

        Shards are never altered, so a corpus that has grown since the copy was made is still there
        as it was. Raises DataError where there is no manifest, or none of ours.
        """
        where = copy or f"{folder}/manifest.json"
        filesystem, path = locate(where)
        try:
            content = json.loads(read_bytes(filesystem, path))
        except FileNotFoundError:
            raise Missing(
                f"{where}: not found; make the shards with `tst-ray prepare`, "
                "or correct the folder's name"
            ) from None
        except OSError as error:
            raise Unreadable(f"{where}: cannot be read ({one_line(error)})") from error
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
            manifest = cls._from_json(folder, content)
            problem = manifest._miscounted()
        except DataError as error:
            raise DataError(f"{where}: {error}; {PREPARE_AGAIN}") from None
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: misses or misspells {error}; {PREPARE_AGAIN}") from None
        if problem is not None:
            raise DataError(f"{where}: {problem}; {PREPARE_AGAIN}")
        return manifest

    def _miscounted(self) -> str | None:
        """Which numbers of tokens disagree; None where all agree.

        They decide the order of training, and are in no checksum.
        """
        if self.row_tokens < 1:
            return f"row_tokens = {self.row_tokens}: must be at least 1"
        for source in self.sources:
            for name in SPLITS:
                split = source.split(name)
                if split.tokens != (held := sum(shard.tokens for shard in split.shards)):
                    return (
                        f"{source.name}: has {held} {name} tokens in its shards, not {split.tokens}"
                    )
        for shard in self.shards():
            rows = -(-shard.tokens // self.row_tokens)
            if shard.rows != rows:
                return f"{shard.file}: {shard.tokens} tokens are {rows} rows, not {shard.rows}"
        return None

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

    def save(self, copy: str | None = None) -> None:
        """Write manifest.json, or a copy of it elsewhere, atomically.

        Until then, the folder's previous manifest stands.
        """
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
        filesystem, path = locate(copy or f"{self.folder}/manifest.json")
        text = json.dumps(content, indent=1, ensure_ascii=False)
        write_atomically(filesystem, path, text.encode())

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
    # Older manifests have no `cut`.
    named = {"skipped": tuple(content["skipped"]), "cut": tuple(content.get("cut", ()))}
    return Source(**{**content, **named, **splits})


# ── verification ─────────────────────────────────────────────────────────────────────────────────


VERIFY_WHOLE_BYTES = 1 << 30  # up to this size, shards are checksummed where others are only sized


def damaged_shards(folder: str, shards: list[Shard]) -> dict[str, str]:
    """The shards that are missing or altered, by file name, each with what is wrong.

    Sizes are always compared, by listing each source's folder once instead of asking for every
    file: one request for thousands. Where that is cheap, SHA-256 too; else the CRC-32 of each row
    finds an alteration when the row is read. Raises Unreadable where storage fails.
    """
    sizes = _sizes(folder, shards)
    whole = sum(shard.bytes for shard in shards) <= VERIFY_WHOLE_BYTES
    problems = {}
    for shard in shards:
        problem = _size_problem(shard, sizes.get(shard.file))
        if problem is None and whole:
            try:
                problem = checksum_problem(folder, shard)
            except OSError as error:
                where = f"shard {folder}/{shard.file}"
                raise Unreadable(f"{where}: cannot be read ({one_line(error)})") from error
        if problem is not None:
            problems[shard.file] = problem
    return problems


def _sizes(folder: str, shards: list[Shard]) -> dict[str, int]:
    filesystem, root = locate(folder)
    sizes: dict[str, int] = {}
    for name in sorted({os.path.dirname(shard.file) for shard in shards}):
        for info in listed(filesystem, f"{root}/{name}"):
            sizes[f"{name}/{info.base_name}"] = info.size
    return sizes


def _size_problem(shard: Shard, size: int | None) -> str | None:
    if size is None:
        return "is missing"
    return f"has {size} bytes instead of {shard.bytes}" if size != shard.bytes else None


def checksum_problem(folder: str, shard: Shard) -> str | None:
    """What is wrong with a shard's content; None where nothing is. Raises OSError."""
    filesystem, root = locate(folder)
    digest = hashlib.sha256()
    path = f"{root}/{shard.file}"
    with os_errors(), filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    found = digest.hexdigest()
    if found == shard.sha256:
        return None
    return f"has SHA-256 {found[:12]}… instead of {shard.sha256[:12]}…: it was altered"


def verify_shards(manifest: Manifest, shards: Iterable[Shard] | None = None) -> None:
    """Check these shards, or all (see `damaged_shards`). Raises DataError naming a bad one."""
    some = list(manifest.shards() if shards is None else shards)
    for file, problem in damaged_shards(manifest.folder, some).items():
        raise DataError(f"shard {manifest.folder}/{file} {problem}; {PREPARE_AGAIN}")
