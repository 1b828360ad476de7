"""Preparing shards: the same tokens however it is done, and no work done twice."""

import filecmp
import importlib.util
import json
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import corpus, texts, units
from pipelines.corpus import SourceSpec, find_files, named_sources
from pipelines.errors import BadInput, DataError, Unreadable
from pipelines.manifest import SPLITS, Manifest, checksum_problem, verify_shards
from pipelines.shards import TokenReader
from pipelines.texts import Text, read_file
from pipelines.tokenize import prepare, prepared_folder
from pipelines.tokenizer import (
    check_tokenizer,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from tst_ray.config import load_config
from tst_ray.corpus import prepare_corpus

SETTINGS: dict[str, Any] = {
    "tokenizer": "train",
    "vocab_size": 300,
    "validation_share": 0.2,
    "row_tokens": 64,
    "undecodable": "skip",
}


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MIN_UNIT_BYTES", 500)
    monkeypatch.setattr(corpus, "MAX_UNIT_BYTES", 500)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path / "prepared")


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceSpec]:
    """Forty text files, one of them undecodable, and a file of JSON Lines."""
    books = tmp_path / "books"
    books.mkdir()
    for i in range(40):
        (books / f"{i:02d}.txt").write_text(f"Chapter {i}: ünder the {'sea ' * (i % 13)}\n" * 3)
    (books / "17.txt").write_bytes(b"not \xff text")
    rows = [json.dumps({"body": f"page {i} <|endoftext|> {'web ' * (i % 7)}"}) for i in range(30)]
    (tmp_path / "web.jsonl").write_text("\n".join(rows))
    return [SourceSpec(str(books)), SourceSpec(str(tmp_path / "web.jsonl"), text_field="body")]


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first file of each unit that is tokenized, as it happens."""
    seen: list[str] = []
    whole = units.tokenize_unit

    def watched(job: units.Job, key: str, unit: corpus.Unit) -> units.Record:
        seen.append(unit.files[0].path)
        return whole(job, key, unit)

    monkeypatch.setattr(units, "tokenize_unit", watched)
    return seen


def prepared(sources: list[SourceSpec], folder: str, **changes: Any) -> Manifest:
    return prepare(sources, folder=folder, **{**SETTINGS, **changes})


def split_tokens(manifest: Manifest, source: str, split: str) -> np.ndarray:
    reader = TokenReader(manifest, source, split)
    return reader.read(0, reader.num_tokens)


def documents(manifest: Manifest, source: str, split: str) -> list[str]:
    """The text between end-of-text tokens."""
    tokens = split_tokens(manifest, source, split)
    tokenizer = load_tokenizer(manifest.tokenizer_folder)
    pieces = np.split(tokens, np.flatnonzero(tokens == manifest.eot_token) + 1)
    assert len(pieces[-1]) == 0  # the last document ends too
    return [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]]


def same_folders(one: str, other: str) -> bool:
    names = sorted(str(path.relative_to(one)) for path in Path(one).rglob("*") if path.is_file())
    others = sorted(
        str(path.relative_to(other)) for path in Path(other).rglob("*") if path.is_file()
    )
    return names == others and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def told(error: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ── what is in the shards ────────────────────────────────────────────────────────────────────────


def test_the_shards_hold_the_texts(sources: list[SourceSpec], folder: str) -> None:
    manifest = prepared(sources, folder)
    assert [source.name for source in manifest.sources] == ["books", "web"]
    for spec in named_sources(sources):
        files = find_files(spec)
        texts = [
            text
            for file in files.files
            for text in read_file(files.root, file, spec.text_field)
            if isinstance(text, Text)
        ]
        train, held_out = (documents(manifest, files.name, name) for name in SPLITS)
        assert sorted(train + held_out) == sorted(text.content for text in texts)
        assert 2 < len(held_out) < len(train)
        source = manifest.source(files.name)
        assert source.documents == len(texts)
        assert source.text_bytes == sum(text.num_bytes for text in texts)


def test_the_manifest_counts_what_there_is(sources: list[SourceSpec], folder: str) -> None:
    manifest = prepared(sources, folder)
    assert Manifest.load(folder) == manifest
    verify_shards(manifest)
    assert manifest.dtype == "uint16" and manifest.row_tokens == 64
    books = manifest.source("books")
    assert books.num_skipped == 1
    assert books.skipped == (
        {"path": "17.txt", "reason": "not UTF-8 at byte 4 (invalid start byte)"},
    )
    assert len(books.train.shards) > 3
    assert re.fullmatch(r"books/train-[0-9a-f]{16}-00000\.parquet", books.train.shards[0].file)
    for source in manifest.sources:
        for split in (source.train, source.validation):
            assert split.tokens == sum(shard.tokens for shard in split.shards)


def test_sections_of_a_long_text_are_held_out_as_documents_of_their_own(
    tmp_path: Path, folder: str
) -> None:
    """One big file gives its share to the hold-out, and each part of it ends."""
    whole = "".join(f"line {i}\n" for i in range(5000))
    (tmp_path / "a.txt").write_text(whole)
    manifest = prepared([SourceSpec(str(tmp_path / "a.txt"))], folder, undecodable="refuse")
    train, held_out = (documents(manifest, "a", split) for split in SPLITS)
    assert sorted("".join(train + held_out)) == sorted(whole)
    assert all(document in whole for document in train + held_out)
    assert len(held_out) > 10 and 0.15 < len("".join(held_out)) / len(whole) < 0.25
    assert manifest.source("a").documents == 1


def test_each_file_ends_in_the_split_that_its_last_text_is_in(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No document of either split goes on from one file into another."""
    monkeypatch.setattr("pipelines.texts.PIECE_BYTES", 100)
    monkeypatch.setattr(corpus, "MAX_UNIT_BYTES", 2**20)
    (tmp_path / "books").mkdir()
    for name in "abcdefgh":
        text = "".join(f"{name} line {i}\n" for i in range(60))
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    (tmp_path / "books" / "d.txt").write_bytes(b"d line\n" * 40 + b"\xff\n")
    manifest = prepared([SourceSpec(str(tmp_path / "books"))], folder, validation_share=0.3)
    for split in ("train", "validation"):
        found = documents(manifest, "books", split)
        assert len(found) > 8
        assert all(len({line[0] for line in text.splitlines()}) == 1 for text in found)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_long_document_has_one_end(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Those up to a piece's size are encoded as they always were; none is given in one breath."""
    texts_of = [f"{i} short {'x' * (i % 5)}" for i in range(40)]
    texts_of += [f"{i} löng\n" + "ünder the sea\n" * (i + 4) + "x" * 150 for i in range(40)]
    table = pa.table({"text": texts_of})
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts_of))
    source = [SourceSpec(str(path))]
    whole = prepared(source, f"{folder}-whole", validation_share=0.0)
    monkeypatch.setattr(texts, "PIECE_BYTES", 64)
    given: list[int] = []
    encode = units._encode

    def watched(job: units.Job, seams: Any, batch: list[Text]) -> list[list[int]]:
        given.extend(len(text.content.encode()) for text in batch)
        return encode(job, seams, batch)

    monkeypatch.setattr(units, "_encode", watched)
    cut = prepared(source, folder, validation_share=0.0)
    assert max(given) <= 64 and len(given) > 3 * len(texts_of)
    assert documents(cut, "rows", "train") == documents(whole, "rows", "train") == texts_of
    assert cut.sources[0].documents == whole.sources[0].documents == 80
    assert cut.sources[0].text_bytes == whole.sources[0].text_bytes


def test_documents_up_to_a_piece_give_the_shards_they_always_gave(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest of them are just a piece: cut in one more place, they would be other tokens."""
    rows = ["ünder the sea " * 4, "a\n\n\n" * 15 + "abcd", "\n" * 64, "\ufeff \n"]
    assert max(len(row.encode()) for row in rows) == 64
    monkeypatch.setattr(texts, "PIECE_BYTES", 64)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    manifest = prepared([SourceSpec(str(path))], folder, validation_share=0.0)
    plain = load_tokenizer(manifest.tokenizer_folder).backend_tokenizer
    expected = [token for row in rows for token in (*plain.encode(row).ids, manifest.eot_token)]
    assert split_tokens(manifest, "rows", "train").tolist() == expected


def test_no_share_holds_nothing_out(sources: list[SourceSpec], folder: str) -> None:
    manifest = prepared(sources, folder, validation_share=0.0)
    assert all(source.validation.tokens == 0 for source in manifest.sources)
    assert len(documents(manifest, "books", "train")) == 39


def test_a_large_vocabulary_takes_four_bytes(
    sources: list[SourceSpec], folder: str, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, 70_000)}, "sea": 70_000}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unk>")
    made.save_pretrained(tmp_path / "words")
    manifest = prepared(sources[:1], folder, tokenizer=str(tmp_path / "words"))
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 70_001)
    assert split_tokens(manifest, "books", "train").max() == 70_000


def test_an_address_serves_as_a_folder(sources: list[SourceSpec], folder: str) -> None:
    local = prepared(sources, folder)
    remote = prepared(sources, "memory://prepared/here")
    assert remote.fingerprint == local.fingerprint
    verify_shards(remote)
    assert check_tokenizer(remote).eos_token == "<|endoftext|>"
    assert prepared(sources, "memory://prepared/here") == remote


# ── no work twice ────────────────────────────────────────────────────────────────────────────────


def test_unchanged_sources_are_not_tokenized_again(
    sources: list[SourceSpec], folder: str, tokenized: list[str]
) -> None:
    first = prepared(sources, folder)
    assert len(tokenized) > 5
    tokenized.clear()
    lines: list[str] = []
    assert prepared(sources, folder, log=lines.append) == first
    assert tokenized == [] and "already prepared" in lines[-1]


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_an_interrupted_preparation_goes_on(
    sources: list[SourceSpec],
    folder: str,
    tmp_path: Path,
    tokenized: list[str],
    monkeypatch: pytest.MonkeyPatch,
    stop_after: int,
) -> None:
    undisturbed = prepared(sources, str(tmp_path / "undisturbed"))
    num_units = len(tokenized)
    tokenized.clear()

    def stops(*work: Any) -> Iterator[units.Record]:
        for record in units.run_inline(*work):
            if len(tokenized) > stop_after:
                raise KeyboardInterrupt
            yield record

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("pipelines.tokenize.run_inline", stops)
        prepared(sources, folder)
    # A unit that wrote shards but no record was not finished.
    record = sorted(Path(folder, "units").iterdir())[0]
    record.unlink()
    with pytest.raises(DataError, match="not found"):
        Manifest.load(folder)
    tokenized.clear()
    again = prepared(sources, folder)
    assert len(tokenized) == num_units - stop_after
    assert again.fingerprint == undisturbed.fingerprint
    assert same_folders(folder, undisturbed.folder)


def test_only_damaged_shards_are_made_again(
    sources: list[SourceSpec], folder: str, tokenized: list[str], tmp_path: Path
) -> None:
    first = prepared(sources, folder)
    shutil.copytree(folder, tmp_path / "copy")
    tokenized.clear()
    shards = first.source("books").train.shards
    Path(folder, shards[1].file).unlink()
    cut = Path(folder, shards[3].file)
    cut.write_bytes(cut.read_bytes()[:-1])
    (Path(folder, "units") / "torn.json").write_text('{"key": ')
    assert prepared(sources, folder) == first
    assert len(tokenized) == 2
    Path(folder, "units", "torn.json").unlink()
    assert same_folders(folder, str(tmp_path / "copy"))


def test_only_changed_files_are_tokenized_again(
    sources: list[SourceSpec], folder: str, tokenized: list[str], tmp_path: Path
) -> None:
    before = prepared(sources, folder)
    num_units = len(tokenized)
    old = split_tokens(before, "books", "train")
    tokenized.clear()
    (tmp_path / "books" / "20.txt").write_text("A chapter that is new.\n" * 9)
    after = prepared(sources, folder)
    assert 1 <= len(tokenized) <= 3 < num_units
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    every = documents(after, "books", "train") + documents(after, "books", "validation")
    assert "A chapter that is new.\n" * 9 in every and len(every) == 39
    # Whoever still reads by the older manifest reads what it promised.
    verify_shards(before)
    np.testing.assert_array_equal(split_tokens(before, "books", "train"), old)


@pytest.mark.parametrize("path", ["memory://books", "memory://books/a.txt", "memory://books/*"])
def test_text_of_equal_size_is_seen_where_storage_tells_no_time(
    path: str, folder: str, tokenized: list[str]
) -> None:
    """Arrow learns of a time only where a filesystem of fsspec calls it `mtime`."""
    books = fsspec.filesystem("memory")
    books.pipe("/books/a.txt", b"alpha beta\n" * 99)
    source = [SourceSpec(path, name="books")]
    prepared(source, folder, validation_share=0.0)
    tokenized.clear()
    lines: list[str] = []
    prepared(source, folder, validation_share=0.0, log=lines.append)
    assert tokenized == [] and "already prepared" in lines[-1]
    books.pipe("/books/a.txt", b"omega zeta\n" * 99)
    after = prepared(source, folder, validation_share=0.0)
    assert documents(after, "books", "train") == ["omega zeta\n" * 99]


def test_records_that_are_not_wanted_are_not_read(
    sources: list[SourceSpec], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder where text comes and goes has ever more of them."""
    prepared(sources, folder)
    (tmp_path / "books" / "20.txt").write_text("A chapter that is new.\n" * 9)
    reads = Mock(side_effect=units.read_bytes)
    monkeypatch.setattr(units, "read_bytes", reads)
    prepared(sources, folder)
    left = {Path(call.args[1]).name for call in reads.call_args_list}
    every = {path.name for path in Path(folder, "units").iterdir()}
    assert len(left) > 5 and len(every - left) >= 2


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", None])
def test_a_record_of_files_outside_of_the_folder_is_not_finished_work(
    sources: list[SourceSpec], folder: str, tokenized: list[str], name: str | None
) -> None:
    """It is made again, and nothing outside is looked at."""
    first = prepared(sources, folder)
    Path(folder, "manifest.json").unlink()
    path = min(Path(folder, "units").iterdir())
    record = json.loads(path.read_text())
    (shard, *_), whole = record["train"] or record["validation"], path.read_bytes()
    shard["file"] = name
    path.write_text(json.dumps(record))
    tokenized.clear()
    assert prepared(sources, folder) == first
    assert len(tokenized) == 1
    assert path.read_bytes() == whole


def test_two_who_prepare_one_folder_at_a_time_leave_each_other_be(
    sources: list[SourceSpec],
    folder: str,
    tokenized: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others: list[Manifest] = []

    def disturbed(*work: Any) -> Iterator[units.Record]:
        for record in units.run_inline(*work):
            if len(tokenized) == 1:  # text is added, and another one prepares it all meanwhile
                (tmp_path / "books" / "00a.txt").write_text("A chapter that is new.\n" * 40)
                others.append(prepared(sources, folder))
            yield record

    monkeypatch.setattr("pipelines.tokenize.run_inline", disturbed)
    first = prepared(sources, folder)
    for manifest in (first, *others):
        verify_shards(manifest)
    tokenized.clear()
    assert [prepared(sources, folder)] == others
    assert tokenized == []


def number_shards(folder: str) -> None:
    """Name a folder's shards by numbers, as older versions did."""
    for number, path in enumerate(sorted(Path(folder, "units").iterdir())):
        record = json.loads(path.read_text())
        key = record["key"][:16]
        for shard in Path(folder).glob(f"*/*-{key}-*"):
            shard.rename(str(shard).replace(key, f"{number:05d}"))
        text = json.dumps({**record, "number": number}).replace(f"-{key}-", f"-{number:05d}-")
        path.write_text(text)
        manifest = Path(folder, "manifest.json")
        manifest.write_text(manifest.read_text().replace(f"-{key}-", f"-{number:05d}-"))


def test_a_folder_of_numbered_shards_stays_good(
    sources: list[SourceSpec], folder: str, tokenized: list[str]
) -> None:
    fingerprint = prepared(sources, folder).fingerprint
    number_shards(folder)
    tokenized.clear()
    numbered = prepared(sources, folder)
    Path(folder, "manifest.json").unlink()
    assert prepared(sources, folder) == numbered
    assert numbered.fingerprint == fingerprint and tokenized == []
    shards = numbered.source("books").train.shards
    Path(folder, shards[1].file).unlink()
    again = prepared(sources, folder)
    assert len(tokenized) == 1
    verify_shards(again)
    assert again.fingerprint == fingerprint
    files = [shard.file for shard in again.source("books").train.shards]
    assert sum(shard.file in files for shard in shards) == len(shards) - 1


def test_a_moved_folder_is_still_finished(
    sources: list[SourceSpec], folder: str, tmp_path: Path, tokenized: list[str]
) -> None:
    first = prepared(sources, folder)
    shutil.move(folder, tmp_path / "moved")
    Path(tmp_path, "moved", "manifest.json").unlink()
    tokenized.clear()
    assert prepared(sources, str(tmp_path / "moved")).fingerprint == first.fingerprint
    assert tokenized == []


def test_how_far_a_long_preparation_is_is_told(
    sources: list[SourceSpec], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    prepared(sources, f"{folder}-short", log=lines.append)
    assert not any("so far" in line for line in lines)
    monkeypatch.setattr("pipelines.progress.FIRST_TOLD_S", 0.001)
    told_ = threading.Event()

    def waits(*work: Any) -> Iterator[units.Record]:
        for number, record in enumerate(units.run_inline(*work)):
            yield record
            if number == 3:
                assert told_.wait(20)

    def log(line: str) -> None:
        lines.append(line)
        if re.fullmatch(r"0\.0 of 0\.0 MB of text are tokenized \(0 s so far\)", line):
            told_.set()

    monkeypatch.setattr("pipelines.tokenize.run_inline", waits)
    prepared(sources, folder, log=log)
    assert told_.is_set()


def test_files_that_are_the_same_are_told(tmp_path: Path, folder: str) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(9):
            text = f"a story of {number} words\n" * 2_000
            other = text.replace(" words\n", f" {name}words\n") if number > 2 else text
            (tmp_path / name / f"{number}.txt").write_text(other)
    specs = [SourceSpec(str(tmp_path / name)) for name in ("a", "b")]
    lines: list[str] = []
    prepared(specs, folder, log=lines.append)
    assert [line for line in lines if "same as" in line] == [
        "3 files (0.1 MB) are the same as others, and are trained on as often as they are there, "
        f"such as {tmp_path}/a/0.txt and {tmp_path}/b/0.txt"
    ]
    lines.clear()
    prepared(specs[:1], f"{folder}-1", log=lines.append)
    assert not any("same as" in line for line in lines)


def test_every_shard_is_looked_at_once(
    sources: list[SourceSpec], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were just written, too: tasks elsewhere may have another folder of that name."""
    looks = Mock(side_effect=checksum_problem)
    monkeypatch.setattr("pipelines.manifest.checksum_problem", looks)
    for text in ("one", "another"):
        (tmp_path / "books" / "20.txt").write_text(text)
        looks.reset_mock()
        config = load_config(
            None,
            [f"--data.sources=['{sources[0].path}']", "--data.vocab_size=300",
             f"--run.storage={tmp_path / 'runs'}"],
        )  # fmt: skip
        manifest = prepare_corpus(config, "inline", lambda line: None)
        looked = sorted(call.args[1].file for call in looks.call_args_list)
        assert looked == sorted(shard.file for shard in manifest.shards())


def test_shards_that_tasks_wrote_elsewhere_are_missed_at_once(
    sources: list[SourceSpec], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*work: Any) -> Iterator[units.Record]:
        yield from units.run_inline(*work)
        shutil.rmtree(f"{folder}/books")

    monkeypatch.setattr("pipelines.tokenize.run_inline", elsewhere)
    with pytest.raises(DataError, match="is missing; run"):
        prepared(sources, folder)
    assert not Path(folder, "manifest.json").exists()


# ── where shards go ──────────────────────────────────────────────────────────────────────────────


def test_runs_that_agree_share_a_folder(sources: list[SourceSpec], tmp_path: Path) -> None:
    def name(specs: list[SourceSpec] = sources, **changes: Any) -> str:
        return prepared_folder("cache", specs, **{**SETTINGS, **changes})

    assert name().startswith("cache/books+web-")
    assert name() == name([replace(spec, weight=0.5) for spec in sources])
    tokenizer = train_tokenizer(["some text"], 260)
    tokenizer.save_pretrained(tmp_path / "own")
    one = name(tokenizer=str(tmp_path / "own"))
    assert one == name(tokenizer=str(tmp_path / "own") + "/")
    train_tokenizer(["other text " * 50], 270).save_pretrained(tmp_path / "own")
    names = [
        name(),
        one,
        name(tokenizer=str(tmp_path / "own")),
        name(sources[:1]),
        name([sources[0], replace(sources[1], text_field="text")]),
        name(vocab_size=301),
        name(validation_share=0.1),
        name(row_tokens=128),
        name(undecodable="refuse"),
        name(tokenizer="gpt2"),
    ]
    assert len(set(names)) == len(names)
    assert name(tokenizer="gpt2", vocab_size=5) == name(tokenizer="gpt2")


def test_a_folder_of_other_settings_is_left_alone(sources: list[SourceSpec], folder: str) -> None:
    first = prepared(sources, folder)
    with pytest.raises(DataError, match=r"other settings \(tokenizer, row_tokens\); prepare in"):
        prepared(sources, folder, vocab_size=290, row_tokens=32)
    assert prepared(sources, folder) == first
    verify_shards(first)


@pytest.mark.parametrize("content", [None, "", '{"settings": 1}'])
def test_a_damaged_preparation_is_known_by_its_manifest(
    sources: list[SourceSpec], folder: str, tokenized: list[str], tmp_path: Path, content: str
) -> None:
    first = prepared(sources, folder)
    path = Path(folder, "preparation.json")
    (tmp_path / "books" / "20.txt").write_text("A chapter that is new.\n" * 9)
    path.unlink() if content is None else path.write_text(content)
    tokenized.clear()
    after = prepared(sources, folder)
    assert after.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert len(tokenized) <= 3
    with pytest.raises(DataError, match=r"other settings \(row_tokens\)"):
        prepared(sources, folder, row_tokens=32)
    if content is not None:
        Path(folder, "manifest.json").unlink()
        with pytest.raises(DataError, match=r"preparation\.json: cannot be read"):
            prepared(sources, folder)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────


def test_undecodable_text_is_refused_if_so_set(sources: list[SourceSpec], folder: str) -> None:
    with pytest.raises(DataError) as error:
        prepared(sources, folder, undecodable="refuse")
    assert "books/17.txt: not UTF-8 at byte 4" in told(error)
    assert "data.undecodable=skip" in told(error)


def test_a_source_that_gives_nothing_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff\xff")
    (tmp_path / "good.txt").write_text("good text\n" * 500)
    specs = [SourceSpec(str(tmp_path / name)) for name in ("good.txt", "bad")]
    with pytest.raises(DataError) as error:
        prepared(specs, folder, validation_share=0.0)
    assert "bad: gives nothing to train on: 0 documents" in told(error)
    assert "left out 1 texts (a.txt: not UTF-8 at byte 0" in told(error)
    with pytest.raises(DataError, match="not found"):
        Manifest.load(folder)


@pytest.mark.parametrize("how", ["trained", "named"])
def test_a_wrong_text_field_is_told_before_anything_is_tokenized(
    sources: list[SourceSpec], folder: str, tokenized: list[str], how: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(texts, "MOST_UNREAD", 9)
    save_tokenizer(train_tokenizer(["some text"], 270), str(tmp_path / "own"))
    wrong = [sources[0], replace(sources[1], text_field="text")]
    with pytest.raises(DataError) as error:
        prepared(wrong, folder, tokenizer="train" if how == "trained" else str(tmp_path / "own"))
    assert "none of the first 9 texts can be read, such as web.jsonl: line 9: no" in told(error)
    assert tokenized == []


def test_files_are_counted_apart_from_texts_and_named(tmp_path: Path, folder: str) -> None:
    (tmp_path / "rows").mkdir()
    for name, column, rows in (("good", "text", 900), ("other", "body", 700)):
        table = pa.table({column: [f"{name} row {i}" for i in range(rows)]})
        pq.write_table(table, tmp_path / "rows" / f"{name}.parquet", row_group_size=9)
    (tmp_path / "rows" / "latin.txt").write_bytes(b"caf\xe9")
    (source,) = prepared([SourceSpec(str(tmp_path / "rows"))], folder).sources
    assert (source.documents, source.num_skipped, source.num_cut) == (900, 1, 1)
    assert source.left_out == (
        "1 texts (latin.txt: not UTF-8 at byte 3 (unexpected end of data)) and 1 files, or the "
        "rest of them (other.parquet: no column 'text' (text_field); it has body)"
    )
    assert Manifest.load(folder).sources == (source,)
    path = Path(folder, "manifest.json")  # as older versions wrote it
    content = json.loads(path.read_text())
    del content["sources"][0]["cut"], content["sources"][0]["num_cut"]
    path.write_text(json.dumps(content))
    assert Manifest.load(folder).sources == (replace(source, num_cut=0, cut=()),)


def test_a_tokenizer_trained_on_nothing_is_not_kept(tmp_path: Path, folder: str) -> None:
    text = "the very same words, again and again\n" * 50
    source = tmp_path / "a.txt"
    source.write_text(f"é{text}", encoding="latin-1")
    with pytest.raises(
        DataError, match=r"nothing to train a tokenizer on, such as a\.txt: not UTF"
    ):
        prepared([SourceSpec(str(source))], folder, validation_share=0.0)
    source.write_text(text, encoding="utf-8")
    logged: list[str] = []
    manifest = prepared(
        [SourceSpec(str(source))], folder, validation_share=0.0, vocab_size=5_000, log=logged.append
    )
    assert 257 < manifest.vocab_size < 5_000
    assert any(f"the text gives {manifest.vocab_size} different tokens" in line for line in logged)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 256}, "vocab_size = 256: must be at least 257"),
        ({"validation_share": 1.0}, "validation_share = 1.0: must be"),
        ({"row_tokens": 0}, "row_tokens = 0: must be at least 1"),
        ({"undecodable": "drop"}, "undecodable = 'drop': must be skip or refuse"),
        ({"backend": "spark"}, "backend = 'spark': must be ray or inline"),
        (
            {"tokenizer": "./nowhere"},
            "data.tokenizer = ./nowhere: cannot be loaded (no such folder)",
        ),
    ],
)
def test_bad_choices_are_told(
    sources: list[SourceSpec], folder: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError) as error:
        prepared(sources, folder, **changes)
    assert expected in told(error)


def test_a_folder_that_cannot_be_written_is_told(sources: list[SourceSpec], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError) as error:
        prepared(sources, str(tmp_path / "file" / "prepared"))
    assert "cannot be" in told(error)
    assert (tmp_path / "file").read_text() == "in the way"


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────


def test_a_trained_tokenizer_is_an_ordinary_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [f"def f{i}(x): return x + {i}\n" for i in range(200)]
    made = train_tokenizer(texts, 320)
    assert tokenizer_fingerprint(train_tokenizer(texts, 320)) == tokenizer_fingerprint(made)
    save_tokenizer(made, str(tmp_path / "own"))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(made)
    assert len(loaded) == 320 and loaded.eos_token == "<|endoftext|>"
    text = "any text at all: ünï 😀\n\tok  "
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_long_words_change_no_ordinary_tokenizer_and_take_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [f"def f{i}(x): return x + {i * i}  # {'-' * (i % 70)}\n" for i in range(500)]
    made = tokenizer_fingerprint(train_tokenizer(texts, 400))
    monkeypatch.setattr("pipelines.tokenizer.MAX_WORD_CHARS", 2**30)
    assert tokenizer_fingerprint(train_tokenizer(texts, 400)) == made
    monkeypatch.undo()
    letters = "".join(random.Random(0).choices("ACGT", k=400_000))
    started = time.process_time()
    one = train_tokenizer([letters], 300)
    assert time.process_time() - started < 20  # of one word, it takes two minutes
    assert len(one.encode(letters[:1_000])) < 500


@pytest.mark.parametrize("content", [b"\n\x0e\n\x05<unk>", b"YQ== 0\n"])
def test_a_tokenizer_of_a_package_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """transformers takes sentencepiece's file for one of tiktoken."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *of: None if name == "sentencepiece" else find(name, *of),
    )
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadInput) as error:
        load_tokenizer(str(tmp_path))
    names_it = "needs the package sentencepiece); pip install sentencepiece" in told(error)
    assert names_it == (content[:1] == b"\n")


def test_special_tokens_in_a_text_are_text(sources: list[SourceSpec], folder: str) -> None:
    manifest = prepared(sources, folder)
    ends = [(split_tokens(manifest, "web", split) == manifest.eot_token).sum() for split in SPLITS]
    assert sum(ends) == 30


def test_nothing_is_added_or_cut(sources: list[SourceSpec], folder: str, tmp_path: Path) -> None:
    """A tokenizer that frames, cuts and pads its sequences still gives the plain tokens."""
    from tokenizers import processors

    made = train_tokenizer(["Chapter under the sea " * 20], 280)
    backend = made.backend_tokenizer
    end = ("<|endoftext|>", made.eos_token_id)
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [end])
    backend.enable_truncation(5)
    backend.enable_padding(length=999)
    made.save_pretrained(tmp_path / "framed")
    manifest = prepared(sources[:1], folder, tokenizer=str(tmp_path / "framed"))
    every = documents(manifest, "books", "train") + documents(manifest, "books", "validation")
    assert ("Chapter 12: ünder the " + "sea " * 12 + "\n") * 3 in every
    assert len(every) == 39


def test_a_tokenizer_that_does_not_finish_is_named(
    sources: list[SourceSpec], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    def spins(*args: Any, **options: Any) -> None:
        while not ended.is_set():
            pass

    ended = threading.Event()
    plain = Mock(spec=Tokenizer, encode_batch_fast=spins)
    monkeypatch.setattr(units, "plain_encoder", lambda *args: plain)
    monkeypatch.setattr(units, "ENCODE_LIMIT_S", 0.1)
    with pytest.raises(DataError) as error:
        prepared(sources[1:], folder)
    ended.set()
    assert f"{folder}/tokenizer: takes more than 0 s for a megabyte of web.jsonl" in told(error)
    assert "set data.tokenizer to another" in told(error)


def test_a_tokenizer_whose_library_panics_is_named(tmp_path: Path, folder: str) -> None:
    """A pattern that tries twice as many ways for each letter more, up to a limit."""
    from tokenizers import Regex, pre_tokenizers

    made = train_tokenizer(["some text"], 260)
    slow = pre_tokenizers.Split(Regex(r"(a|aa)+$|[^a]+"), "isolated")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [slow, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.save_pretrained(tmp_path / "slow")
    (tmp_path / "a.txt").write_text("a" * 60 + "b")
    with pytest.raises(DataError, match=r"cannot encode a\.txt \(Onig: Regex search error"):
        prepared([SourceSpec(str(tmp_path / "a.txt"))], folder, tokenizer=str(tmp_path / "slow"))


@pytest.mark.parametrize("kind", ["Unigram", "dropout"])
def test_two_preparations_are_the_same_and_special_text_is_text(
    tmp_path: Path, folder: str, kind: str
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if kind == "Unigram":
        pieces = [("</s>", 0.0), *((letter, -2.0) for letter in "▁abc</s>"), ("abc", -1.0)]
        plain = Tokenizer(models.Unigram(pieces, unk_id=0))
        plain.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        plain = train_tokenizer(["abc </s> abc"] * 50, 280).backend_tokenizer
        plain.model.dropout = 0.5
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")
    made.save_pretrained(tmp_path / "own")
    (tmp_path / "a.txt").write_text("abc </s> abc </s>" * 30)
    name = str(tmp_path / "own")
    one, other = (
        prepared([SourceSpec(str(tmp_path / "a.txt"))], f"{folder}-{n}", tokenizer=name,
                 validation_share=0.0)
        for n in (1, 2)
    )  # fmt: skip
    assert one.fingerprint == other.fingerprint
    tokens = split_tokens(one, "a", "train")
    assert (tokens == one.eot_token).sum() == 1 and tokens[-1] == one.eot_token


def test_a_tokenizer_without_end_of_text_is_refused(
    sources: list[SourceSpec], folder: str, tmp_path: Path
) -> None:
    made = train_tokenizer(["some text"], 260)
    made.eos_token = None
    made.save_pretrained(tmp_path / "endless")
    with pytest.raises(DataError) as error:
        prepared(sources, folder, tokenizer=str(tmp_path / "endless"))
    assert "endless: has no end-of-text token" in told(error)


def test_a_folder_without_a_tokenizer_is_refused(
    sources: list[SourceSpec], folder: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as error:
        prepared(sources, folder, tokenizer=str(tmp_path / "books"))
    assert "books: cannot be loaded" in told(error)


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_a_tokenizer_that_does_not_know_every_character_is_told(
    sources: list[SourceSpec], folder: str, tmp_path: Path, kind: str
) -> None:
    """Its library raises a bare Exception of a text that it cannot encode."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0, "sea": 1}
    scores = [("<end>", 0.0), ("s", -1.0)]
    plain = Tokenizer(models.WordLevel(words) if kind == "WordLevel" else models.Unigram(scores))
    own = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(DataError) as error:
        prepared(sources[1:], folder, tokenizer=str(tmp_path / "own"))
    assert "tokenizer: cannot encode web.jsonl (" in told(error)
    assert "set data.tokenizer to one that knows every character" in told(error)


def test_a_folder_of_shards_is_not_taken_for_a_tokenizer(
    sources: list[SourceSpec], folder: str
) -> None:
    prepared(sources, folder)
    with pytest.raises(DataError) as error:
        prepared(sources, f"{folder}-2", tokenizer=folder)
    assert f"a folder of shards, whose tokenizer is {folder}/tokenizer); name" in told(error)
    named = prepared(sources, f"{folder}-2", tokenizer=f"{folder}/tokenizer")
    assert named.tokenizer_fingerprint == Manifest.load(folder).tokenizer_fingerprint


class Unavailable(Exception):
    """What a client of an object store raises."""


@pytest.mark.parametrize("what", ["books", "units", "record", "shard", "choices"])
def test_shards_that_cannot_be_looked_at_are_told_in_a_line(
    sources: list[SourceSpec], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that fails says nothing of what is finished: another try may go well."""
    folder = f"memory://shards-of-{what}/here"
    manifest = prepared(sources, folder)
    there = fsspec.filesystem("memory")
    there.rm(f"/shards-of-{what}/here/manifest.json")
    refused, method = {
        "books": ("/here/books$", "find"),
        "units": ("/here/units$", "find"),
        "record": (r"/units/.*\.json$", "_open"),
        "shard": (r"\.parquet$", "_open"),
        "choices": (r"/preparation\.json$", "_open"),
    }[what]
    whole = getattr(MemoryFileSystem, method)

    def refuses(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if re.search(refused, path) and options.get("mode", "rb") == "rb":
            raise Unavailable("503\nslow down")
        return whole(self, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, method, refuses)
    if what in ("books", "shard"):
        with pytest.raises(Unreadable, match=r"cannot be (listed|read) \(503 slow down\)$"):
            verify_shards(manifest)
    with pytest.raises(Unreadable, match=r"cannot be (listed|read) \(503 slow down\)$") as error:
        prepared(sources, folder)
    told(error)


def test_shards_of_another_tokenizer_are_told(
    sources: list[SourceSpec], folder: str, tmp_path: Path
) -> None:
    manifest = prepared(sources, folder)
    own = check_tokenizer(manifest)
    assert own.eos_token_id == manifest.eot_token
    other = train_tokenizer(["another text " * 30], 300)
    other.save_pretrained(tmp_path / "other")
    for name, expected in [(str(tmp_path / "other"), "other"), ("train", None), (None, None)]:
        if expected is None:
            check_tokenizer(manifest, name)
            continue
        with pytest.raises(DataError, match=f"tokenizer .*{expected} has fingerprint") as error:
            check_tokenizer(manifest, name)
        assert manifest.tokenizer_fingerprint[:12] in told(error)
    other.save_pretrained(manifest.tokenizer_folder)
    with pytest.raises(DataError, match="prepared/tokenizer has fingerprint"):
        check_tokenizer(manifest)
    own.save_pretrained(manifest.tokenizer_folder)
    with pytest.raises(DataError, match=f"ends texts with token {own.eos_token_id}, but"):
        check_tokenizer(replace(manifest, eot_token=7))


@pytest.mark.parametrize("damage", ["missing", "altered", "without its end of text"])
@pytest.mark.parametrize("kind", ["trained", "named"])
def test_the_shards_own_tokenizer_is_made_again(
    sources: list[SourceSpec],
    folder: str,
    tmp_path: Path,
    tokenized: list[str],
    kind: str,
    damage: str,
) -> None:
    name = "train"
    if kind == "named":
        name = str(tmp_path / "own")
        train_tokenizer(["some text " * 30], 270).save_pretrained(name)
    manifest = prepared(sources, folder, tokenizer=name)
    shutil.copytree(folder, tmp_path / "copy")
    tokenized.clear()
    if damage == "missing":
        shutil.rmtree(manifest.tokenizer_folder)
    elif damage == "altered":
        train_tokenizer(["another text " * 30], 300).save_pretrained(manifest.tokenizer_folder)
    else:
        Path(manifest.tokenizer_folder, "tokenizer_config.json").unlink()
    assert prepared(sources, folder, tokenizer=name) == manifest
    assert tokenized == [] and same_folders(folder, str(tmp_path / "copy"))


def test_another_end_of_text_is_never_taken_up(
    sources: list[SourceSpec], folder: str, tmp_path: Path
) -> None:
    """A token that is there already: the vocabulary in tokenizer.json stays as it is."""
    manifest = prepared(sources, folder)
    config = Path(manifest.tokenizer_folder, "tokenizer_config.json")
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "eos_token": "A"}))
    with pytest.raises(DataError, match="run `tst-ray prepare` again"):
        check_tokenizer(manifest)
    (tmp_path / "books" / "new.txt").write_text("A chapter that is new.\n" * 9)
    try:
        again = prepared(sources, folder)
    except DataError as error:  # trained on more text, it is another one
        assert "tokenizer: is missing or was altered" in str(error)
    else:
        assert again.eot_token == manifest.eot_token
    (tmp_path / "books" / "new.txt").unlink()
    assert prepared(sources, folder) == manifest
    assert json.loads(config.read_text())["eos_token"] == settings["eos_token"]
    check_tokenizer(manifest)


def test_a_token_for_padding_changes_no_text(sources: list[SourceSpec], folder: str) -> None:
    manifest = prepared(sources, folder)
    config = Path(manifest.tokenizer_folder, "tokenizer_config.json")
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "pad_token": "<|pad|>"}))
    assert check_tokenizer(manifest).pad_token == "<|pad|>"
    assert prepared(sources, folder) == manifest


def test_a_tokenizer_that_cannot_be_made_again_is_told(
    sources: list[SourceSpec], folder: str, tmp_path: Path
) -> None:
    manifest = prepared(sources, folder)
    (tmp_path / "books" / "20.txt").write_text("A chapter that is new.\n" * 9)
    shutil.rmtree(manifest.tokenizer_folder)
    with pytest.raises(DataError, match="prepared/tokenizer: is missing or was altered") as error:
        prepared(sources, folder)
    assert manifest.tokenizer_fingerprint[:12] in told(error)
    assert not Path(manifest.tokenizer_folder).exists()
    assert Manifest.load(folder) == manifest


def test_whether_nothing_has_changed_is_seen_without_transformers(
    sources: list[SourceSpec], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(sources, folder)
    monkeypatch.setattr("pipelines.tokenizer.load_tokenizer", None)
    assert prepared(sources, folder) == first


# ── through Ray Data ─────────────────────────────────────────────────────────────────────────────


def test_tasks_that_ray_lost_are_told_in_a_line(
    sources: list[SourceSpec], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import OutOfMemoryError

    dataset = Mock()
    dataset.map.return_value.iter_rows.side_effect = OutOfMemoryError("killed\nand more")
    monkeypatch.setattr("ray.data.from_items", lambda *args, **options: dataset)
    with pytest.raises(
        DataError, match=r"Ray could not tokenize it all \(killed and more"
    ) as error:
        prepared(sources, folder, backend="ray")
    told(error)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_ray_writes_the_same_shards(
    sources: list[SourceSpec], folder: str, tmp_path: Path, local_ray: None
) -> None:
    with pa.output_stream(str(tmp_path / "books" / "big.txt.gz"), compression="gzip") as stream:
        stream.write("".join(f"line {i} of many\n" for i in range(120_000)).encode())
    inline = prepared(sources, str(tmp_path / "inline"))
    on_ray = prepared(sources, folder, backend="ray")
    assert replace(on_ray, folder=inline.folder) == inline
    assert same_folders(folder, inline.folder)
    with pytest.raises(DataError) as error:  # a task's refusal is told in one line as well
        prepared(sources, str(tmp_path / "refused"), backend="ray", undecodable="refuse")
    assert "books/17.txt: not UTF-8 at byte 4" in told(error)
