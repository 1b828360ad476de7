"""Rows of JSON however it is laid out, and of CSV."""

import io
import json
import random
from typing import Any

import pytest

from pipelines import rows
from pipelines.rows import BadRow, Row, json_rows


def values(text: str, chunk: int = 16) -> list[Any]:
    """What a JSON file gives: values, and what is said of what is none."""
    found = list(json_rows(io.BytesIO(text.encode()), chunk))
    return [row.value if isinstance(row, Row) else row.reason for row in found]


ROWS = [{"text": "one\n[2]", "n": [1, {"a": "]"}]}, {"text": "grün 😀" * 40}, {"text": ""}]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff\n [" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\n".join(map(json.dumps, ROWS)),
    ],
    ids=["array", "indented array", "array of lines", "indented objects", "lines"],
)
@pytest.mark.parametrize("chunk", [1, 7, 5_000])
def test_rows_are_the_same_however_they_are_laid_out(text: str, chunk: int) -> None:
    assert values(text, chunk) == ROWS


def test_a_value_ends_where_it_ends_wherever_reading_stops() -> None:
    draw = random.Random(0)
    numbers = [draw.choice([draw.randrange(10**9), {"a": draw.random()}]) for _ in range(200)]
    text = json.dumps([{"first": 1}, *numbers], indent=1)
    for chunk in range(1, 40):
        assert values(text, chunk)[1:] == numbers


@pytest.mark.parametrize(
    ("text", "expected", "told"),
    [
        ('[\n{"a": 1},\n{"a": 2}', 2, "an array that does not end"),
        ('[\n{"a": 1},\n{"a": }]', 1, "value 2: not JSON"),
        ('{\n"a": 1\n}\n{\n"a"', 1, "value 2: not JSON"),
        ('[{"a": 1}] x', 1, "value 2: not JSON"),
    ],
)
def test_what_does_not_end_well_is_told(text: str, expected: int, told: str) -> None:
    found = values(text)
    assert [value["a"] for value in found[:-1]] == list(range(1, expected + 1))
    assert told in found[-1]


def test_lines_of_json_are_read_one_by_one() -> None:
    """A bad one, even the first, is no reason to leave out the others."""
    assert values('{"text": "cut\n{"a": 1}\n["b"]\n')[1:] == [{"a": 1}, ["b"]]
    assert values("[1, 2]\n[3, 4]\n") == [[1, 2], [3, 4]]
    assert values("[[1], [2]]\n") == [[[1], [2]]]


def test_a_value_of_any_length_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_VALUE_BYTES", 1_000)
    found = list(json_rows(io.BytesIO(b'[{"a": "' + b"x" * 9_000), 100))
    assert found == [
        BadRow("value 1: not JSON (more than 1,000 characters without an end)", is_rest=True)
    ]
