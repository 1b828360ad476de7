"""Small prepared corpora for tests, written with the shard format's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import Corpus, SourceSpec, find_files, named_sources
from pipelines.manifest import Manifest, Source, Split
from pipelines.shards import ShardWriter
from pipelines.texts import LeftOut, Text, read_file


def write_corpus(
    folder: Path,
    *tokens_per_source: int,
    validation: int = 400,
    vocab_size: int = 97,
    row_tokens: int = 64,
    shard_tokens: int = 640,
) -> Manifest:
    """Prepared shards without text: source i holds tokens that tell their position."""
    sources = []
    for number, count in enumerate(tokens_per_source):
        splits = {}
        for split, length in (("train", count), ("validation", validation)):
            writer = ShardWriter(
                str(folder),
                f"s{number}/{split}-00000",
                dtype="uint16",
                row_tokens=row_tokens,
                max_shard_tokens=shard_tokens,
            )
            writer.add(position_tokens(number, length, vocab_size))
            splits[split] = Split.of(writer.close())
        sources.append(Source(f"s{number}", "made", 1, count, 0, (), **splits))
    manifest = Manifest(
        str(folder), "uint16", row_tokens, vocab_size, 0, "no tokenizer", tuple(sources)
    )
    manifest.save()
    return manifest


def position_tokens(source: int, length: int, vocab_size: int = 97) -> np.ndarray:
    """A sequence in which every window of a few tokens stands at one place only, nearly."""
    position = np.arange(length, dtype=np.int64)
    return ((position * position * 31 + position // 7 + source * 13) % vocab_size).astype(np.uint16)


def found(path: str, **options: str) -> Corpus:
    """What is found at a source's path."""
    return find_files(named_sources([SourceSpec(path, **options)])[0])


def paths(path: str) -> list[str]:
    """The files of a source, by their paths in it."""
    return [file.path for file in found(path).files]


def read(path: Path, **options: str) -> list[Text | LeftOut]:
    """All texts of a source's first file."""
    source = found(str(path), **options)
    return list(read_file(source.root, source.files[0], source.text_field))


def contents(items: list[Text | LeftOut]) -> list[str]:
    """What the texts say, those left out not."""
    return [item.content for item in items if isinstance(item, Text)]


def write_parquet(
    path: Path, texts: list[object], rows_per_group: int, **columns: list[Any]
) -> None:
    """A file of one text a row."""
    table = pa.table({"text": pa.array(texts, pa.string()), **columns})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="none")
