"""The transformers configuration that a run's settings mean: read, and checked field by field.

    hf_config         the model section of a run → a transformers configuration
    model_fields      what a run keeps of it: a source may change, and transformers' own defaults
    model_remarks     what is not taken as given, or not as it was kept, to tell the user

transformers keeps what it does not know, and ignores it: a run of a month must not find that out.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

from pipelines.errors import one_line
from tst_ray.derived_fields import head_fields, layer_fields
from tst_ray.errors import ConfigError
from tst_ray.router import BALANCE_WEIGHTS, switch_off
from tst_ray.settings import ModelConfig, own_fields

GENERATION = "generation_config"
"""The name under which the fields that a run keeps have the source's generation_config.json."""

_LAYERS = "num_hidden_layers"
_QUANTIZED = ("quantization_config", "compression_config")
# What a source says of its files: how weights are packed, where code is; of no model made here.
_OF_THE_WEIGHTS = (*_QUANTIZED, "auto_map", GENERATION)
_READ_OF_ANY = ("head_dim",)  # models read it where their configuration has no such field
# Older spellings of what is in `rope_parameters` now; beside it, transformers ignores them.
_ROPE_SPELLINGS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}


def hf_config(
    section: ModelConfig,
    *,
    vocab_size: int | None,
    eot_token: int | None,
    kept: dict[str, Any] | None = None,
) -> Any:
    """The transformers configuration that a model section means.

    From scratch, the vocabulary and the end-of-text token are the tokenizer's. A pretrained model
    keeps its own vocabulary, which the tokenizer must fit into (`check_tokenizer_fits`).

    Args:
        section: source, config, pretrained, attention.
        vocab_size, eot_token: the tokenizer's; None where there is none yet (a dry run).
        kept: `model_fields` as the run began with them; None reads them now.

    Raises:
        ConfigError: the source or the model type is unknown, or the model is no decoder-only
            causal language model.
    """
    config = _made(kept) if kept else _read(section)
    _check_kind(config)
    config._attn_implementation = section.attention
    config.dtype = torch.float32
    if _no_router_loss(section):
        switch_off(config)
    if section.pretrained:
        return config
    if vocab_size is not None:
        config.vocab_size = vocab_size
    set_special_tokens(config, eot_token)
    return config


def _no_router_loss(section: ModelConfig) -> bool:
    """Whether the user, not a source or a default, says so in the words of transformers."""
    return section.config.get("output_router_logits") is False


def set_special_tokens(config: Any, eot_token: int | None) -> None:
    """Begin and end texts with one token: those of another vocabulary may lie outside this one.

    Nothing is padded, but some classes insist on a number for each: they get that token, too.
    """
    tokens = {"bos_token_id": eot_token, "eos_token_id": eot_token, "pad_token_id": None}
    for name, token in tokens.items():
        try:
            setattr(config, name, token)
        except StrictDataclassFieldValidationError:
            setattr(config, name, eot_token or 0)


def model_fields(section: ModelConfig) -> dict[str, Any]:
    """All fields of the configuration that a model section means now, as JSON has them.

    Raises:
        ConfigError: see `hf_config`.
    """
    fields: dict[str, Any] = json.loads(json.dumps(_read(section).to_dict()))
    if section.pretrained and (generation := _read_generation(str(section.source))):
        fields[GENERATION] = generation
    return fields


def generation_config(section: ModelConfig, kept: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a source whose weights a run began with says of generation; None if that is nothing.

    Args:
        kept: see `hf_config`; a run of an older version kept none.
    """
    if not section.pretrained:
        return None
    return (kept or {}).get(GENERATION) or _read_generation(str(section.source))


def _read_generation(source: str) -> dict[str, Any] | None:
    from transformers.utils import cached_file

    try:
        path = cached_file(source, f"{GENERATION}.json")
        found = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # most folders have none
        return None
    return found if isinstance(found, dict) else None


def check_tokenizer_fits(section: ModelConfig, config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose texts have tokens that a pretrained model has no place for.

    A special token beyond the model's table, as Gemma 3's <image_soft_token> is, is in no text.

    Args:
        config: the model's, from `hf_config`.

    Raises:
        ConfigError: with both numbers.
    """
    from pipelines.tokenizer import text_vocabulary_size

    if section.pretrained and (size := text_vocabulary_size(tokenizer)) > config.vocab_size:
        raise ConfigError(
            f"data.tokenizer: texts become up to {size} different tokens, and the pretrained model "
            f"{section.source} has a table of {config.vocab_size}; use the tokenizer that it was "
            "trained with"
        )


def model_remarks(
    section: ModelConfig, kept: dict[str, Any] | None, vocab_size: int | None
) -> list[str]:
    """What to tell of a section before there is a tokenizer; and with one, of its vocabulary.

    Args:
        kept, vocab_size: see `hf_config`.
    """
    if vocab_size is not None:
        return ignored_vocabulary(section, vocab_size)
    return [*ignored_fields(section, kept), *(changed_fields(section, kept) if kept else [])]


def changed_fields(section: ModelConfig, kept: dict[str, Any]) -> list[str]:
    """A line on the fields that the section's source, or transformers, gives otherwise now.

    What cannot be read now is not needed: a run goes on with what was kept.
    """
    try:
        now = model_fields(section)
    except ConfigError:
        return []
    # of what only one has, another version of transformers is the reason
    both = sorted(now.keys() & kept.keys() - {"transformers_version"})
    if not (changed := [name for name in both if now[name] != kept[name]]):
        return []
    where = f"model.source = {section.source!r}" if section.source else "model.config"
    return [
        f"{where}: gives other values now than when the run began ({', '.join(changed)}); it goes "
        "on with those that it began with"
    ]


def _read(section: ModelConfig) -> Any:
    from transformers import CONFIG_MAPPING

    changes, base_fields = dict(section.config), {}
    if section.source is not None:
        base = _read_source(section.source)
        if section.pretrained:
            _check_not_quantized(section.source, base)
        base_fields = {"model_type": base.model_type, **base.to_dict()}
        changes = {**_derived(base, base_fields, changes), **changes}
    changes = {**base_fields, **_with_rope(changes, base_fields)}
    if "model_type" not in changes:
        raise ConfigError(
            "model.config: has no model_type; give one, such as llama, or give model.source"
        )
    model_type = changes.pop("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"model.config.model_type = {model_type!r}: transformers does not know it"
            f"{_nearest(str(model_type), CONFIG_MAPPING)}"
        )
    _check_spelling(section.config, _made({"model_type": model_type}))
    return _made({"model_type": model_type, **changes})


def _read_source(source: str) -> Any:
    """The configuration of a folder or an id; code that comes with it is never run."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a configuration class raises about its file
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model.source = {source!r}: its model needs code of its own (auto_map in "
                "config.json), which is not run here; give a model that transformers itself has"
            ) from error
        raise ConfigError(
            f"model.source = {source!r}: not a Hugging Face folder or id that could be read "
            f"({one_line(error)}); give a folder with config.json, an id, or model.config"
        ) from error


def _check_not_quantized(source: str, base: Any) -> None:
    for name in _QUANTIZED:
        if packed := getattr(base, name, None):
            how = packed.get("quant_method") if isinstance(packed, dict) else None
            raise ConfigError(
                f"model.source = {source!r}: its weights are quantized ({how or name}), and are "
                "trained as float32 here; give the model that they were made from, or set "
                "model.pretrained=false to train from scratch"
            )


def _derived(base: Any, fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """What of a source's fields follows from those that are changed, and is not given itself.

    Raises:
        ConfigError: there are to be more layers than its lists have entries for.
    """
    name = base.attribute_map.get(_LAYERS, _LAYERS)
    count, num_layers = fields.get(name), changes.get(name, changes.get(_LAYERS))
    follows = head_fields(fields, changes)
    if type(count) is not int or type(num_layers) is not int or num_layers < 1:
        return follows

    def of_layers(layers: int) -> dict[str, Any]:
        rest = {k: v for k, v in fields.items() if not isinstance(v, list | tuple)}
        try:
            made: dict[str, Any] = _made({**rest, name: layers}).to_dict()
        except ConfigError:
            return {}
        return made

    lists, too_short = layer_fields(fields, count, num_layers, of_layers)
    if missing := [one for one in too_short if one not in changes]:
        raise ConfigError(
            f"model.config.{_LAYERS} = {num_layers}: the source has {', '.join(missing)} for its "
            f"{count} layers only; give model.config.{missing[0]} for all {num_layers}"
        )
    return {**follows, **lists}


def _made(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**{k: v for k, v in fields.items() if k not in _OF_THE_WEIGHTS})
    except Exception as error:  # whatever a configuration class raises about its fields
        raise ConfigError(f"model.config: {one_line(error)}") from error


def _with_rope(given: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """`given`, with all that it says of rotary positions in `rope_parameters`, over the base's.

    Where there are none, transformers takes up the older spellings by itself. Where there are, it
    ignores them; but what stands beside a shipped model's is an override of it.

    Raises:
        ConfigError: the kinds of layers have their own, and which of them is meant is not said; or
            it is no mapping.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(given.get(name) or {}, dict):
            raise ConfigError(f"model.config.{name} = {given[name]}: must be a mapping of fields")
    if "rope_parameters" in given and given["rope_parameters"] is None:
        return given  # the base's are taken away
    rope = _merged(base.get("rope_parameters") or {}, given.get("rope_parameters") or {})
    if not rope:
        return given
    scaling = given.get("rope_scaling") or {}
    old = {new: given[name] for name, new in _ROPE_SPELLINGS.items() if given.get(name) is not None}
    if kinds := [name for name, value in rope.items() if isinstance(value, dict)]:
        for name, value in {**old, **scaling}.items():
            if all(rope[kind].get(name) != value for kind in kinds):
                raise ConfigError(
                    f"model.config.rope_parameters: {', '.join(kinds)} each have a {name} of their "
                    f"own; set {value} there, not for all"
                )
        return {**given, "rope_parameters": rope}
    if "rope_scaling" in given and given["rope_scaling"] is None:  # the base's is taken away
        plain = {name: rope[name] for name in _ROPE_SPELLINGS.values() if name in rope}
        rope = {"rope_type": "default", **plain}
    if "type" in scaling:  # an older spelling, too
        scaling = {"rope_type": scaling["type"], **scaling}
    rest = {k: v for k, v in given.items() if k not in _ROPE_SPELLINGS and k != "rope_scaling"}
    return {**rest, "rope_parameters": {**rope, **scaling, **old}}


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, and so for each mapping in both."""
    both = {
        name: _merged(base[name], value)
        for name, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return {**base, **changes, **both}


def _check_spelling(given: dict[str, Any], default: Any) -> None:
    """Refuse a field that transformers would keep and ignore, where it looks like a known one.

    Fields that look like none are left: real configurations carry many that one class ignores.
    """
    known = {*default.to_dict(), *default.attribute_map, *_ROPE_SPELLINGS}
    for name in given:
        near = "" if name in known or hasattr(default, name) else _nearest(name, known)
        if near:
            raise ConfigError(f"model.config.{name}: {default.model_type} has no such field{near}")


def ignored_fields(section: ModelConfig, kept: dict[str, Any] | None = None) -> list[str]:
    """The fields of `model.config` that are not taken as given, a line each.

    transformers keeps as it is what it does not know, and no model of that type reads it; some
    fields a configuration works out from others.

    Args:
        kept: see `hf_config`.
    """
    if not section.config:
        return []
    made = _made(kept) if kept else _read(section)
    default, kind = type(made)(), made.model_type
    known = {*default.to_dict(), *default.attribute_map, *_READ_OF_ANY}
    rope = getattr(made, "rope_parameters", None) or {}
    lines = []
    for name, given in own_fields(section.config).items():
        read = vars(made).get(made.attribute_map.get(name, name), given)
        is_known = name not in vars(made) or name in known or hasattr(default, name)
        if (new := _ROPE_SPELLINGS.get(name)) in rope:
            read, is_known = rope[new], True
        if not is_known:
            lines.append(f"model.config.{name}: {kind} has no such field; it is ignored")
        elif isinstance(given, int | float) and read != given:
            lines.append(f"model.config.{name} = {given}: it is ignored; {kind} makes it {read}")
        elif name in BALANCE_WEIGHTS and given and _no_router_loss(section):
            said = "output_router_logits is false"
            lines.append(f"model.config.{name} = {given}: it is ignored; {said}")
    return lines


def ignored_vocabulary(section: ModelConfig, vocab_size: int) -> list[str]:
    """A line where a model from scratch is to have another vocabulary than the tokenizer's."""
    given = own_fields(section.config).get("vocab_size")
    if section.pretrained or given in (None, vocab_size):
        return []
    return [
        f"model.config.vocab_size = {given}: it is ignored; the model gets the tokenizer's "
        f"{vocab_size} tokens"
    ]


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.85)
    return f"; did you mean {near[0]}?" if near else ""


def _check_kind(config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model: {kind} is an encoder-decoder; give a decoder-only model")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model: transformers has no causal language model for {kind}; give another, "
            "such as llama"
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(f"model: {kind} does not read text alone; give a text-only model")
