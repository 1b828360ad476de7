"""What people read about the config: every field, with its default and meaning."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from tst_ray.settings import Config


def settings_table() -> str:
    """Every field of the config with its default and meaning, as a Markdown table."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for section, section_field in Config.model_fields.items():
        fields = getattr(section_field.annotation, "model_fields", None)
        if fields is None:
            rows.append(f"| `{section}` | none | {_cell(section_field.description)} |")
            continue
        defaults = getattr(Config(), section).model_dump(mode="json", by_alias=True)
        for name, field in fields.items():
            name = field.alias or name
            default = _default_words(defaults[name], f"{section}.{name}")
            meaning = _cell(field.description) + _choices(field.annotation)
            rows.append(f"| `{section}.{name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _choices(annotation: Any) -> str:
    """The values that a field takes, where they are few."""
    if get_origin(annotation) is not Literal:
        return ""
    return f" ({', '.join(f'`{value}`' for value in get_args(annotation))})"


def _cell(text: str | None) -> str:
    """Text for a Markdown table: angle brackets would be taken for HTML."""
    return (text or "").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


def _default_words(value: Any, path: str) -> str:
    if path == "model.config":
        return "`demo-0.4m`"
    if path == "data.sources":
        return "`[python-stdlib]`"
    return "" if value in (None, {}, []) else f"`{json.dumps(value)}`"
