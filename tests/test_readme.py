"""The README tells the truth: its commands parse, its settings are all, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tst_ray.cli import _parse
from tst_ray.config import load_config
from tst_ray.reference import settings_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command of every shell block, without its comment and its ellipsis."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            if words:
                found.append(words)
    return found


def test_there_are_commands_to_check() -> None:
    programs = {words[0].rsplit("/", 1)[-1] for words in commands()}
    assert programs == {"make", "tst-ray", "ray", "tensorboard", "python"}


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "make"], ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


OURS = [w[w.index("tst_ray.run") :] if "tst_ray.run" in w else w[1:] for w in commands()
        if w[0] == "tst-ray" or "tst_ray.run" in w]  # fmt: skip


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_our_commands_are_accepted(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`{…, ...}` in an inline config stands for more fields; the rest must load as printed."""
    (mine,) = [block for block in blocks("yaml") if "# mine.yaml" in block]
    (tmp_path / "mine.yaml").write_text(mine)
    monkeypatch.chdir(tmp_path)
    words = ["run" if word == "tst_ray.run" else word.replace(", ...", "") for word in words]
    args = _parse(words)
    if args.takes_overrides:
        load_config(args.config, args.overrides)


def test_every_setting_is_in_the_table() -> None:
    start, end = "<!-- settings -->\n", "\n<!-- /settings -->"
    table = README[README.index(start) + len(start) : README.index(end)]
    assert table == settings_table(), "put the output of `tst-ray settings` there"


def test_files_it_names_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:pipelines|tst_ray|cluster|tests)/[\w/.-]+)`", README):
        assert (ROOT / path).exists(), path
