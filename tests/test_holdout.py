"""What is held out for validation: sections of documents, evenly through the text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from pipelines.corpus import PYTHON_STDLIB, SourceSpec, find_files, named_sources
from pipelines.holdout import hold_out, section_span
from pipelines.texts import Text

LINES = [f"line {i} of a text\n" for i in range(4_000)]


def as_pieces(content: str, size: int, path: str = "a.txt") -> list[Text]:
    """A document in pieces, as texts.py gives it."""
    starts = range(0, len(content), size)
    return [
        Text(path, 0, content[s : s + size], len(content[s : s + size]), s + size >= len(content))
        for s in starts
    ]


def split(texts: list[Text], share: float, span: int = 512, name: str = "unit") -> list[list[str]]:
    """The documents of [training, validation]: what is between two ends of text."""
    documents: dict[str, list[str]] = {"train": [], "validation": []}
    pending = {"train": "", "validation": ""}
    for name_of_split, text in hold_out(texts, share, span, name):
        assert text.num_bytes == len(text.content.encode())
        pending[name_of_split] += text.content
        if text.ends_document:
            documents[name_of_split].append(pending[name_of_split])
            pending[name_of_split] = ""
    assert not any(pending.values()), "a document without an end"
    return list(documents.values())


@pytest.mark.parametrize("size", [200, 700, 1 << 20])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_every_character_is_in_one_split_and_every_document_ends(size: int, share: float) -> None:
    """Whatever pieces a long document comes in."""
    whole = "".join(LINES)
    train, held_out = split(as_pieces(whole, size), share)
    assert sorted("".join(train + held_out)) == sorted(whole)
    assert all(document in whole for document in train + held_out)
    assert not set(train) & set(held_out)
    assert "" not in train and "" not in held_out
    assert sum(map(len, held_out)) / len(whole) == pytest.approx(share, abs=0.06)


def test_sections_end_after_a_line_or_a_word_if_they_can() -> None:
    train, held_out = split(as_pieces("".join(LINES), 1 << 20), 0.1)
    assert all(document.endswith("\n") for document in train + held_out)
    assert all(256 < len(document) <= 512 for document in held_out)
    words = split(as_pieces("word " * 5_000, 1 << 20), 0.1)
    assert all(document.endswith("word ") for document in words[1])
    no_words = split(as_pieces("x" * 50_000, 1 << 20), 0.1)
    assert {len(document) for document in no_words[1]} == {512}


def test_short_documents_stay_whole() -> None:
    texts = [Text("web.jsonl", i, f"document {i:03}", 12, True) for i in range(1_000)]
    train, held_out = split(texts, 0.02)
    assert sorted(train + held_out) == sorted(text.content for text in texts)
    assert len(held_out) == 20


def test_sections_are_held_out_evenly_and_by_the_units_name() -> None:
    texts = [Text("web.jsonl", i, str(i), len(str(i)), True) for i in range(10_000)]
    draws = [[int(text) for text in split(texts, 0.02, name=name)[1]] for name in "ab"]
    assert draws[0] != draws[1]
    for held_out in draws:
        assert [len(list(group)) for _, group in groupby(held_out, lambda n: n // 50)] == [1] * 200
        assert len(set(np.array(held_out) % 50)) > 30  # another one of each fifty
    assert split(texts, 0.02, name="a")[1] == [str(number) for number in draws[0]]
    assert split(texts, 0.0)[1] == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_unreadable_rest_ends_the_document_once(share: float) -> None:
    """texts.py ends a document whose rest is lost with a text of nothing."""
    readable = as_pieces("".join(LINES[:500]), 900)[:-1]
    end = Text("a.txt", 9, "", 0, ends_document=True)
    train, held_out = split([*readable, end, Text("b.txt", 0, "another", 7)], share)
    assert "another" in train + held_out
    assert "" not in train


def test_a_section_is_long_in_a_large_source_and_seldom_changes() -> None:
    assert section_span(31_000_000, 0.02) == 512
    assert section_span(10**9, 0.02) == 8_192
    assert section_span(10**9 + 10**7, 0.02) == 8_192
    assert section_span(10**13, 0.02) == 1 << 19


def test_five_draws_of_the_demos_text_give_one_model_the_same_loss() -> None:
    """The model predicts a byte from the one before it; its losses differ from text to text, too.

    Five draws of whole files lie much further apart.
    """
    source = find_files(named_sources([SourceSpec(PYTHON_STDLIB)])[0])
    paths = [f"{source.root}/{file.path}" for file in source.files]
    contents = [Path(path).read_text("utf-8", errors="ignore") for path in paths]
    losses = bigram_losses(contents)

    def loss(texts: Iterable[str]) -> float:
        return losses[pairs("".join(texts))].mean()

    whole = [Text(path, 0, content, 0) for path, content in zip(paths, contents, strict=True)]
    span = section_span(source.size, 0.04)
    draws = [
        loss(text.content for split, text in hold_out(whole, 0.04, span, name) if split != "train")
        for name in "abcde"
    ]
    of_files = [loss(contents[start::25]) for start in range(5)]
    assert np.ptp(draws) < 0.02
    assert np.ptp(of_files) > 3 * np.ptp(draws)


def pairs(text: str) -> np.ndarray:
    """Each byte with the one before it, as one number."""
    raw = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    return raw[:-1] * 256 + raw[1:]


def bigram_losses(contents: list[str]) -> np.ndarray:
    """Nats of each pair of bytes, by a model fitted on all of the text."""
    counts = np.bincount(pairs("".join(contents)), minlength=1 << 16).reshape(256, 256) + 1.0
    return -np.log(counts / counts.sum(axis=1, keepdims=True)).ravel()
