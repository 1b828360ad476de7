"""The JSON files of a model folder, as transformers 5 and 4 both read them.

    config.json             beside the new spellings of fields, the older ones
    tokenizer_config.json   names that both versions know
    generation_config.json  the source's own, if the run began with a source's weights

transformers 5 writes what only it reads: version 4 takes a model for one with the default rotary
positions, and finds no class for the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_GLOBAL_THETA = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_LOCAL_THETA = ("rope_local_base_freq", "local_rope_theta")
_SHARE = ("partial_rotary_factor", "rotary_pct")
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
_WITH_OLDER_LAYER_TYPES = ("granitemoehybrid",)  # others had today's names before
_NEW_CLASS, _OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def write_for_both(folder: Path, generation: dict[str, Any] | None) -> None:
    """Rewrite the JSON files of a saved model so that transformers 4 reads them, too.

    Args:
        generation: the source's generation_config.json; None leaves what transformers wrote.
    """
    _rewrite(folder / "config.json", with_older_spellings)
    _rewrite(folder / "tokenizer_config.json", older_tokenizer)
    if generation is not None:
        _rewrite(folder / "generation_config.json", lambda _: generation)


def _rewrite(path: Path, change: Any) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    text = json.dumps(change(fields), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def with_older_spellings(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, with the older spellings of those that version 5 renamed.

    Each class has its own. Added are those that the class itself still takes up as the same: with
    them, version 5 reads the same configuration as without.
    """
    whole = {name: value for name, value in fields.items() if not _is_written_anew(value)}
    expected = _read(fields)
    if _read(whole) != expected:
        whole = dict(fields)
    for older in _older_spellings(fields):
        if _read(whole | older) == expected:
            whole |= older
    return whole


def _is_written_anew(value: Any) -> bool:
    """Whether a value holds an infinity, which version 5 writes in a way of its own.

    As a class's default it need not be written.
    """
    return isinstance(value, list) and any(isinstance(v, dict) and "__float__" in v for v in value)


def _older_spellings(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Candidates for what version 4 reads in place of the fields; one may need those before it."""
    candidates = _rope_spellings(fields.get("rope_parameters") or {})
    if "dtype" in fields:
        candidates.append({"torch_dtype": fields["dtype"]})
    for name in _EXPERTS:
        candidates += [{other: fields[name]} for other in _EXPERTS if name in fields]
    if fields["model_type"] in _WITH_OLDER_LAYER_TYPES and fields.get("layer_types"):
        candidates.append({"layer_types": [_LAYER_TYPES.get(t, t) for t in fields["layer_types"]]})
    return candidates


def _rope_spellings(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Candidates for the older spellings of rotary positions, in an order in which they build up.

    Version 5 gives them to each kind of layer; before, what all layers or the global ones had was
    at the top, and only the theta of the local ones had a field of its own.
    """
    local = rope.get("sliding_attention")
    shared = rope.get("full_attention", None if isinstance(local, dict) else rope) or {}
    candidates = [{name: shared["rope_theta"]} for name in _GLOBAL_THETA if "rope_theta" in shared]
    if isinstance(local, dict):
        candidates += [{name: local["rope_theta"]} for name in _LOCAL_THETA]
    if share := shared.get("partial_rotary_factor"):
        candidates += [{name: share} for name in _SHARE]
    return candidates + [{"rope_scaling": scaling} for scaling in _scalings(shared)]


def _scalings(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """Candidates for `rope_scaling`; the last that is taken up stands.

    Phi-3's class in version 4 takes its factors and no field more.
    """
    scaling = {name: value for name, value in rope.items() if name not in _NOT_SCALING}
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return []
    few = {"type": kind, **{k: v for k, v in scaling.items() if k.endswith("_factor")}}
    return [{**scaling, "type": kind}, *([few] if kind == "longrope" else [])]


def _read(fields: dict[str, Any]) -> dict[str, Any] | None:
    """What this version reads in the fields, as JSON has it; None if it refuses them.

    Without the older spellings of rotary positions, which some classes keep beside the new ones.
    """
    from transformers import CONFIG_MAPPING

    given = json.loads(json.dumps(fields), object_hook=_float)
    try:
        read = CONFIG_MAPPING[given["model_type"]].from_dict(given).to_dict()
    except Exception:  # whatever a configuration class raises about its fields
        return None
    read = json.loads(json.dumps(read))
    return _without_type({k: v for k, v in read.items() if k not in _NOT_SCALING})


def _float(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _without_type(value: Any) -> Any:
    """A tree without the older name of `rope_type` where it stands beside it."""
    if not isinstance(value, dict):
        return value
    doubled = "rope_type" in value and value.get("type") == value["rope_type"]
    return {k: _without_type(v) for k, v in value.items() if not (doubled and k == "type")}


def older_tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration under names that both versions know; without code of its own."""
    fields = {name: value for name, value in fields.items() if name != "auto_map"}
    if fields.get("tokenizer_class") == _NEW_CLASS:
        fields["tokenizer_class"] = _OLD_CLASS
    if isinstance(fields.get("extra_special_tokens"), list):  # version 4 has a mapping there
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    return fields
