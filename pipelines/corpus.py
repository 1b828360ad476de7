"""Sources of text: which files they are, and how the work on them is cut up.

    SourceSpec ── named_sources, find_files ──> Corpus ── plan_units ──> Unit, Unit, …

A source is a file, a folder, a glob (`*`, `?`, `[…]`, `**`) on any pyarrow or fsspec filesystem,
or `python-stdlib`: the source text of the standard library of the Python that runs this.

Everything here is a function of the source's files alone: no clock, machine or parallelism
decides which files there are, in what order, how they are grouped, or what is held out.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines.errors import BadInput, DataError
from pipelines.globs import glob_folders, glob_regex, split_glob
from pipelines.kinds import (
    HIDDEN,
    NO_TEXT,
    PARQUET,
    file_kind,
    in_folder,
    in_glob,
    is_hidden,
    told_left_out,
)
from pipelines.listing import TextFile, file_info, list_files
from pipelines.storage import absolute, below, locate, os_errors

PYTHON_STDLIB = "python-stdlib"
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**20, 2**25

# Files that lie side by side in a run directory, and in a folder of shards.
_OUR_MARKS = (
    {"config.yaml", "metrics.jsonl"},
    {"config.yaml", "driver.lock"},
    {"manifest.json", "preparation.json"},
)
_MARKING = set().union(*_OUR_MARKS)


@dataclass(frozen=True)
class SourceSpec:
    """A source as the user names it. `weight` is for the mixture: it changes no shard."""

    path: str
    name: str | None = None
    weight: float | None = None
    text_field: str = "text"


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


# For each path that a source names, why it is left out all the same, or None.
Choose = Callable[[Iterable[str]], dict[str, str | None]]


@dataclass(frozen=True)
class _Listing:
    """A source's root, the files that were listed there, and which of their paths it takes in.

    `lost` are links to nothing, by their paths: of what they meant, nobody knows what it was.
    """

    root: str
    files: list[TextFile]
    chooses: Choose
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


def check_source(path: str) -> None:
    """Refuse a source on this machine's disks that is not there, without listing its files.

    Storage elsewhere is asked only when it is read. Raises BadInput.
    """
    if "://" in path or path == PYTHON_STDLIB or os.path.exists(os.path.expanduser(path)):
        return
    folder, pattern = split_glob(os.path.expanduser(path))
    if not pattern:
        raise _not_found(path)
    if not os.path.isdir(folder):
        raise BadInput(f"data.sources = {path}: there is no folder {folder}; correct the path")


def _not_found(path: str) -> BadInput:
    return BadInput(f"data.sources = {path}: not found; correct the path")


def find_files(
    spec: SourceSpec, skip: Sequence[str] = (), log: Callable[[str], None] = lambda line: None
) -> Corpus:
    """List a source's files. Raises BadInput if there are none.

    What runs and preparations wrote below it is no text: folders that look like theirs are left
    out, and those of `skip`. The log is told of that, of what else the source holds and does not
    take in, and of links that lead nowhere.
    """
    assert spec.name, "named_sources gives every source its name"
    is_stdlib = spec.path == PYTHON_STDLIB
    listing = _python_stdlib() if is_stdlib else _match(source_root(spec))
    root = listing.root
    ours = tuple(f"{folder}/" for folder in sorted(_ours(root, listing.files, skip)))
    theirs = {file.path: file for file in listing.files if not file.path.startswith(ours)}
    reasons = listing.chooses(theirs)
    files = [file for path, file in theirs.items() if reasons.get(path, HIDDEN) is None]
    own = [file.path for file in listing.files if file.path.startswith(ours)]
    if num_ours := sum(reason is None for reason in listing.chooses(own).values()):
        where = f"in folders of runs or shards: {_shown(ours)}"
        log(f"{spec.name}: {num_ours:,} files left out, {where}")
    left_out = _left_out(root, theirs, reasons)
    for line in left_out:
        log(f"{spec.name}: {line}")
    if lost := [path for path in listing.lost if not path.startswith(ours)]:
        log(f"{spec.name}: {len(lost):,} links left out, which lead nowhere: {_shown(lost)}")
    if not files:
        takes = "(a folder's name takes in text, source code, .jsonl and .parquet)"
        name_others = f"name a file, or a glob such as {below(root, '**/*.txt')} {takes}"
        told = left_out[0] if left_out else name_others
        raise BadInput(f"data.sources = {spec.path}: matches no files of text; {told}")
    for file in files:
        if file.size is None:
            raise DataError(
                f"source {below(root, file.path)}: its server does not say how long it is, so that "
                "neither its end nor a change could be seen; fetch it, and name the copy"
            )
    if not any(file.size for file in files):
        raise BadInput(
            f"data.sources = {spec.path}: all its {len(files)} files are empty; name others"
        )
    return Corpus(spec.name, root, spec.text_field, tuple(sorted(files, key=lambda f: f.path)))


def _left_out(root: str, files: dict[str, TextFile], reasons: dict[str, str | None]) -> list[str]:
    """A line for each reason for which files are left out; of hidden ones nothing is told."""
    groups: dict[str, dict[str, int | None]] = defaultdict(dict)
    for path, reason in reasons.items():
        if reason not in (None, HIDDEN):
            groups[str(reason)][path] = files[path].size
    most_first = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [told_left_out(root, reason, sizes) for reason, sizes in most_first]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _python_stdlib() -> _Listing:
    root = sysconfig.get_paths()["stdlib"]
    not_ours = {"site-packages", "dist-packages", "__pycache__"}
    names = [name for name in sorted(os.listdir(root)) if name not in not_ours]
    files = [file for name in names for file in list_files(f"{root}/{name}", root)[0]]
    return _Listing(
        root, files, lambda paths: {path: None for path in paths if path.endswith(".py")}
    )


def _match(path: str) -> _Listing:
    """What a path means: a file, a folder, or a glob."""
    filesystem, inner = locate(path)
    info, version = file_info(filesystem, inner, path)
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
        if remedy := NO_TEXT.get(file_kind(name)):
            raise BadInput(f"data.sources = {path}: is no file of text; {remedy}")
        file = TextFile(name, info.size, info.mtime_ns, version=version)
        return _Listing(root, [file], lambda paths: dict.fromkeys(paths))
    if info.type == pafs.FileType.Directory:
        root = path.rstrip("/") or "/"
        return _listing(
            root, path, in_folder, lambda folder: not is_hidden(os.path.basename(folder))
        )
    root, pattern = split_glob(path)
    if not pattern:
        raise _not_found(path)
    try:
        matches, enters = glob_regex(pattern).fullmatch, glob_folders(pattern)
    except re.error as error:
        raise BadInput(
            f"data.sources = {path}: is no pattern ({error}); correct the brackets"
        ) from None
    is_deep = "/" in pattern or "**" in pattern

    def chooses(paths: Iterable[str]) -> dict[str, str | None]:
        return in_glob(filter(matches, paths), pattern)

    return _listing(root, root, chooses, enters, is_deep)


def _listing(
    root: str,
    path: str,
    chooses: Choose,
    enters: Callable[[str], bool],
    is_deep: bool = True,
) -> _Listing:
    files, nowhere = list_files(path, path, enters, is_deep)
    lost = [link for link in nowhere if link in chooses([link]) or enters(link)]
    return _Listing(root, files, chooses, tuple(sorted(lost)))


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
