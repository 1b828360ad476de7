"""Which settings a user wrote, and where: on the command line or in a file. The rest are defaults.

load ──> Origins ──> of(path)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tst_ray.config import leaves, read_settings
from tst_ray.settings import DEMO_MODEL, spell_out_model

COMMAND_LINE, DEFAULT = "command line", "default"
_SIZES = ("hidden_size", "num_attention_heads")
_OF_HEADS = ("head_dim", "num_key_value_heads")  # they follow from these sizes (derived_fields.py)


@dataclass(frozen=True)
class Origins:
    """Where the settings of a configuration come from.

    Attributes:
        written: the value of each setting that was written and where it stands, by dotted path.
        model_base: the model whose configuration model.config changes; None where it is whole.
    """

    written: dict[str, tuple[Any, str]] = field(default_factory=dict)
    model_base: str | None = DEMO_MODEL

    def of(self, path: str) -> str:
        """Where a setting comes from."""
        return self.written[path][1] if path in self.written else DEFAULT

    def of_model_field(self, name: str) -> str:
        """Where a field of the model's configuration comes from."""
        if (path := f"model.config.{name}") in self.written:
            return self.of(path)
        if (
            self.model_base
            and name in _OF_HEADS
            and any(f"model.config.{size}" in self.written for size in _SIZES)
        ):
            return "hidden_size and num_attention_heads"
        return f"{self.model_base} ({self.of('model.source')})" if self.model_base else DEFAULT


def find_origins(path: str | None, overrides: Sequence[str]) -> Origins:
    """The origins of what `load_config` gives for the same arguments."""
    raw, _ = read_settings(path, overrides)
    names = [text.removeprefix("--").partition("=")[0] for text in overrides]
    if "model" in raw:
        raw["model"] = spell_out_model(raw["model"])
    written = {}
    for keys, value in leaves(raw) if raw else ():
        dotted = ".".join(map(str, keys))
        said = any(dotted == name or dotted.startswith(f"{name}.") for name in names)
        written[dotted] = value, COMMAND_LINE if said else str(path)
    return Origins(written, _base(raw.get("model")))


def _base(model: Any) -> str | None:
    """The model that a section starts from; None where its configuration is whole."""
    section = model if isinstance(model, dict) else {}
    if "model_type" in (section.get("config") or {}):
        return None
    return str(section.get("source") or DEMO_MODEL)
