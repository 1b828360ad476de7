"""From a file and overrides to a checked `Config`, or to every reason why not.

    YAML file (or the name of a shipped one) + `--section.field=value` overrides
      → one mapping → typed sections (settings.py) → checks across them (checks.py) → `Config`

A `Config` is resolved: what the run directory keeps as config.yaml reads back as the same `Config`
whatever later versions ship. Everything wrong is reported at once, in one `ConfigError`, a line
each: `path = value: what is wrong; remedy`.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.addresses import REMEDY, masked
from tst_ray.checks import Problem, SettingPath, dotted, problems
from tst_ray.errors import ConfigError
from tst_ray.settings import SHIPPED, Config, PhaseConfig, SourceConfig, spell_out_model
from tst_ray.yaml_text import read_yaml

MAY_CHANGE = (
    "run.storage",  # the run directory may have been moved
    "cluster.*",  # results don't depend on who computes them …
    "tst.workers",
    "phases.*.workers",  # … nor on how many
    "data.cache",
    "data.prepared",  # shards may move; their fingerprint says whether they are the same
    "train.micro_batch_size",  # how a batch is computed, not what is computed
    "train.compile",
    "train.activation_checkpointing",
    "train.reshard",
    "train.threads",
    "checkpoint.*",
    "metrics.*",
    "fault.*",
)
"""What may differ between a run and the command that resumes it; patterns of dotted paths."""

_REPLACES = {
    ("phases",): ("tst",),
    ("data", "prepared"): ("data", "sources"),
    ("data", "sources"): ("data", "prepared"),
}
"""Two spellings of one thing: an override of the first drops what the file says by the second."""


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a YAML file or the name of a shipped one ("paper-270m"); None is the demo.
        overrides: `--section.field=value`, the value in YAML; of two for the same the last one
            wins, and one for more of a section (`--model`) leaves those for its fields, in either
            order.

    Raises:
        ConfigError: with everything that is wrong, a line each.
    """
    raw, failures = read_settings(path, overrides)
    return parse_config(raw, failures)


def read_settings(path: str | None, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a file and overrides say, unchecked, and what is wrong with the overrides' form.

    Raises:
        ConfigError: the file cannot be read.
    """
    raw = _read_file(path) if path is not None else {}
    failures = [line for line in (_override(raw, text) for text in _in_order(overrides)) if line]
    return raw, failures


def _in_order(overrides: Sequence[str]) -> list[str]:
    """Section after section as they are first named; of each, what names more of it first."""
    names = [text.removeprefix("--").partition("=")[0].split(".") for text in overrides]
    sections = [name[0] for name in names]
    keys = [(sections.index(name[0]), len(name)) for name in names]
    return [text for _, text in sorted(zip(keys, overrides, strict=True), key=lambda pair: pair[0])]


def parse_config(raw: Mapping[str, Any], failures: Sequence[str] = ()) -> Config:
    """Check a mapping, such as `Config.dump()` made.

    Args:
        raw: sections and their fields.
        failures: what is already known to be wrong, to be reported with the rest.

    Raises:
        ConfigError: with everything that is wrong, a line each.
    """
    lines = [masked(line) for line in failures]
    raw = _masked(raw, lines)  # so that no other line shows a secret
    try:
        config = Config.model_validate(raw)
        lines += [_line(problem, config.dump()) for problem in problems(config)]
    except ValidationError as error:
        details = error.errors()
        bad = [detail["loc"] for detail in details]
        # A list with a bad item is called too short as well.
        lines += [_explain(d) for d in details if not any(_inside(d["loc"], path) for path in bad)]
        lines += _problems_elsewhere(raw, bad)
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return config


def _masked(value: Any, lines: list[str], path: SettingPath = ()) -> Any:
    """Settings in which no address has a secret; `lines` gets a line for each that had one."""
    if isinstance(value, Mapping):
        return {key: _masked(below, lines, (*path, key)) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_masked(item, lines, (*path, n)) for n, item in enumerate(value))
    if not isinstance(value, str) or (shown := masked(value)) == value:
        return value
    lines.append(f"{dotted(path)} = {_show(shown)}: {REMEDY}")
    return shown


def diff(run: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a run's configuration and this one, apart from `MAY_CHANGE`.

    Args:
        run, now: what `Config.dump()` made.

    Returns:
        Lines such as "train.batch_size: run has 16, now 32"; none if one may resume the other.
    """
    before, after = dict(leaves(run)), dict(leaves(now))
    lines = []
    for path in dict.fromkeys([*before, *after]):
        plain = ".".join(map(str, path))
        if any(fnmatch.fnmatchcase(plain, pattern) for pattern in MAY_CHANGE):
            continue
        if before.get(path) != after.get(path):
            was, is_ = (_show(leaves.get(path)) for leaves in (before, after))
            lines.append(f"{dotted(path)}: run has {was}, now {is_}")
    return lines


def shipped_configs() -> tuple[str, ...]:
    """The names of the shipped configurations."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


# ---- reading -----------------------------------------------------------------------------------


def _read_yaml(text: str, where: str) -> Any:
    try:
        return read_yaml(text, where)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read_file(path: str) -> dict[str, Any]:
    file = Path(os.path.expanduser(path))  # pathlib's raises where nobody has that home
    if not file.is_file():
        file = SHIPPED / f"{path}.yaml"
    if not file.is_file():
        names = shipped_configs()
        raise ConfigError(
            f"--config = {_show(path)}: no such file, nor a shipped configuration of that name"
            f"{_nearest(path, names)}; shipped are {', '.join(names)}"
        )
    try:
        raw = _read_yaml(file.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config = {_show(path)}: cannot be read: {error}") from None
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"--config = {_show(path)}: must hold sections such as `train:`")
    return raw or {}


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Set one field in `raw`; says what is wrong with the override, if anything."""
    name, equals, value_text = text.removeprefix("--").partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        return f"{text}: not an override; write --section.field=value"
    try:
        value = _read_yaml(value_text, f"--{name}")
    except ConfigError as error:
        return str(error)
    if "model" in raw:
        raw["model"] = spell_out_model(raw["model"])
    node = raw
    for depth, key in enumerate(keys[:-1]):
        below = node.get(key)
        if below is not None and not isinstance(below, dict):
            return f"{text}: {'.'.join(keys[: depth + 1])} has no fields; give it whole"
        node[key] = node = dict(below or {})
    node[keys[-1]] = value
    if value is not None and (other := _REPLACES.get(tuple(keys))):
        parent = raw if len(other) == 1 else raw[other[0]]
        parent.pop(other[-1], None)
    return None


# ---- reporting -----------------------------------------------------------------------------------


def _problems_elsewhere(raw: Mapping[str, Any], bad: Sequence[SettingPath]) -> Iterator[str]:
    """Checks across the fields that are well-formed, where others are not."""
    try:
        config = Config.model_validate(_without(raw, bad))
    except ValidationError:
        return  # a required field is among them
    for problem in problems(config):
        involved = (problem.path, *problem.about)
        if not any(_overlap(path, fault) for path in involved for fault in bad):
            yield _line(problem, config.dump())


def _inside(outer: SettingPath, path: SettingPath) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def _overlap(one: SettingPath, other: SettingPath) -> bool:
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _without(raw: Any, paths: Sequence[SettingPath]) -> Any:
    """`raw` less the settings at `paths`; a list that holds one goes as a whole."""
    here = {path[0] for path in paths if len(path) == 1}
    if not isinstance(raw, Mapping):
        return raw
    kept = {}
    for key, value in raw.items():
        below = [path[1:] for path in paths if len(path) > 1 and path[0] == key]
        if key in here or (below and not isinstance(value, Mapping)):
            continue
        kept[key] = _without(value, below)
    return kept


# ---- wording -----------------------------------------------------------------------------------

_WRONG = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text, in quotes if it looks like a number",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping of fields",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:,}",
    "finite_number": "must be finite",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must start with a letter or digit, and hold only those, . _ and -",
    "value_error": "{error}",
    "missing": "is not given",
}
"""pydantic's kinds of errors, in our words."""


def _explain(detail: ErrorDetails) -> str:
    """One of pydantic's errors as a line."""
    path, kind, value = detail["loc"], detail["type"], detail["input"]
    section, field = _field_at(path)
    given = dotted(path) if kind == "missing" else f"{dotted(path)} = {_show(value)}"
    if kind == "extra_forbidden":
        return f"{given}: no such field{_suggest(path, section)}"
    if kind == "literal_error":
        expected = detail["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{given}: must be one of {expected}{_nearest(str(value), expected.split(', '))}"
    wrong = _WRONG.get(kind, detail["msg"]).format(**detail.get("ctx", {}))
    means = "" if field is None or kind == "value_error" else f"; it is {field}"
    return f"{given}: {wrong}{means}"


def _field_at(path: SettingPath) -> tuple[type[BaseModel], str | None]:
    """The section that holds the field at `path`, and what the field is."""
    section: type[BaseModel] = Config
    for key in path[:-1]:
        section = _SECTIONS.get(key, section) if isinstance(key, str) else section
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    field = fields.get(str(path[-1])) if path else None
    return section, field.description if field else None


_SECTIONS: dict[str, Any] = {
    **{name: field.annotation for name, field in Config.model_fields.items()},
    "phases": PhaseConfig,
    "sources": SourceConfig,
}


def _names(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _suggest(path: SettingPath, section: type[BaseModel]) -> str:
    """The nearest name in the same section, or the same name in another one."""
    name = str(path[-1])
    near = difflib.get_close_matches(name, _names(section), 1)
    if near:
        return f"; did you mean {dotted((*path[:-1], near[0]))}?"
    for other in Config.model_fields:
        if other in _SECTIONS and other != "phases" and name in _names(_SECTIONS[other]):
            return f"; did you mean {other}.{name}?"
    where = dotted(path[:-1]) or "a configuration"
    return f"; {where} has {', '.join(_names(section))}"


def _nearest(value: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, names, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _line(problem: Problem, dump: Any) -> str:
    value = dump
    for key in problem.path:
        value = value[key]
    return f"{dotted(problem.path)} = {_show(value)}: {problem.text}"


def _show(value: Any) -> str:
    text = masked(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else f"{text[:77]}…"


def leaves(value: Any, path: SettingPath = ()) -> Iterator[tuple[SettingPath, Any]]:
    """Every single value in a tree of mappings and lists of mappings."""
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from leaves(item, (*path, number))
    else:
        yield path, value
