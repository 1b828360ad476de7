"""Parquet files are data: Ray's own type of column holds pickles, and no value of one is made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError
from pipelines.manifest import Manifest, Split
from pipelines.shards import TokenReader
from tests.corpora import contents, read, write_corpus


class Evil:
    """An object whose unpickling makes a folder."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.traces),)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    return tmp_path / "evil-was-here"


@pytest.fixture
def evil(traces: Path) -> pa.Array:
    """A column of three such objects, of the type that `import ray.data` makes known to Arrow."""
    import ray.data  # noqa: F401
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    column = ArrowPythonObjectArray.from_objects([Evil(traces)] * 3)
    column[0].as_py()
    assert traces.is_dir(), "it does no harm any more; the test has no meaning"
    traces.rmdir()
    return column


def in_lists(column: pa.Array) -> pa.Array:
    offsets = pa.array(range(len(column) + 1), pa.int32())
    return pa.ListArray.from_arrays(offsets, column)


def in_structs(column: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([column], ["x"])


SHAPES: list[Callable[[pa.Array], pa.Array]] = [lambda column: column, in_lists, in_structs]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_source_runs_nothing(
    tmp_path: Path, evil: pa.Array, traces: Path, shape: Callable[[pa.Array], pa.Array]
) -> None:
    pq.write_table(pa.table({"text": shape(evil)}), tmp_path / "a.parquet")
    assert [hasattr(item, "reason") for item in read(tmp_path / "a.parquet")] == [True] * 3
    assert not traces.exists()


def test_text_of_a_type_of_somebodys_own_is_text(tmp_path: Path) -> None:
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["one", "two"]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert contents(read(tmp_path / "a.parquet")) == ["one", "two"]


@pytest.fixture
def prepared(tmp_path: Path) -> Manifest:
    return write_corpus(tmp_path / "shards", 3 * 64)


def with_columns(manifest: Manifest, **columns: pa.Array) -> Manifest:
    """The manifest of the same shards with other columns, all sizes and checksums right."""
    (source,) = manifest.sources
    (shard,) = source.train.shards
    path = Path(manifest.folder, shard.file)
    table = pq.read_table(path)
    for name, column in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, path, row_group_size=1)
    content = path.read_bytes()
    changed = replace(shard, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    train = Split(source.train.tokens, (changed,))
    return replace(manifest, sources=(replace(source, train=train),))


def test_the_shards_are_read_as_they_were(prepared: Manifest) -> None:
    whole = TokenReader(prepared, "s0").read(0, 192)
    assert np.array_equal(TokenReader(with_columns(prepared), "s0").read(0, 192), whole)


@pytest.mark.parametrize("name", ["tokens", "crc32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shard_runs_nothing(
    prepared: Manifest,
    evil: pa.Array,
    traces: Path,
    name: str,
    shape: Callable[[pa.Array], pa.Array],
) -> None:
    manifest = with_columns(prepared, **{name: shape(evil)})
    with pytest.raises(DataError) as refused:
        TokenReader(manifest, "s0").read(0, 192)
    assert "\n" not in str(refused.value) and "s0/train-00000" in str(refused.value)
    assert not traces.exists()
