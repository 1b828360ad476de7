"""Fields of a model's configuration that follow from others: mended if those are changed.

A source, or a shipped model, spells out what follows from its own sizes. If a run changes the
number of layers or the width, those values no longer mean what they did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]


def head_fields(base: Fields, changes: Fields) -> dict[str, Any]:
    """What the heads become if `changes` are made to `base` and say nothing of them.

    `head_dim` follows if it was the width over the heads; a size of its own, as Qwen3 has, stays.
    As many key-value heads as heads stay as many; others stay if they divide the heads.

    Returns:
        the fields that follow; None for one that the model's class is to work out.
    """
    if not {"hidden_size", "num_attention_heads"} & changes.keys():
        return {}
    now = {**base, **changes}
    sizes = [
        fields.get(name)
        for fields in (now, base)
        for name in ("hidden_size", "num_attention_heads")
    ]
    width, heads, old_width, old_heads = (size if type(size) is int else 0 for size in sizes)
    if min(width, heads, old_width, old_heads) < 1:
        return {}
    follows: dict[str, Any] = {}
    if "head_dim" not in changes and base.get("head_dim") == old_width // old_heads:
        follows["head_dim"] = None if width % heads else width // heads
    groups = base.get("num_key_value_heads")
    if "num_key_value_heads" not in changes and type(groups) is int and groups > 0:
        if groups == old_heads:
            follows["num_key_value_heads"] = heads
        elif heads % groups:
            ratio = old_heads // groups
            follows["num_key_value_heads"] = heads // ratio if heads % ratio == 0 else heads
    return follows


def layer_fields(
    base: Fields, count: int, num_layers: int, of_layers: Callable[[int], Fields]
) -> tuple[dict[str, Any], list[str]]:
    """What the lists of one entry a layer become if a model has another number of layers.

    Fewer layers keep the first entries. For more, the class makes the list, if its own goes on from
    the base's.

    Args:
        base: the fields as they are.
        count, num_layers: how many layers it has, and is to have.
        of_layers: the fields that the class itself gives a model of so many layers.

    Returns:
        the lists that change, and the names of those that cannot be made longer.
    """
    if num_layers == count:
        return {}, []
    of_count, of_more = of_layers(count), of_layers(count + 1)
    changed, too_short = {}, []
    for name, value in base.items():
        per_layer = _is_list(of_count.get(name), count) and _is_list(of_more.get(name), count + 1)
        if not _is_list(value, count) or not (per_layer or "layer" in name):
            continue
        longer = of_layers(num_layers).get(name) if per_layer else None
        if num_layers < count:
            changed[name] = list(value[:num_layers])
        elif longer and len(longer) == num_layers and list(longer[:count]) == list(value):
            changed[name] = list(longer)
        else:
            too_short.append(name)
    return changed, too_short


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length
