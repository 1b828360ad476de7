"""Sources of text: which files they are, and how the work on them is cut up.

    SourceSpec ── named_sources, find_files ──> Corpus ── plan_units ──> Unit, Unit, …

A source is a file, a folder, a glob (`*`, `?`, `[…]`, `**`) on any pyarrow or fsspec filesystem,
or `python-stdlib`: the source text of the standard library of the Python that runs this.

Everything here is a function of the source's files alone: no clock, machine or parallelism
decides which files there are, in what order, how they are grouped, or what is held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.errors import DataError, Unreadable, one_line
from pipelines.globs import glob_folders, glob_regex, split_glob
from pipelines.storage import absolute, below, locate, os_errors

PYTHON_STDLIB = "python-stdlib"
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**20, 2**25

COMPRESSED = {".gz", ".zst", ".zstd", ".bz2", ".lz4"}
JSON_LINES = {".jsonl", ".ndjson", ".json"}  # corpora call such files .json, too (C4, Dolma)
PARQUET = {".parquet", ".pq"}
# What a folder's name alone takes in; a glob or a file's own name takes in anything.
_PLAIN_TEXT = """
    .txt .text .md .markdown .rst .tex .org .adoc .html .htm .css .xml .sql .toml .yaml .yml .ini
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .rs .go .java .kt .scala .swift .cs .fs
    .js .jsx .mjs .ts .tsx .vue .php .rb .pl .pm .lua .r .jl .m .mm .hs .ml .mli .clj .erl .ex
    .exs .el .lisp .scm .sh .bash .zsh .fish .ps1 .bat .asm .s .f .f90 .f95 .v .sv .vhd .zig .nim
    .d .dart .groovy .gradle .cmake .mk .proto .thrift .tcl .vim"""
PLAIN_TEXT = frozenset(_PLAIN_TEXT.split())
# Files that lie side by side in a run directory, and in a folder of shards.
_OUR_MARKS = (
    {"config.yaml", "metrics.jsonl"},
    {"config.yaml", "driver.lock"},
    {"manifest.json", "preparation.json"},
)
_MARKING = set().union(*_OUR_MARKS)
# What filesystems call that of a file which is another once its content is.
_TELLS_A_CHANGE = re.compile(
    "etag|md5|sha|hash|digest|crc|checksum|blob_id|generation|version"
    "|modif|mtime|updated|created|write_time"
)


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user names it. `weight` is for the mixture: it changes no shard."""

    path: str
    name: str | None = None
    weight: float | None = None
    text_field: str = "text"


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


@dataclass(frozen=True)
class Corpus:
    """The files of one source, in the order of their paths."""

    name: str
    root: str
    text_field: str
    files: tuple[TextFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Unit:
    """What one task tokenizes: some consecutive files of one source.

    `span` is the length of the sections that are held out for validation (holdout.py).
    """

    source: str
    root: str
    text_field: str
    files: tuple[TextFile, ...]
    span: int

    @property
    def name(self) -> str:
        """Tells it from the other units of a preparation."""
        first = self.files[0]
        return f"{self.source}/{first.path}/{first.row_groups or ''}"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def facts(work: Corpus | Unit) -> dict[str, Any]:
    """All that tells one corpus or unit from another; shards are known by a hash of it.

    A file without a version has no such entry: in older shards' hashes there was none.
    """

    def known(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if (name, value) != ("version", None)}

    return asdict(work, dict_factory=known)


@dataclass(frozen=True)
class _Listing:
    """A source's root, the files that were listed there, and which of their paths it takes in.

    `lost` are links to nothing, by their paths: of what they meant, nobody knows what it was.
    """

    root: str
    files: list[TextFile]
    takes: Callable[[str], bool]
    lost: tuple[str, ...] = ()


# ── which files ──────────────────────────────────────────────────────────────────────────────────


def named_sources(specs: Sequence[SourceSpec]) -> tuple[SourceSpec, ...]:
    """The same sources, each with a name: its own, or one made from its path.

    Raises DataError for no source at all, a name that cannot name a folder, or one used twice.
    """
    if not specs:
        raise DataError("no source of text is given; name a file, a folder or a glob")
    named: list[SourceSpec] = []
    for spec in specs:
        name = spec.name or _name_from(spec.path)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name in ("units", "tokenizer"):
            raise DataError(
                f"source name {name!r}: choose letters, digits, '.', '_' or '-' "
                "(but not 'units' or 'tokenizer')"
            )
        taken = {other.name for other in named}
        if name in taken and spec.name:
            raise DataError(f"source name {name!r} is given twice; give each source its own")
        number = 2
        while name in taken:
            name, number = f"{_name_from(spec.path)}-{number}", number + 1
        named.append(replace(spec, name=name))
    return tuple(named)


def _name_from(path: str) -> str:
    base = split_glob(path)[0]
    if "://" in base:
        base = base.partition("?")[0]
    base = base.rstrip("/")
    last = re.split(r"[/:]", base)[-1] or "source"
    stem = last.split(".")[0] or last
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_") or "source"


def source_root(spec: SourceSpec) -> str:
    """Where a source is, spelt the same from every working directory."""
    if spec.path == PYTHON_STDLIB:
        return sysconfig.get_paths()["stdlib"]
    # An address stays as it is given: shards are known by it.
    return spec.path if "://" in spec.path else absolute(spec.path)


def find_files(
    spec: SourceSpec, skip: Sequence[str] = (), log: Callable[[str], None] = lambda line: None
) -> Corpus:
    """List a source's files. Raises DataError where there are none.

    What runs and preparations wrote below it is no text: folders that look like theirs are left
    out, and those of `skip`. The log is told, of links that lead nowhere too.
    """
    assert spec.name, "named_sources gives every source its name"
    is_stdlib = spec.path == PYTHON_STDLIB
    listing = _python_stdlib() if is_stdlib else _match(source_root(spec))
    root = listing.root
    files = [file for file in listing.files if listing.takes(file.path)]
    ours = tuple(f"{folder}/" for folder in sorted(_ours(root, listing.files, skip)))
    num_listed = len(files)
    files = [file for file in files if not file.path.startswith(ours)]
    if left_out := num_listed - len(files):
        log(
            f"{spec.name}: {left_out:,} files left out, in folders of runs or shards: "
            f"{_shown(ours)}"
        )
    if lost := [path for path in listing.lost if not path.startswith(ours)]:
        log(f"{spec.name}: {len(lost):,} links left out, which lead nowhere: {_shown(lost)}")
    if not files:
        raise DataError(
            f"source {spec.path}: matches no files of text; name a file, or a glob such as "
            f"{root}/**/*.txt (a folder's name takes in text, source code, .jsonl and .parquet)"
        )
    for file in files:
        if file.size is None:
            raise DataError(
                f"source {below(root, file.path)}: its server does not say how long it is, so that "
                "neither its end nor a change could be seen; fetch it, and name the copy"
            )
    if not any(file.size for file in files):
        raise DataError(f"source {spec.path}: all its {len(files)} files are empty; name others")
    return Corpus(spec.name, root, spec.text_field, tuple(sorted(files, key=lambda f: f.path)))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _python_stdlib() -> _Listing:
    root = sysconfig.get_paths()["stdlib"]
    not_ours = {"site-packages", "dist-packages", "__pycache__"}
    names = [name for name in sorted(os.listdir(root)) if name not in not_ours]
    files = [file for name in names for file in _list(f"{root}/{name}", root)[0]]
    return _Listing(root, files, lambda path: path.endswith(".py"))


def _match(path: str) -> _Listing:
    """What a path means: a file, a folder, or a glob."""
    filesystem, inner = locate(path)
    info, version = _file_info(filesystem, inner, path)
    if info.type == pafs.FileType.File:
        base, mark, query = path.partition("?") if "://" in path else (path, "", "")
        root = (base.rsplit("/", 1)[0] or "/") + mark + query
        if "://" in base and "://" not in root:
            raise DataError(
                f"source {path}: is no file in a folder; end the address with a '/', or name a "
                "file below it"
            )
        # Of web pages, the address is the path inside the filesystem, too.
        name = inner.partition("?")[0].rsplit("/", 1)[1] if "://" in inner else info.base_name
        file = TextFile(name, info.size, info.mtime_ns, version=version)
        return _Listing(root, [file], lambda path: True)
    if info.type == pafs.FileType.Directory:
        root = path.rstrip("/") or "/"
        return _listing(
            root, path, _is_text, lambda folder: not _is_hidden(os.path.basename(folder))
        )
    root, pattern = split_glob(path)
    if not pattern:
        raise DataError(f"source {path}: not found; correct the path")
    try:
        matches, enters = glob_regex(pattern).fullmatch, glob_folders(pattern)
    except re.error as error:
        raise DataError(f"source {path}: is no pattern ({error}); correct the brackets") from None
    is_deep = "/" in pattern or "**" in pattern
    return _listing(root, root, lambda path: matches(path) is not None, enters, is_deep)


def _listing(
    root: str,
    path: str,
    takes: Callable[[str], bool],
    enters: Callable[[str], bool],
    is_deep: bool = True,
) -> _Listing:
    files, nowhere = _list(path, path, enters, is_deep)
    lost = [link for link in nowhere if takes(link) or enters(link)]
    return _Listing(root, files, takes, tuple(sorted(lost)))


def _ours(root: str, files: list[TextFile], skip: Sequence[str]) -> set[str]:
    """The folders below a root that are to be skipped, or that hold the files that mark our own."""
    names: dict[str, set[str]] = defaultdict(set)
    for file in files:
        folder, _, name = file.path.rpartition("/")
        if name in _MARKING:
            names[folder].add(name)
    marked = {folder for folder in names if any(mark <= names[folder] for mark in _OUR_MARKS)}
    above = f"{root.rstrip('/')}/"
    skipped = {path.removeprefix(above) for path in map(absolute, skip) if path.startswith(above)}
    return marked - {""} | skipped


def _file_info(
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


def _list(
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


def _is_text(path: str) -> bool:
    """Whether a folder's name takes this file in: known kind of text, and nothing hidden."""
    known = (PLAIN_TEXT | JSON_LINES | PARQUET) - {".json"}  # beside code, it is seldom text
    return not any(map(_is_hidden, path.split("/"))) and file_kind(path) in known


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def file_kind(path: str) -> str:
    """The extension that says how a file is read, without that of its compression."""
    stem, extension = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if extension in COMPRESSED else extension


# ── the work, cut into units ─────────────────────────────────────────────────────────────────────


def plan_units(corpus: Corpus, span: int) -> list[Unit]:
    """Cut a source into units of about the same size; a big file is a unit of its own.

    A small file closes its unit with a chance of its size over the unit's, drawn from a hash of its
    path. So where units end is a matter of each file alone, and a file that is added, changed or
    removed disturbs its own unit and not all that follow.
    """
    target = _unit_bytes(corpus.size)
    units: list[Unit] = []
    pending: list[TextFile] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending_bytes
        pending_bytes = 0
        if pending:
            units.append(Unit(corpus.name, corpus.root, corpus.text_field, tuple(pending), span))
            pending.clear()

    big = {file.path: file for file in corpus.files if file.size >= target}
    parts = _split_parquet(
        corpus.root, [f for f in big.values() if file_kind(f.path) in PARQUET], target
    )
    for file in corpus.files:
        if file.path in big:
            close()
            for part in parts.get(file.path, [file]):
                pending.append(part)
                close()
            continue
        pending.append(file)
        pending_bytes += file.size
        if draw(file.path) < file.size / target or pending_bytes >= 2 * target:
            close()
    close()
    return units


def _unit_bytes(total: int) -> int:
    """An eighth of the source, as a power of two (so that it seldom changes), within limits."""
    eighth = 2 ** max(0, (total // 8).bit_length() - 1)
    return min(max(eighth, MIN_UNIT_BYTES), MAX_UNIT_BYTES)


def draw(*names: str | int) -> float:
    """A number in [0, 1) that depends on the names alone."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode("utf-8", "surrogateescape"))
    return int.from_bytes(digest.digest()[:8], "big") / 2**64


def _split_parquet(root: str, files: list[TextFile], target: int) -> dict[str, list[TextFile]]:
    """Big Parquet files cut by row groups, by path; one that cannot be opened stays whole."""
    filesystem, inner = locate(root)

    def split(file: TextFile) -> list[TextFile]:
        try:
            with os_errors(), filesystem.open_input_file(below(inner, file.path)) as stream:
                num_groups = pq.ParquetFile(stream).metadata.num_row_groups
        except (OSError, pa.ArrowException):
            return [file]  # reading it will say what is wrong
        num_parts = max(1, min(num_groups, round(file.size / target)))
        bounds = [num_groups * part // num_parts for part in range(num_parts + 1)]
        return [
            replace(file, size=file.size // num_parts, row_groups=(bounds[part], bounds[part + 1]))
            for part in range(num_parts)
        ]

    with ThreadPoolExecutor(16) as pool:
        return dict(zip([file.path for file in files], pool.map(split, files), strict=True))
