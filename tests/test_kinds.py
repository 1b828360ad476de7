"""Which files a source takes in, by their names, and what is told of the others."""

from pathlib import Path

import pytest

from pipelines.corpus import SourceSpec, find_files, named_sources
from pipelines.errors import BadInput
from pipelines.kinds import CARD, ENDING, HIDDEN, IS_NO_TEXT, UNFINISHED, in_folder, in_glob
from tests.corpora import found


def taken(*paths: str) -> list[str]:
    return [path for path, reason in in_folder(paths).items() if reason is None]


def test_a_cloned_data_set_gives_its_data_and_not_its_card() -> None:
    reasons = in_folder(
        ["README.md", "LICENSE.txt", ".gitattributes", "en/c4.00000.json.gz", "en/more.jsonl.xz",
         "en/index.csv", "en/README.md", "noise.arrow"]
    )  # fmt: skip
    assert reasons == {
        "README.md": CARD,
        "LICENSE.txt": CARD,
        ".gitattributes": HIDDEN,
        "en/c4.00000.json.gz": None,
        "en/more.jsonl.xz": None,
        "en/index.csv": ENDING,
        "en/README.md": CARD,
        "noise.arrow": ENDING,
    }


@pytest.mark.parametrize(
    "paths",
    [
        ["README.md"],
        ["README.md", "notes/a.md"],
        ["README.md", "src/a.py", "tests/data.jsonl"],
        ["docs/license.rst", "docs/a.txt", "docs/b.jsonl"],
        ["README.md", "picture.png"],
    ],
)
def test_a_readme_of_text_or_code_is_text(paths: list[str]) -> None:
    assert paths[0] in taken(*paths)


def test_compressed_json_is_taken_unless_code_lies_beside_it() -> None:
    assert taken("en/a.json.gz", "b.json.zst", "b.json", "load.txt") == [
        "en/a.json.gz", "b.json.zst", "load.txt"]  # fmt: skip
    assert taken("a.json.gz", "load.py", "en/b.json.gz") == ["load.py", "en/b.json.gz"]


SPARK = [
    "part-0.parquet", "_SUCCESS", "_metadata", "_common_metadata", "year=1/part-1.jsonl.gz",
    "_temporary/0/task_1/part-0.parquet", "_temporary/0/a.txt", "_delta_log/0.json",
    "_spark_metadata/0", "_x.jsonl", ".part-0.parquet.crc", ".hidden/a.txt",
]  # fmt: skip


def test_what_spark_keeps_beside_its_output_is_not_read() -> None:
    expected = ["part-0.parquet", "year=1/part-1.jsonl.gz"]
    assert taken(*SPARK) == expected
    for pattern in ("**", "*/**"):
        found_ = in_glob(SPARK, pattern)
        assert [path for path, reason in found_.items() if reason is None] == expected
    assert {in_folder(SPARK)[path] for path in SPARK[5:10]} == {UNFINISHED}


def test_names_with_an_underscore_in_source_code_are_read() -> None:
    code = ["a/__init__.py", "_private.py", "_posts/2020-01-01.md", "a/_internal/b.h"]
    assert taken(*code) == code
    assert set(in_glob(code, "**/*").values()) == {None}


def test_a_pattern_that_names_such_files_means_them() -> None:
    assert in_glob(["_x.jsonl", "b.jsonl"], "_*.jsonl")["_x.jsonl"] is None
    assert in_glob([".h/x.txt"], ".h/*") == {".h/x.txt": None}
    assert in_glob(["a.pdf", "a.dat", "a.tar.gz"], "*") == {
        "a.pdf": IS_NO_TEXT, "a.dat": None, "a.tar.gz": IS_NO_TEXT}  # fmt: skip


def listed(path: str) -> tuple[list[str], list[str]]:
    """The files of a source, and what is told of the others."""
    lines: list[str] = []
    source = find_files(named_sources([SourceSpec(path, name="x")])[0], log=lines.append)
    return [file.path for file in source.files], lines


def test_what_is_not_taken_in_is_told_with_its_size_and_endings(tmp_path: Path) -> None:
    for name in ("a.jsonl", "README.md", "b.json", "c/b.json", "d.pdf", "_SUCCESS", "_x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * 500_000)
    files, lines = listed(str(tmp_path))
    assert files == ["a.jsonl"]
    assert sorted(lines) == [
        "x: 1 files left out (0.5 MB), which describe the data beside them (.md 1), such as "
        "README.md",
        "x: 2 files left out (1.0 MB), which Spark or Hadoop keeps beside its output (no ending 1, "
        ".jsonl 1), such as _SUCCESS",
        "x: 3 files left out (1.5 MB), which a folder's name does not take in (.json 2, .pdf 1), "
        f"such as b.json; to train on them, name them too: {tmp_path}/**/*.json",
    ]
    assert listed(f"{tmp_path}/**/*.json") == (["b.json", "c/b.json"], [])


def test_a_source_of_which_nothing_is_taken_in_says_what_there_is(tmp_path: Path) -> None:
    for name in ("README.md", "a.zip", "b.pdf"):
        (tmp_path / name).write_text("x")
    with pytest.raises(
        BadInput, match=r"data\.sources = .*: matches no files of text; 2 files left"
    ):
        found(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.pdf", "is no file of text; convert it to text first"),
        ("A.PNG", "is no file of text; name files of text"),
        ("a.tar.gz", "is no file of text; unpack it, or compress each file with gzip, zstd"),
        ("a.jsonl.7z", "is no file of text; unpack it"),
        ("a.arrow", "is no file of text; convert it to JSON Lines or Parquet first"),
        ("*.docx", r"matches no files of text; 1 files left out .* convert it to text first"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name.replace("*", "b")).write_text("x")
    with pytest.raises(BadInput, match=told) as error:
        found(f"{tmp_path}/{name}")
    assert str(error.value).startswith(f"data.sources = {tmp_path}/{name}: ")
    assert error.value.exit_status == 2
