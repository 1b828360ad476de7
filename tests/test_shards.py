"""The shard format: what is written is what is read, and whatever is not is told by name."""

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import shards
from pipelines.errors import DataError, Unreadable
from pipelines.manifest import Manifest, Shard, Source, Split, verify_shards
from pipelines.shards import Held, ShardWriter, TokenReader
from pipelines.storage import locate, write_atomically

ROW, SHARD, VOCAB = 16, 64, 300


def tokens_of(num: int, dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, num).astype(dtype)


def write(folder: str, name: str, tokens: np.ndarray, steps: int = 7) -> tuple[Shard, ...]:
    writer = ShardWriter(
        folder, name, dtype=tokens.dtype.name, row_tokens=ROW, max_shard_tokens=SHARD
    )
    for start in range(0, len(tokens), steps):
        writer.add(tokens[start : start + steps])
    return writer.close()


def manifest_of(folder: str, train: np.ndarray, validation: np.ndarray) -> Manifest:
    splits = [
        Split.of(write(folder, f"text/{name}-00000", tokens))
        for name, tokens in (("train", train), ("validation", validation))
    ]
    source = Source("text", "text.txt", 3, 4000, 1, ({"path": "a", "reason": "b"},), *splits)
    return Manifest(folder, train.dtype.name, ROW, VOCAB, 0, "abc", (source,), {"x": 1})


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Manifest, np.ndarray]:
    train = tokens_of(333)
    return manifest_of(str(tmp_path), train, tokens_of(20, seed=1)), train


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ── writing and reading ──────────────────────────────────────────────────────────────────────────


def test_every_span_reads_back(prepared: tuple[Manifest, np.ndarray]) -> None:
    manifest, train = prepared
    reader = TokenReader(manifest, "text")
    assert reader.num_tokens == len(train) == manifest.source("text").train.tokens
    for start in range(0, len(train) + 1, 5):
        for stop in (start, start + 1, start + ROW, start + SHARD + 3, len(train)):
            if start <= stop <= len(train):
                np.testing.assert_array_equal(reader.read(start, stop), train[start:stop])


def test_the_splits_are_apart(prepared: tuple[Manifest, np.ndarray]) -> None:
    reader = TokenReader(prepared[0], "text", "validation")
    np.testing.assert_array_equal(reader.read(0, reader.num_tokens), tokens_of(20, seed=1))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_any_parquet_reader_sees_the_tokens(tmp_path: Path, dtype: str) -> None:
    train = tokens_of(150, dtype)
    shards = write(str(tmp_path), "text/train-00000", train)
    assert [shard.tokens for shard in shards] == [64, 64, 22]
    assert [shard.file for shard in shards][1] == "text/train-00000-00001.parquet"
    rows = []
    for shard in shards:
        parquet = pq.ParquetFile(tmp_path / shard.file)
        assert parquet.num_row_groups == shard.rows  # a row is read alone
        for row in parquet.read().to_pylist():
            rows.append(row["tokens"])
            little_endian = np.array(row["tokens"], dtype).astype(f"<u{train.itemsize}")
            assert row["crc32"] == zlib.crc32(little_endian.tobytes())
    assert [len(row) for row in rows] == [ROW] * 9 + [6]  # nothing dropped, nothing padded
    assert np.concatenate(rows).tolist() == train.tolist()


@pytest.mark.parametrize("steps", [1, 16, 50, 1000])
def test_shards_do_not_depend_on_the_pieces_they_came_in(tmp_path: Path, steps: int) -> None:
    train = tokens_of(333)
    assert write(str(tmp_path / "a"), "train", train, steps) == write(
        str(tmp_path / "b"), "train", train
    )


def test_an_empty_stream_has_no_shards(tmp_path: Path) -> None:
    manifest = manifest_of(str(tmp_path), tokens_of(5), tokens_of(0))
    assert manifest.source("text").validation == Split(0, ())
    assert TokenReader(manifest, "text", "validation").read(0, 0).shape == (0,)


def test_spans_outside_the_split_are_refused(prepared: tuple[Manifest, np.ndarray]) -> None:
    reader = TokenReader(prepared[0], "text")
    for start, stop in [(-1, 2), (3, 2), (0, 334)]:
        with pytest.raises(IndexError):
            reader.read(start, stop)


def test_the_cache_keeps_the_rows_used_last_within_its_size(
    prepared: tuple[Manifest, np.ndarray],
) -> None:
    reader = TokenReader(prepared[0], "text", held=Held(rows_bytes=3 * ROW * 2))
    decoded = []
    decode = reader._decode
    reader._decode = lambda index, row: decoded.append((index, row)) or decode(index, row)
    for row in (0, 1, 2, 0, 3, 0, 1):
        reader.read(row * ROW, (row + 1) * ROW)
    assert decoded == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 1)]
    assert sum(row.nbytes for row in reader.held.rows.values()) == 3 * ROW * 2


def test_few_files_stay_open(prepared: tuple[Manifest, np.ndarray]) -> None:
    manifest, train = prepared
    reader = TokenReader(manifest, "text", held=Held(rows_bytes=0, num_files=2))
    np.testing.assert_array_equal(reader.read(0, 333), train)
    np.testing.assert_array_equal(reader.read(0, 333), train)
    assert len(reader.held.files) == 2


def test_a_span_needs_only_its_own_shards(prepared: tuple[Manifest, np.ndarray]) -> None:
    manifest, train = prepared
    first = manifest.source("text").train.shards[0]
    Path(manifest.folder, first.file).unlink()
    reader = TokenReader(manifest, "text")
    np.testing.assert_array_equal(reader.read(SHARD, 333), train[SHARD:])
    with pytest.raises(DataError, match=f"{first.file} is missing"):
        reader.read(SHARD - 1, 333)


def test_an_address_serves_as_a_folder() -> None:
    train = tokens_of(100)
    manifest = manifest_of("memory://shards/here", train, tokens_of(3))
    manifest.save()
    loaded = Manifest.load("memory://shards/here")
    verify_shards(loaded)
    reader = TokenReader(loaded, "text")
    np.testing.assert_array_equal(reader.read(0, 100), train)


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


def test_whole_shards_pass(prepared: tuple[Manifest, np.ndarray]) -> None:
    verify_shards(prepared[0])


def test_a_shard_cut_short_is_named_with_both_sizes(
    prepared: tuple[Manifest, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = prepared
    shard = manifest.source("text").train.shards[2]
    path = Path(manifest.folder, shard.file)
    path.write_bytes(path.read_bytes()[:-10])
    expected = f"{shard.file} has {shard.bytes - 10} bytes instead of {shard.bytes}; run `tst-ray"
    for limit in (0, 1 << 30):  # up to it, shards are read whole
        monkeypatch.setattr("pipelines.manifest.VERIFY_WHOLE_BYTES", limit)
        with pytest.raises(DataError) as error:
            verify_shards(manifest)
        assert expected in one_line(error)
    with pytest.raises(DataError) as error:
        TokenReader(manifest, "text").read(0, 333)
    assert expected in one_line(error)


def test_a_missing_shard_is_named(prepared: tuple[Manifest, np.ndarray]) -> None:
    manifest, _ = prepared
    shard = manifest.source("text").validation.shards[0]
    Path(manifest.folder, shard.file).unlink()
    with pytest.raises(DataError, match=f"{shard.file} is missing; run"):
        verify_shards(manifest)


def test_every_altered_byte_is_found(prepared: tuple[Manifest, np.ndarray]) -> None:
    """No flipped byte goes unseen: a row read either holds the true tokens or is refused."""
    manifest, train = prepared
    shard = manifest.source("text").train.shards[0]
    path = Path(manifest.folder, shard.file)
    content = path.read_bytes()
    num_refused = 0
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(bytes(flipped))
        with pytest.raises(DataError, match="SHA-256"):
            verify_shards(manifest)
        try:
            tokens = TokenReader(manifest, "text").read(0, SHARD)
            np.testing.assert_array_equal(tokens, train[:SHARD])
        except DataError as error:
            assert shard.file in str(error)
            num_refused += 1
    assert num_refused > 20


def test_a_row_against_its_checksum_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    monkeypatch.setattr(
        shards, "_row_crc32", lambda row: rows.append(row) or (7 if len(rows) == 2 else 0)
    )
    zeros = np.zeros(3 * ROW, "uint16")
    manifest = manifest_of(str(tmp_path), zeros, zeros[:0])
    with pytest.raises(
        DataError, match=r"00000\.parquet, row 1 has CRC-32 .* of 00000007"
    ) as error:
        TokenReader(manifest, "text").read(ROW, 2 * ROW)
    assert "altered" in one_line(error)


def test_a_token_outside_the_vocabulary_is_refused(
    prepared: tuple[Manifest, np.ndarray],
) -> None:
    manifest, train = prepared
    smaller = replace(manifest, vocab_size=int(train.max()))
    with pytest.raises(DataError) as error:
        TokenReader(smaller, "text").read(0, 333)
    assert f"token id {train.max()}, outside the vocabulary of {train.max()}" in one_line(error)


def test_shards_of_another_dtype_or_row_length_are_refused(
    prepared: tuple[Manifest, np.ndarray],
) -> None:
    manifest, _ = prepared
    for other, told in (
        (replace(manifest, dtype="uint32"), "row 0 has 16 uint16 tokens instead of 16 uint32"),
        (
            replace(manifest, row_tokens=ROW - 1),
            "last of 16 tokens, instead of 64 .* of 15",
        ),
    ):
        with pytest.raises(DataError, match=told):
            TokenReader(other, "text").read(0, 1)


# ── the manifest ─────────────────────────────────────────────────────────────────────────────────


def test_a_manifest_loads_as_it_was_saved(prepared: tuple[Manifest, np.ndarray]) -> None:
    manifest, _ = prepared
    manifest.save()
    assert Manifest.load(manifest.folder) == manifest
    content = json.loads(Path(manifest.folder, "manifest.json").read_text())
    assert content["tokenizer"] == {"folder": "tokenizer", "fingerprint": "abc"}
    assert (content["format"], content["version"]) == ("token-shards", 1)


def test_the_fingerprint_is_of_the_shards_and_not_of_the_folder(
    tmp_path: Path, prepared: tuple[Manifest, np.ndarray]
) -> None:
    manifest, train = prepared
    copy = manifest_of(str(tmp_path / "elsewhere"), train, tokens_of(20, seed=1))
    assert copy.fingerprint == manifest.fingerprint
    train[100] ^= 1
    other = manifest_of(str(tmp_path / "other"), train, tokens_of(20, seed=1))
    assert other.fingerprint != manifest.fingerprint


def test_bad_manifests_are_told_in_one_line(prepared: tuple[Manifest, np.ndarray]) -> None:
    manifest, _ = prepared
    with pytest.raises(DataError, match=r"manifest\.json: not found; make the shards") as error:
        Manifest.load(manifest.folder)
    one_line(error)
    manifest.save()
    path = Path(manifest.folder, "manifest.json")
    whole = path.read_text()
    for content, told in [
        (whole[:100], "not valid JSON"),
        ("[]", "not a manifest of token-shards"),
        (whole.replace('"version": 1', '"version": 2'), "not a manifest of token-shards version 1"),
        (whole.replace('"eot_token"', '"eos"'), "misses or misspells 'eot_token'"),
        (whole.replace('"rows"', '"lines"'), "misses or misspells"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=told) as error:
            Manifest.load(manifest.folder)
        one_line(error)


@pytest.mark.parametrize(
    "name",
    [
        "../../../../etc/passwd",
        "..",
        "text/../../x.parquet",
        "/etc/passwd",
        "text//x.parquet",
        "./x.parquet",
        "",
        "text\\x.parquet",
        "C:x.parquet",
        "s3://bucket/x.parquet",
        "text/x\0.parquet",
        "text/%2e%2e/x.parquet",
        "text/x.parquet?version=1",
        "text/x.parquet\n",
        7,
        None,
    ],
)
def test_a_shard_outside_of_the_folder_is_refused_before_it_is_opened(
    prepared: tuple[Manifest, np.ndarray], monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    """Whoever can write a manifest would choose what is opened."""
    manifest, _ = prepared
    manifest.save()
    path = Path(manifest.folder, "manifest.json")
    content = json.loads(path.read_text())
    content["sources"][0]["train"]["shards"][0]["file"] = name
    path.write_text(json.dumps(content))
    looked_at: list[str] = []
    monkeypatch.setattr("pipelines.manifest.listed", lambda _, folder: looked_at.append(folder))
    with pytest.raises(DataError, match="is no name of a file in the prepared folder") as refused:
        verify_shards(Manifest.load(manifest.folder))
    assert str(refused.value).startswith(f"{manifest.folder}/manifest.json: shard ")
    assert "\n" not in str(refused.value)
    assert not looked_at


@pytest.mark.parametrize(
    ("split", "shard", "told"),
    [
        ({"tokens": 300}, {}, "text: has 333 train tokens in its shards, not 300"),
        ({"tokens": 349}, {"tokens": 80}, "80 tokens are 5 rows, not 4"),
        ({"tokens": 317}, {"tokens": 48}, "48 tokens are 3 rows, not 4"),
    ],
)
def test_numbers_of_tokens_that_disagree_are_refused(
    prepared: tuple[Manifest, np.ndarray], split: dict[str, int], shard: dict[str, int], told: str
) -> None:
    """They decide what is trained on when, but are in no fingerprint."""
    prepared[0].save()
    path = Path(prepared[0].folder, "manifest.json")
    content = json.loads(path.read_text())
    content["sources"][0]["train"].update(split)
    content["sources"][0]["train"]["shards"][0].update(shard)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{told}") as error:
        Manifest.load(prepared[0].folder)
    one_line(error)


@pytest.mark.parametrize(("rows", "tokens"), [(3, 48), (4, 63), (5, 65)])
def test_a_manifest_that_disagrees_with_its_shards_is_refused(
    prepared: tuple[Manifest, np.ndarray], rows: int, tokens: int
) -> None:
    """Also where another row is read than the one that would tell."""
    manifest, _ = prepared
    source = manifest.sources[0]
    first, *others = source.train.shards
    wrong = Split.of((replace(first, rows=rows, tokens=tokens), *others))
    edited = replace(manifest, sources=(replace(source, train=wrong),))
    edited.save()
    loaded = Manifest.load(manifest.folder)
    with pytest.raises(
        DataError, match=rf"{first.file} has 4 rows, the last of 16 tokens"
    ) as error:
        TokenReader(loaded, "text").read(0, 5)
    one_line(error)


def test_a_path_that_storage_refuses_is_not_called_bad_json(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arrow's S3 refuses an empty part of a path by an error that is a ValueError."""
    refusing = Mock()
    refusing.open_input_stream.side_effect = pa.ArrowInvalid("Empty path component")
    monkeypatch.setattr("pipelines.manifest.locate", lambda path: (refusing, path))
    with pytest.raises(Unreadable, match=r"cannot be read \(.*Empty path component\)") as error:
        Manifest.load("bucket//shards")
    one_line(error)


def test_an_unknown_source_is_told_with_those_there_are(
    prepared: tuple[Manifest, np.ndarray],
) -> None:
    with pytest.raises(DataError, match="has no source named web; it has text"):
        TokenReader(prepared[0], "web")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written .*; choose a folder") as error:
        write(str(tmp_path / "file"), "train", tokens_of(5))
    one_line(error)


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    write(str(tmp_path), "train", tokens_of(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "train-00000.parquet",
        "train-00001.parquet",
    ]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        whole = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, w=whole: (done.append(n), w(*a))[1])
    write_atomically(*locate(str(tmp_path / "deep" / "file")), b"content")
    assert (tmp_path / "deep" / "file").read_bytes() == b"content"
    assert done == ["fsync", "replace"]


def test_an_address_whose_storage_does_not_answer_may_be_tried_again(
    prepared: tuple[Manifest, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow asks for a bucket's region when it opens an address; no other library steps in."""

    class Unreachable:
        @staticmethod
        def from_uri(address: str) -> None:
            raise OSError("NETWORK_CONNECTION during HeadBucket operation")

    monkeypatch.setattr("pyarrow.fs.FileSystem", Unreachable)
    opened = Mock(side_effect=fsspec.core.url_to_fs)
    monkeypatch.setattr("fsspec.core.url_to_fs", opened)
    there = replace(prepared[0], folder="memory://bucket/shards")
    for ask in (
        lambda: locate(there.folder),
        lambda: Manifest.load(there.folder),
        lambda: TokenReader(there, "text").read(0, 5),
    ):
        with pytest.raises(Unreadable, match=r"cannot be reached \(NETWORK_CONNECTION"):
            ask()
    assert not opened.called


def test_a_library_that_cannot_open_its_address_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", Mock(side_effect=Unavailable("no\ncredentials")))
    with pytest.raises(Unreadable, match=r"^memory://x: cannot be reached \(no credentials\)$"):
        locate("memory://x")


class Unavailable(Exception):
    """What a client of an object store raises."""


@pytest.mark.parametrize("how", ["altered", "unavailable"])
def test_only_its_checksum_tells_whether_a_shard_was_altered(
    prepared: tuple[Manifest, np.ndarray], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow says OSError of a block that does not decompress, as of a network that fails."""
    manifest, _ = prepared
    path = Path(manifest.folder, next(iter(manifest.shards())).file)

    def fails(*args: Any, **options: Any) -> Any:
        if how == "unavailable":
            raise Unavailable("503 slow down")
        raise OSError("ZSTD decompression failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fails)
    if how == "altered":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read") as caught:
        TokenReader(manifest, "text").read(0, 5)
    assert isinstance(caught.value, Unreadable) == (how == "unavailable")
