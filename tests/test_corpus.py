"""Sources of text: which files there are, and how they are cut into units."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import corpus, errors, listing
from pipelines.corpus import (
    Corpus,
    SourceSpec,
    TextFile,
    facts,
    find_files,
    named_sources,
    plan_units,
)
from pipelines.errors import DataError
from pipelines.storage import locate
from pipelines.texts import Text, read_file, read_unit
from tests.corpora import contents, found, paths, write_parquet


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "a.txt",
        "b.md",
        "sub/c.py",
        "sub/deep/d.jsonl.gz",
        "sub/deep/e.parquet",
        "sub/f.png",
        "sub/__pycache__/g.py",
        ".git/h.txt",
        "i.dat",
    ):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "tree"


# ── names and files ──────────────────────────────────────────────────────────────────────────────


def test_every_source_gets_a_name_of_its_own() -> None:
    specs = [
        SourceSpec("python-stdlib"),
        SourceSpec("/data/books/*.txt"),
        SourceSpec("s3://bucket/web crawl/**/*.jsonl.zst?region=us-east-1"),
        SourceSpec("/other/books/"),
        SourceSpec("/x/notes.md"),
        SourceSpec("/x", name="mine"),
    ]
    names = [spec.name for spec in named_sources(specs)]
    assert names == ["python-stdlib", "books", "web-crawl", "books-2", "notes", "mine"]
    assert [spec.path for spec in named_sources(specs)] == [spec.path for spec in specs]


@pytest.mark.parametrize(
    ("specs", "told"),
    [
        ([], "no source of text"),
        ([SourceSpec("a", name="x/y")], "source name 'x/y': choose letters"),
        ([SourceSpec("a", name="units")], "source name 'units'"),
        ([SourceSpec("a", name="x"), SourceSpec("b", name="x")], "'x' is given twice"),
    ],
)
def test_bad_names_are_refused(specs: list[SourceSpec], told: str) -> None:
    with pytest.raises(DataError, match=told):
        named_sources(specs)


def test_a_folder_takes_in_text_and_nothing_hidden(tree: Path) -> None:
    expected = ["a.txt", "b.md", "sub/c.py", "sub/deep/d.jsonl.gz", "sub/deep/e.parquet"]
    assert paths(str(tree)) == paths(f"{tree}/") == paths(f"file://{tree}") == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.txt", ["a.txt"]),
        ("i.dat", ["i.dat"]),
        ("*", ["a.txt", "b.md", "i.dat"]),
        ("?.[mt]*", ["a.txt", "b.md"]),
        ("[!a].*", ["b.md", "i.dat"]),
        ("**/*.py", ["sub/c.py"]),
        ("sub/__pycache__/*.py", ["g.py"]),
        ("sub/*", ["c.py"]),
        ("**/deep/*", ["sub/deep/d.jsonl.gz", "sub/deep/e.parquet"]),
        ("sub/**", ["c.py", "deep/d.jsonl.gz", "deep/e.parquet"]),
        (".git/*", ["h.txt"]),
        (".g*/*", [".git/h.txt"]),
    ],
)
def test_globs(tree: Path, pattern: str, expected: list[str]) -> None:
    """Paths come below the pattern's fixed folder."""
    assert paths(f"{tree}/{pattern}") == expected


def test_of_others_folders_only_names_that_runs_alone_have_are_no_text(tree: Path) -> None:
    for name in ("config.yaml", "plan.json", "notes.txt"):
        (tree / "experiment" / name).parent.mkdir(exist_ok=True)
        (tree / "experiment" / name).write_text(name)
    assert "experiment/notes.txt" in paths(str(tree))


def test_a_class_of_a_glob_is_a_name_s_not_a_folder_s(tree: Path) -> None:
    (tree / "sub" / "x.txt").write_text("x")
    (tree / "sub.x.txt").write_text("x")
    assert paths(f"{tree}/**/sub[!y]*.txt") == ["sub.x.txt"]


def test_what_runs_and_preparations_wrote_is_no_text(tree: Path) -> None:
    expected = paths(str(tree))
    for name in (
        "cache/b.txt",
        "new/config.yaml",
        "new/driver.lock",
        "out/demo/config.yaml",
        "out/demo/model/card.md",
        "out/demo/metrics.jsonl",
        "out/demo/plan.json",
        "shards/a/manifest.json",
        "shards/a/preparation.json",
        "shards/a/web/train-0.parquet",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    lines: list[str] = []
    spec = named_sources([SourceSpec(str(tree))])[0]
    files = find_files(spec, (f"{tree}/cache/", str(tree), "/elsewhere"), lines.append).files
    assert [file.path for file in files] == expected
    assert lines[0] == (
        "tree: 6 files left out, in folders of runs or shards: cache/, new/, out/demo/, …"
    )
    said_by_its_own_name = ["config.yaml", "metrics.jsonl", "model/card.md"]
    assert paths(f"{tree}/out/demo") == said_by_its_own_name
    assert "out/demo/plan.json" not in paths(f"{tree}/**/*")


def test_links_in_circles_are_not_followed(tree: Path) -> None:
    expected = paths(str(tree))
    globbed = paths(f"{tree}/**/*.py")
    (tree / "sub" / "above").symlink_to(tree)
    for name in ("here", "here-too"):
        (tree / "sub" / "deep" / name).symlink_to(".")
    assert paths(str(tree)) == expected
    assert paths(f"{tree}/**/*.py") == globbed
    (tree / "other").mkdir()
    (tree / "other" / "link").symlink_to(tree / "sub" / "deep")
    linked = [f"other/link/{name}" for name in ("d.jsonl.gz", "e.parquet")]
    assert paths(str(tree)) == sorted([*expected, *linked])


@pytest.mark.parametrize(
    ("pattern", "entered"),
    [
        ("*.txt", []),
        ("*/c.py", ["other", "sub"]),
        ("s*/deep/*", ["sub", "sub/deep"]),
        ("[!o]*/**/*.py", ["sub", "sub/__pycache__", "sub/deep", "sub/deep/down"]),
        ("s*/**", ["sub", "sub/__pycache__", "sub/deep", "sub/deep/down"]),
    ],
)
def test_a_glob_looks_only_where_it_can_match(
    tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, entered: list[str]
) -> None:
    (tree / ".git" / "h.txt").unlink()
    (tree / ".git").rmdir()
    for name in ("other/there", "sub/deep/down"):
        (tree / name).mkdir(parents=True)
        (tree / name / "x.txt").write_text("x")
    looked: list[str] = []
    whole = listing._walk

    def watched(filesystem: Any, folder: str, *rest: Any) -> Iterator[Any]:
        looked.append(os.path.relpath(folder, tree))
        return whole(filesystem, folder, *rest)

    monkeypatch.setattr(listing, "_walk", watched)
    assert paths(f"{tree}/{pattern}")
    assert sorted(looked) == [".", *entered]


@pytest.mark.parametrize(
    ("path", "lost"),
    [
        ("", "3 links left out, which lead nowhere: sub/books, sub/z.txt, z.txt"),
        ("**/*.txt", "4 links left out, which lead nowhere: .git/y.txt, sub/books, sub/z.txt, …"),
        ("*.txt", "1 links left out, which lead nowhere: z.txt"),
        ("*.md", None),
        ("sub/*.p*", None),
    ],
)
def test_links_that_lead_nowhere_are_told_by_name(tree: Path, path: str, lost: str | None) -> None:
    """What they meant may have been text, or a folder of it."""
    before = paths(f"{tree}")
    for name in ("z.txt", "sub/z.txt", "sub/books", ".git/y.txt"):
        (tree / name).symlink_to("/nowhere/at/all")
    lines: list[str] = []
    find_files(named_sources([SourceSpec(f"{tree}/{path}", name="x")])[0], log=lines.append)
    assert [line for line in lines if " links left out" in line] == ([f"x: {lost}"] if lost else [])
    assert paths(f"{tree}") == before


def test_a_link_to_nowhere_whose_name_is_no_text_is_told(tree: Path) -> None:
    os.symlink(b"/nowhere", os.fsencode(tree) + b"/\xff.txt")
    lines: list[str] = []
    find_files(named_sources([SourceSpec(f"{tree}/*.txt", name="x")])[0], log=lines.append)
    assert lines == [r"x: 1 links left out, which lead nowhere: \udcff.txt"]


def test_a_name_with_brackets_that_exists_is_no_glob(tmp_path: Path) -> None:
    (tmp_path / "b[1].txt").write_text("x")
    assert paths(f"{tmp_path}/b[1].txt") == ["b[1].txt"]


@pytest.mark.parametrize(
    ("info", "told"),
    [
        ({"name": "a", "size": 3, "type": "file", "last_accessed": 5}, None),
        ({"etag": "0x8D", "last_modified": "Monday", "lease": 1}, ["etag", "last_modified"]),
        ({"ETag": "x", "Last-Modified": "Monday", "url": "u"}, ["ETag", "Last-Modified"]),
        ({"blob_id": "ab", "lfs": None, "xet_hash": None}, ["blob_id", "xet_hash"]),
        ({"modificationTime": 7}, ["modificationTime"]),
    ],
)
def test_what_storage_tells_of_a_content_is_known_by_its_name(
    info: dict[str, Any], told: list[str] | None
) -> None:
    version = listing._version(info)
    assert (list(json.loads(version)) if version else None) == told


def test_what_tells_a_time_is_known_as_it_always_was(tree: Path) -> None:
    """Another entry would be another hash, by which no shards are found."""
    assert facts(Corpus("x", "/x", "text", (TextFile("a.txt", 3, 17),))) == {
        "name": "x",
        "root": "/x",
        "text_field": "text",
        "files": ({"path": "a.txt", "size": 3, "modified_ns": 17, "row_groups": None},),
    }
    assert all(file.version is None and file.modified_ns for file in found(str(tree)).files)


class Unavailable(Exception):
    """What a client of an object store raises."""


@pytest.mark.parametrize(("request_", "told"), [("info", "reached"), ("find", "listed")])
def test_storage_that_does_not_answer_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, request_: str, told: str
) -> None:
    locate("memory://texts/here")[0].create_dir("texts/here")
    refused = Mock(side_effect=Unavailable("503\nslow down"))
    monkeypatch.setattr(MemoryFileSystem, request_, refused)
    with pytest.raises(errors.Unreadable, match=rf"cannot be {told} \(503 slow down\)$"):
        found("memory://texts/here")


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the files in tmp_path; of what `chunked` names, without a size."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

        def send_header(self, name: str, value: str) -> None:
            if not ("chunked" in self.path and name == "Content-Length"):
                super().send_header(name, value)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_with_a_query_is_read_from_where_it_says(tmp_path: Path, website: str) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "a.jsonl").write_text(json.dumps({"text": "the text"}))
    source = found(f"{website}/dir/a.jsonl?download=true&part=1/2")
    assert source.root == f"{website}/dir?download=true&part=1/2"
    assert [file.path for file in source.files] == ["a.jsonl"]
    assert contents(list(read_file(source.root, source.files[0], "text"))) == ["the text"]


def test_a_page_of_unknown_length_is_not_called_empty(tmp_path: Path, website: str) -> None:
    (tmp_path / "chunked.txt").write_text("text")
    with pytest.raises(DataError, match=r"chunked\.txt: its server does not say how long it is"):
        found(f"{website}/chunked.txt")


@pytest.mark.parametrize("name", ["c#", "b[1]", "a%20b#c"])
def test_a_local_address_is_that_of_its_whole_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("another text")
    (tmp_path / unquote(name)).mkdir()
    (tmp_path / unquote(name) / "a.txt").write_text("the text")
    source = found(f"file://{tmp_path}/{name}")
    assert contents(list(read_file(source.root, source.files[0], "text"))) == ["the text"]


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("file:///tmp/q?x", r"no '\?' can be in such an address; name the path without file://"),
        ("http://127.0.0.1:1/c#/a.txt", "what follows '#' is never asked for; write %23"),
    ],
)
def test_an_address_of_which_a_part_would_be_dropped_is_refused(address: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        found(address)


def test_a_file_in_no_folder_is_told() -> None:
    """Its folder's address would be a local path."""
    MemoryFileSystem().pipe_file("/top.txt", b"text")
    with pytest.raises(DataError, match=r"source memory://top\.txt: is no file in a folder"):
        found("memory://top.txt")


@pytest.mark.parametrize("name", ["x/[ab]*.txt", "x#/a.txt", "x#y[1]"])
def test_an_object_s_name_may_hold_what_arrow_takes_for_syntax(name: str) -> None:
    """With the region given, no server is asked."""
    assert locate(f"s3://bucket/{name}?region=us-east-1")[1] == f"bucket/{name}"
    assert locate(f"gs://bucket/{name}")[1] == f"bucket/{name}"


def test_an_address_is_a_source_too() -> None:
    filesystem, inner = locate("memory://texts/here")
    filesystem.create_dir(f"{inner}/sub")
    for name in ("a.txt", "sub/b.txt"):
        with filesystem.open_output_stream(f"{inner}/{name}") as stream:
            stream.write(name.encode())
    for path in ("memory://texts/here", "memory://texts/here/**/*.txt"):
        source = found(path)
        assert [file.path for file in source.files] == ["a.txt", "sub/b.txt"]
        assert [contents(list(read_file(source.root, file, "text"))) for file in source.files] == [
            ["a.txt"],
            ["sub/b.txt"],
        ]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nowhere", "nowhere: not found; correct the path"),
        ("*.rtf", "matches no files of text; name a file, or a glob"),
        ("sub/__pycache__/g.py/x", "not found|cannot be reached"),
        ("empty", "all its 1 files are empty"),
        ("only_pictures", "matches no files of text"),
        ("[z-a]*.txt", r"is no pattern \(bad character range z-a .*; correct the brackets"),
        ("[z-a]*/*.txt", r"is no pattern \(bad character range z-a .*; correct the brackets"),
    ],
)
def test_sources_without_text_are_refused(tree: Path, path: str, told: str) -> None:
    (tree / "empty").mkdir()
    (tree / "empty" / "x.txt").touch()
    (tree / "only_pictures").mkdir()
    (tree / "only_pictures" / "x.png").write_text("x")
    with pytest.raises(DataError, match=told) as error:
        found(f"{tree}/{path}")
    assert "\n" not in str(error.value)


def test_the_standard_library_is_a_source() -> None:
    source = found("python-stdlib")
    names = {file.path for file in source.files}
    assert {"os.py", "asyncio/tasks.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not any("-packages/" in name or "__pycache__" in name for name in names)
    assert source == found("python-stdlib")
    assert source.size > 5e6


# ── units of work ────────────────────────────────────────────────────────────────────────────────


def made_up(sizes: list[int], name: str = "f") -> Corpus:
    files = (TextFile(f"{name}{i:04d}.txt", size, i) for i, size in enumerate(sizes))
    return Corpus("made", "/made", "text", tuple(files))


SIZES = [(i * 7919) % 300_000 + 1 for i in range(1000)]


def test_units_hold_every_file_once_in_order() -> None:
    source = made_up(SIZES)
    units = plan_units(source, 512)
    assert tuple(file for unit in units for file in unit.files) == source.files
    target = 16 * 2**20  # the power of two below an eighth of 150 MB
    assert max(unit.size for unit in units) < 2 * target + 300_000
    assert 5 <= len(units) <= 25


def test_a_big_file_is_a_unit_of_its_own() -> None:
    units = plan_units(made_up([10, 10, 50_000_000, 10, 10]), 512)
    assert [len(unit.files) for unit in units] == [2, 1, 2]


def test_a_changed_file_leaves_the_other_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_UNIT_BYTES", 2**20)
    source = made_up(SIZES)
    before = plan_units(source, 512)
    assert len(before) > 100
    for changed in range(0, 1000, 37):
        files = list(source.files)
        files[changed] = replace(files[changed], size=files[changed].size + 9999, modified_ns=-1)
        files.insert(changed + 1, TextFile(f"f{changed:04d}b.txt", 300_000, 0))
        after = plan_units(replace(source, files=tuple(files)), 512)
        assert 1 <= len(set(before) - set(after)) <= 8


def test_a_big_parquet_file_is_split_by_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "MIN_UNIT_BYTES", 1000)
    monkeypatch.setattr(corpus, "MAX_UNIT_BYTES", 1000)
    documents = [f"document {i} " * (1 + i % 9) for i in range(100)]
    write_parquet(tmp_path / "a.parquet", documents, rows_per_group=7)
    units = plan_units(found(f"{tmp_path}/*.parquet"), 512)
    assert len(units) > 4
    read = [text for unit in units for text in read_unit(unit)]
    assert contents(read) == documents
    assert [text.index for text in read if isinstance(text, Text)] == list(range(100))
