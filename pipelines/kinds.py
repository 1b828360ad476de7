"""Kinds of files, by their names alone: how each is read, and which ones a source takes in.

    paths of a folder's files ── in_folder ──> for each, why it is left out, or None
    paths that a glob matched ── in_glob ────> the same

A folder's name takes in what is text or rows of text by its ending. It leaves out what only
describes the data beside it, and what Spark and Hadoop keep beside their output. A glob takes in
all that it matches, but hidden files, such outputs, and what is no text by its ending.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping

from pipelines.compression import COMPRESSED
from pipelines.storage import below

JSON_LINES = {".jsonl", ".ndjson", ".json"}  # corpora call such files .json, too (C4, Dolma)
PARQUET = {".parquet", ".pq"}
TABLES = {".csv": ",", ".tsv": "\t"}  # with the delimiter of their columns
_PROSE = ".txt .text .md .markdown .rst .tex .org .adoc .html .htm"
_CODE = """
    .css .xml .sql .toml .yaml .yml .ini
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .rs .go .java .kt .scala .swift .cs .fs
    .js .jsx .mjs .ts .tsx .vue .php .rb .pl .pm .lua .r .jl .m .mm .hs .ml .mli .clj .erl .ex
    .exs .el .lisp .scm .sh .bash .zsh .fish .ps1 .bat .asm .s .f .f90 .f95 .v .sv .vhd .zig .nim
    .d .dart .groovy .gradle .cmake .mk .proto .thrift .tcl .vim"""
CODE = frozenset(_CODE.split())
PLAIN_TEXT = frozenset(_PROSE.split()) | CODE

# What is never text, and what to do about it.
_ARCHIVE = "unpack it, or compress each file with gzip, zstd, bzip2, lz4 or xz"
_DOCUMENT = "convert it to text first"
_DATA = "convert it to JSON Lines or Parquet first"
_MEDIA = "name files of text"
_NO_TEXT = {
    _ARCHIVE: ".zip .tar .tgz .tbz2 .txz .7z .rar .br .sz .snappy .lzma .lzo .z .jar .whl",
    _DOCUMENT: ".pdf .doc .docx .odt .rtf .epub .mobi .djvu .ps .ppt .pptx .odp",
    _DATA: ".arrow .feather .avro .orc .xls .xlsx .ods .sqlite .db .h5 .hdf5 .npy .npz .pkl "
    ".pickle .pt .pth .safetensors .bin .idx .mds .tfrecord",
    _MEDIA: ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico .mp3 .wav .flac .ogg .mp4 .mkv .avi "
    ".mov .webm .woff .woff2 .ttf .otf .exe .dll .so .o .a .class .pyc .wasm",
}
NO_TEXT = {ending: remedy for remedy, endings in _NO_TEXT.items() for ending in endings.split()}
_ROWS = {*JSON_LINES, *PARQUET, *TABLES}
_DATA_BESIDE_CARDS = _ROWS | {e for e, remedy in NO_TEXT.items() if remedy in (_ARCHIVE, _DATA)}
_CARD_NAMES = """
    readme license licence copying notice citation changelog contributing authors card datasheet
    dataset_card datacard code_of_conduct dataset_info dataset_infos"""
_CARDS = frozenset(_CARD_NAMES.split())

# Why a file is left out.
HIDDEN = "hidden"
ENDING = "which a folder's name does not take in"
UNFINISHED = "which Spark or Hadoop keeps beside its output"
CARD = "which describe the data beside them"
IS_NO_TEXT = "which are no text"


def file_kind(path: str) -> str:
    """The extension that says how a file is read, without that of its compression."""
    stem, extension = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if extension in COMPRESSED else extension


def ending(path: str) -> str:
    """The extension with that of its compression, as a user would name it."""
    extension = os.path.splitext(path.lower())[1]
    return file_kind(path) + extension if extension in COMPRESSED else extension


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is never text."""
    return name.startswith(".") or name == "__pycache__"


def in_folder(paths: Iterable[str]) -> dict[str, str | None]:
    """For each of a folder's files, why its name does not take it in; None if it does."""
    reasons = {path: _by_name(path) for path in paths}
    seen = [path for path, reason in reasons.items() if reason not in (HIDDEN, UNFINISHED)]
    folders_of_code = {os.path.dirname(path) for path in seen if file_kind(path) in CODE}
    for path, reason in reasons.items():
        is_json = reason == ENDING and file_kind(path) == ".json" != ending(path)
        if is_json and os.path.dirname(path) not in folders_of_code:
            reasons[path] = None
    for path in _cards(seen):
        reasons[path] = CARD
    return reasons


def in_glob(paths: Iterable[str], pattern: str) -> dict[str, str | None]:
    """For each path that a glob matched, why it is left out; None if it is not.

    A pattern that itself has a name with a dot or an underscore in front means such files.
    """
    meant = {part[0] for part in pattern.split("/") if part.startswith((".", "_"))}

    def reason(path: str) -> str | None:
        if "." not in meant and any(map(is_hidden, path.split("/"))):
            return HIDDEN
        if "_" not in meant and _is_unfinished(path):
            return UNFINISHED
        return IS_NO_TEXT if file_kind(path) in NO_TEXT else None

    return {path: reason(path) for path in paths}


def _by_name(path: str) -> str | None:
    """Why a folder's name does not take in a file, whatever lies beside it."""
    if any(map(is_hidden, path.split("/"))):
        return HIDDEN
    if _is_unfinished(path):
        return UNFINISHED
    # Beside code, .json is seldom text.
    return None if file_kind(path) in (PLAIN_TEXT | JSON_LINES | PARQUET) - {".json"} else ENDING


def _is_unfinished(path: str) -> bool:
    """Whether a path is that of a task that has not ended, of a marker or of metadata.

    Readers of such outputs pass over names with an underscore in front; in source code such names
    are common.
    """
    *folders, name = path.split("/")
    if "_temporary" in folders:
        return True
    is_text = file_kind(name) in PLAIN_TEXT
    return not is_text and any(part.startswith("_") for part in (*folders, name))


def _cards(paths: Iterable[str]) -> list[str]:
    """The files that describe data: by their names, if their folder holds data and no other text.

    Args:
        paths: of the files that lie in the source's folder.
    """
    cards, data, texts = [], Counter[str](), Counter[str]()
    for path in paths:
        kind = file_kind(path)
        if kind in PLAIN_TEXT and os.path.basename(path).lower().split(".")[0] in _CARDS:
            cards.append(path)
        elif kind in PLAIN_TEXT or kind in _DATA_BESIDE_CARDS:
            (texts if kind in PLAIN_TEXT else data).update(_above(path))
    folders = {path: os.path.dirname(path) for path in cards}
    return [path for path, folder in folders.items() if data[folder] and not texts[folder]]


def _above(path: str) -> list[str]:
    """The folders that a path is in, up to the source's own, which is empty."""
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(len(parts))]


def told_left_out(root: str, reason: str, sizes: Mapping[str, int | None]) -> str:
    """What is told of the files that are left out for one reason, by their paths and sizes."""
    size = sum(size or 0 for size in sizes.values())
    kinds = Counter(ending(path) or "no ending" for path in sizes)
    counts = ", ".join(f"{kind} {number:,}" for kind, number in kinds.most_common(4))
    more = ", …" if len(kinds) > 4 else ""
    example = min(sizes)
    line = (
        f"{len(sizes):,} files left out ({size / 1e6:,.1f} MB), {reason} ({counts}{more}), such "
        f"as {example}"
    )
    if reason == IS_NO_TEXT or (reason == ENDING and file_kind(example) in NO_TEXT):
        return f"{line}; {NO_TEXT[file_kind(example)]}"
    if reason == ENDING:
        pattern = f"**/*{ending(example)}" if ending(example) else example
        return f"{line}; to train on them, name them too: {below(root, pattern)}"
    return line
