"""The texts in files: documents and their pieces, what is left out, a sample of them."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import corpus, rows, texts
from pipelines.errors import DataError
from pipelines.texts import LeftOut, Text, read_file, sample_texts
from tests.corpora import contents, found, paths, read, write_parquet


def reasons(items: list[Text | LeftOut]) -> list[str]:
    return [item.reason for item in items if isinstance(item, LeftOut)]


# ── text files ───────────────────────────────────────────────────────────────────────────────────


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\nüñ😀".encode())
    assert read(path) == [Text("a.txt", 0, "one\r\ntwo\n\nüñ😀", 18)]
    path.write_bytes(b"\xef\xbb\xbfmarked")
    assert contents(read(path)) == ["marked"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
def test_a_long_file_comes_in_pieces_cut_at_line_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 100)
    whole = "".join(f"line {i} " + "é" * (i % 30) + "\n" for i in range(200))
    path = tmp_path / f"a.txt{suffix}"
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write(whole.encode())
    pieces = [piece for piece in read(path) if isinstance(piece, Text)]
    assert "".join(piece.content for piece in pieces) == whole
    assert all(piece.content.endswith("\n") and piece.num_bytes <= 100 for piece in pieces)
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("offset", range(5))
def test_a_long_line_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 100)
    whole = "x" * offset + "😀é" * 100
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    pieces = read(tmp_path / "a.txt")
    assert not reasons(pieces)
    assert "".join(contents(pieces)) == whole


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    assert read(tmp_path / "a.txt") == [
        LeftOut("a.txt", "not UTF-8 at byte 2 (invalid start byte)")
    ]


def test_a_bad_piece_leaves_the_rest_and_the_document_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(b"good line\nbad \xff ...\ngood line\nbad \xff end")
    items = read(tmp_path / "a.txt")
    assert contents(items) == ["good line\n", "good line\n", ""]
    assert [reason.split(":")[0] for reason in reasons(items)] == ["piece 2", "piece 4"]
    assert [item.ends_document for item in items if isinstance(item, Text)] == [False, False, True]


# ── JSON Lines and Parquet ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_of_json_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    rows = [{"body": "one\ntwo"}, {"body": ""}, {"body": "three", "id": 3}]
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write("\n\n".join(json.dumps(row) for row in rows).encode())
    items = read(path, text_field="body")
    assert items == [Text("a.jsonl" + suffix, 0, "one\ntwo", 7),
                     Text("a.jsonl" + suffix, 4, "three", 5)]  # fmt: skip


def test_bad_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one"}',
        b'{"text": "cut',
        b'["text"]',
        b'{"body": "x"}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    items = read(tmp_path / "a.jsonl")
    assert contents(items) == ["one", "two"]
    told = reasons(items)
    assert [reason.split(":")[0] for reason in told] == [f"line {i}" for i in range(2, 9)]
    assert "not JSON" in told[0] and "no text in field 'text'" in told[2]
    assert "surrogate" in told[5]


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one", None, "", "two"], 2, id=[1, 2, 3, 4])
    items = read(tmp_path / "a.parquet")
    assert items == [
        Text("a.parquet", 0, "one", 3),
        LeftOut("a.parquet", "row 2: no text in field 'text' (text_field)"),
        Text("a.parquet", 3, "two", 3),
    ]
    assert reasons(read(tmp_path / "a.parquet", text_field="body")) == [
        "no column 'body' (text_field); it has text, id"
    ]


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 1000)
    whole = "".join(f"line {i * i}\n" for i in range(100_000))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(whole.encode())[:200_000])
    items = read(tmp_path / "a.txt.gz")
    assert whole.startswith("".join(contents(items))) and len(contents(items)) > 2
    assert [reason.split(" (")[0] for reason in reasons(items)] == ["damaged or cut short"]
    assert items[-1] == Text("a.txt.gz", len(contents(items)) - 1, "", 0)  # it ends all the same

    (tmp_path / "b.parquet").write_bytes(b"PAR1 is not enough PAR1")
    assert reasons(read(tmp_path / "b.parquet"))[0].startswith("damaged or cut short")


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_what_comes_before_the_damage_is_kept(tmp_path: Path, kind: str) -> None:
    whole = "".join(f'{{"text": "line {i * i} grün"}}\n' for i in range(60_000))
    (tmp_path / f"a{kind}.gz").write_bytes(gzip.compress(whole.encode())[:-5000])
    items = read(tmp_path / f"a{kind}.gz")
    (rest,) = (item for item in items if isinstance(item, LeftOut))
    assert rest.reason == "damaged or cut short (the compressed data ends too soon)"
    assert rest.is_rest
    read_bytes = sum(len(item.encode()) for item in contents(items))
    expected = (
        whole if kind == ".txt" else "".join(json.loads(w)["text"] for w in whole.split("\n")[:-1])
    )
    assert expected.startswith("".join(contents(items)))
    assert read_bytes > len(expected.encode()) - 60_000


@pytest.mark.parametrize(
    ("name", "compression"),
    [("A.TXT.GZ", "gzip"), ("A.Txt.Zst", "zstd"), ("A.TXT.BZ2", "bz2"), ("A.TXT.ZSTD", "zstd")],
)
def test_a_compressed_file_may_be_named_in_capitals(
    tmp_path: Path, name: str, compression: str
) -> None:
    with pa.output_stream(str(tmp_path / name), compression=compression) as stream:
        stream.write(b"some text\n")
    assert paths(str(tmp_path)) == [name]
    assert contents(read(tmp_path / name)) == ["some text\n"]


def test_text_is_never_left_out_because_storage_failed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    source = found(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(read_file(source.root, source.files[0], "text"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_text_is_never_left_out_because_storage_failed_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Reading fails midway, once: what cannot be told from a damaged file by the error alone."""
    monkeypatch.setattr(texts, "PIECE_BYTES", 10)
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, ["one", "two", "three", "four"], 2)
    else:
        lines = ["word one"] * 4 if name == "a.txt" else ['{"text": "one"}'] * 4
        path.write_text("".join(f"{line}\n" for line in lines))
    expected = read(path)
    assert len(expected) == 4
    truly, failed = texts._texts, []

    def fails_midway(*args: Any) -> Iterator[Text | LeftOut]:
        for number, text in enumerate(truly(*args)):
            if number == 2 and not failed:
                failed.append(number)
                raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")
            yield text

    monkeypatch.setattr(texts, "_texts", fails_midway)
    assert read(path) == expected
    assert failed


def test_a_lack_of_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args: Any) -> Iterator[Text | LeftOut]:
        yield Text("a.txt", 0, "text", 4, False)
        raise pa.ArrowMemoryError("malloc of size 4294967296 failed")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(texts, "_texts", too_large)
    with pytest.raises(DataError, match=r"a\.txt: does not fit into memory"):
        read(tmp_path / "a.txt")


def test_a_row_that_is_not_utf8_leaves_the_others(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"bad \xff", b"two"], pa.binary())
    for kind in (pa.string(), pa.large_string(), pa.binary()):
        strings = raw.cast(pa.large_binary()) if kind == pa.large_string() else raw
        column = pa.Array.from_buffers(kind, 3, strings.buffers())
        for number, written in enumerate((column, column.dictionary_encode())):
            path = tmp_path / f"{kind}-{number}.parquet"
            pq.write_table(pa.table({"text": written}), path)
            items = read(path)
            assert contents(items) == ["one", "two"], (kind, number)
            assert reasons(items) == ["row 2: not UTF-8 at byte 4 (invalid start byte)"]


def test_a_bad_row_of_views_leaves_the_others(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff", b"a good one that is longer"], pa.binary_view())
    column = pa.Array.from_buffers(pa.string_view(), 3, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    items = read(tmp_path / "a.parquet")
    assert contents(items) == ["good", "a good one that is longer"]
    assert reasons(items) == ["row 2: not UTF-8 at byte 4 (invalid start byte)"]


def test_json_lines_by_other_names(tmp_path: Path) -> None:
    """C4 and Dolma call them .json.gz, RedPajama has .zstd; .json alone is seldom text."""
    rows = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "b.jsonl.zstd").write_bytes(pa.Codec("zstd").compress(rows).to_pybytes())
    (tmp_path / "package.json").write_text('{"name": "x"}')
    for name in ("a.json.gz", "b.jsonl.zstd"):
        assert contents(read(tmp_path / name)) == ["one", "two"]
    assert paths(f"{tmp_path}/*.json.gz") == ["a.json.gz"]
    assert paths(str(tmp_path)) == ["a.json.gz", "b.jsonl.zstd"]
    (tmp_path / "c.py").write_text("code = 1")
    assert paths(str(tmp_path)) == ["b.jsonl.zstd", "c.py"]


def test_a_file_whose_name_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.txt")).write_text("text")
    with pytest.raises(DataError, match=r"gr\\xfcn\.txt: a name that is not UTF-8; rename it"):
        paths(str(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_text_in_other_encodings_is_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, kind: str
) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 20_000)
    text = "".join(f"Zeile {i} von vielen, ünd 😀\n" for i in range(2_000))
    content = text if kind == "txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (tmp_path / f"a.{kind}").write_text(content, encoding=encoding)
    items = read(tmp_path / f"a.{kind}")
    assert not reasons(items) and "".join(contents(items)) == text


def test_a_file_with_nul_bytes_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x7fELF\0\1\2 some words\0\0\3")
    assert read(tmp_path / "a.txt") == [
        LeftOut("a.txt", "has NUL bytes, as no text has (a binary file)", is_rest=True)
    ]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a\0b"}))
    assert contents(read(tmp_path / "b.jsonl")) == ["a\0b"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_array_of_json_gives_all_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int, suffix: str
) -> None:
    monkeypatch.setattr(texts, "PIECE_BYTES", 500)
    rows_ = [{"text": f"row {i} " + "x" * (i * 7 % 300)} for i in range(100)]
    with pa.output_stream(str(tmp_path / f"a.json{suffix}"), compression="detect") as stream:
        stream.write(json.dumps(rows_, indent=indent).encode())
    items = read(tmp_path / f"a.json{suffix}")
    assert contents(items) == [row["text"] for row in rows_]
    assert [item.index for item in items if isinstance(item, Text)] == list(range(100))


def test_a_table_gives_its_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one, and\nmore"\n2,two\n3,\n4\n')
    items = read(tmp_path / "a.csv")
    assert contents(items) == ["one, and\nmore", "two"]
    assert reasons(items) == ["row 4: no text in field 'text' (text_field)"]
    (tmp_path / "b.tsv").write_text("id\tbody\n1\ta, b\n")
    assert contents(read(tmp_path / "b.tsv", text_field="body")) == ["a, b"]
    assert read(tmp_path / "b.tsv") == [
        LeftOut("b.tsv", "no column 'text' (text_field); it has id, body", True, True)
    ]


# ── the sample for a tokenizer ───────────────────────────────────────────────────────────────────


def test_a_sample_is_spread_and_the_same_every_time(tmp_path: Path) -> None:
    for folder, num_files in (("small", 500), ("big", 3)):
        (tmp_path / folder).mkdir()
        for i in range(num_files):
            size = 2_000 if folder == "small" else 400_000
            (tmp_path / folder / f"{i}.txt").write_text(chr(97 + i % 26) * size)
    (tmp_path / "small" / "bad.txt").write_bytes(b"\xff")
    corpora = [found(str(tmp_path / "small")), found(str(tmp_path / "big"))]
    sample = list(sample_texts(corpora, 400_000))
    assert sample == list(sample_texts(corpora, 400_000))
    small = [text for text in sample if len(text) <= 2_000]
    big = [text for text in sample if len(text) > 2_000]
    assert 198_000 <= sum(map(len, small)) <= 202_000
    assert len({text[0] for text in small}) > 20
    assert [len(text) for text in big] == [200_000 // 3] * 3


@pytest.mark.parametrize("num_files", [1, 3, 50])
def test_a_source_whose_first_texts_cannot_be_read_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    """A wrong text_field is told before all of the source was read."""
    monkeypatch.setattr(texts, "MOST_UNREAD", 40)
    line = json.dumps({"content": "text"}) + "\n"
    for i in range(num_files):
        (tmp_path / f"{i}.jsonl").write_text(line * 2_000)
    read_ = Mock(side_effect=json.loads)
    monkeypatch.setattr(rows.json, "loads", read_)
    told = r"none of the first 40 texts can be read, such as \d+\.jsonl: line \d+: no text in field"
    with pytest.raises(DataError, match=rf"{told}.*; correct its text_field in data\.sources"):
        list(sample_texts([found(str(tmp_path))], 1_000))
    assert 40 <= read_.call_count <= 40 + num_files
    assert "text" in sample_texts([found(str(tmp_path), text_field="content")], 40)


@pytest.mark.parametrize("bad", ["not JSON\n", '{"text": null}\n', '{"body": "text"}\n'])
def test_a_source_that_begins_badly_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    """A bad file is left for another, and what follows a good text may be bad."""
    monkeypatch.setattr(texts, "MOST_UNREAD", 40)
    good = json.dumps({"text": "text"}) + "\n"
    for i in range(8):
        (tmp_path / f"{i}.jsonl").write_text(bad * 2_000)
    first = sorted(found(str(tmp_path)).files, key=lambda file: corpus.draw("sample", file.path))
    (tmp_path / first[6].path).write_text(bad * 4 + good + bad * 100 + good)
    (tmp_path / first[7].path).write_text(good)
    assert list(sample_texts([found(str(tmp_path))], 1_000)) == ["text"] * 3


def test_rows_without_a_text_are_no_wrong_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many come first; and a file left early is read on where no other has any."""
    monkeypatch.setattr(texts, "MOST_UNREAD", 40)
    good = json.dumps({"text": "text"}) + "\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "rows.jsonl").write_text('{"text": null}\n' * 100 + good)
    assert list(sample_texts([found(str(empty))], 1_000)) == ["text"]
    early = tmp_path / "early"
    early.mkdir()
    (early / "rows.jsonl").write_text('{"body": "a"}\n' * 30 + good)
    (early / "meta.jsonl").write_text('{"body": "a"}\n' * 5)
    assert list(sample_texts([found(str(early))], 1_000)) == ["text"]
