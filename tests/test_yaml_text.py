"""Settings' YAML: what a few lines may stand for, and what is said of the rest."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from tst_ray.cli import main
from tst_ray.yaml_text import read_yaml


def bomb(depth: int = 8, width: int = 9, merged: bool = False) -> str:
    """Lists (or mappings, merged) of `width` aliases of the one before: width^depth values."""
    lines = ["a0: &a0 {x: 1}" if merged else "a0: &a0 [x]"]
    for level in range(1, depth + 1):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        what = f"{{<<: [{aliases}]}}" if merged else f"[{aliases}]"
        lines.append(f"a{level}: &a{level} {what}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("merged", [False, True])
def test_aliases_that_stand_for_too_much_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], merged: bool
) -> None:
    file = tmp_path / "bomb.yaml"
    file.write_text(bomb(merged=merged))
    started = time.process_time()
    assert main(["plan", "--config", str(file)]) == 2
    assert time.process_time() - started < 1.0
    said = capsys.readouterr().err
    assert "not valid YAML: aliases stand for more than 100,000 values" in said
    assert said.count("\n") == 1 and f"{file}, line " in said


def test_a_bomb_in_an_override_or_in_a_runs_own_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = "{" + bomb().strip().replace("\n", ", ") + "}"
    assert main(["plan", f"--model.config={flow}"]) == 2
    assert "aliases stand for" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(bomb())
    (tmp_path / "plan.json").write_text("{}")
    capsys.readouterr()
    assert main(["export", str(tmp_path)]) == 1
    assert "aliases stand for more than" in capsys.readouterr().err


def test_ordinary_aliases_are_taken() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, x: 2}\n"
    assert read_yaml(text, "x") == {
        "a": {"x": 1, "y": [1, 2]},
        "b": {"x": 1, "y": [1, 2]},
        "c": {"x": 2, "y": [1, 2]},
    }
    shared = [1, 2]
    dumped = yaml.safe_dump({"a": shared, "b": shared})
    assert "*" in dumped
    assert read_yaml(dumped, "x", as_people_mean_it=False) == {"a": [1, 2], "b": [1, 2]}


def test_a_long_text_without_aliases_is_taken_and_read_in_time() -> None:
    text = "".join(f"name-{number}: {number}\n" for number in range(60_000))
    started = time.process_time()
    assert len(read_yaml(text, "x")) == 60_000
    assert time.process_time() - started < 60  # a check of each key against all would take longer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "x, line 1: not valid YAML: an alias inside of itself"),
        ("[" * 5000, "x: not valid YAML: it is nested too deeply"),
        ("a: " + "1" * 5000, "not valid YAML: Exceeds the limit"),
        ("!!bool x", "x: not valid YAML: "),
        ("!!timestamp x", "x: not valid YAML: "),
        ("!!int ''", "x: not valid YAML: "),
        ("!!python/object/apply:os.mkdir [evil]", "could not determine a constructor for the tag"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_line(text: str, said: str) -> None:
    for as_people_mean_it in (True, False):
        with pytest.raises(ValueError) as refused:
            read_yaml(text, "x", as_people_mean_it)
        assert said in str(refused.value) and "\n" not in str(refused.value)
