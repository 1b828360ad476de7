"""Fields that follow from others: heads, and lists of one entry a layer."""

from typing import Any

import pytest
from transformers import AutoConfig

from tests.kinds import tiny_kind
from tests.models import VOCAB, section
from tst_ray.architecture import describe
from tst_ray.config import load_config
from tst_ray.derived_fields import head_fields, layer_fields
from tst_ray.errors import ConfigError
from tst_ray.model_config import hf_config

LLAMA = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
QWEN = {**LLAMA, "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128}


@pytest.mark.parametrize(
    ("base", "changes", "follows"),
    [
        (LLAMA, {"num_hidden_layers": 3}, {}),
        (
            LLAMA,
            {"hidden_size": 64, "num_attention_heads": 4},
            {"head_dim": 16, "num_key_value_heads": 4},
        ),
        (LLAMA, {"hidden_size": 48}, {"head_dim": 16, "num_key_value_heads": 3}),
        (LLAMA, {"hidden_size": 64}, {"head_dim": None, "num_key_value_heads": 3}),
        (LLAMA, {"hidden_size": 48, "head_dim": 8}, {"num_key_value_heads": 3}),
        (LLAMA, {"hidden_size": 48, "head_dim": 8, "num_key_value_heads": 1}, {}),
        (LLAMA, {"hidden_size": "wide"}, {}),
        # a head's size of its own stays
        ({**QWEN, "num_key_value_heads": 8}, {"hidden_size": 512}, {}),
        # groups that divide the heads stay; else as many heads share one as before
        ({**QWEN, "num_key_value_heads": 8}, {"num_attention_heads": 24}, {}),
        (
            {**QWEN, "num_key_value_heads": 8},
            {"num_attention_heads": 4},
            {"num_key_value_heads": 2},
        ),
    ],
)
def test_heads_follow_the_width(
    base: dict[str, Any], changes: dict[str, Any], follows: dict[str, Any]
) -> None:
    assert head_fields(base, changes) == follows


def test_a_shipped_model_changed_in_width_gets_heads_of_that_width() -> None:
    overrides = ["--model.config.hidden_size=64", "--model.config.num_attention_heads=4"]
    shape = describe(hf_config(load_config(None, overrides).model, vocab_size=None, eot_token=None))
    assert (shape.head_dim, shape.num_heads, shape.num_kv_heads) == (16, 4, 4)


def made_up(layers: int) -> dict[str, Any]:
    """A class that gives each layer a type, and every fourth another."""
    types = ["full" if (layer + 1) % 4 == 0 else "near" for layer in range(layers)]
    return {"layer_types": types, "betas": [0.9, 0.95]}


def test_fewer_layers_keep_the_first_entries() -> None:
    base = {**made_up(6), "layer_windows": list(range(6)), "eos_token_id": [1, 2, 3, 4, 5, 6]}
    assert layer_fields(base, 6, 6, made_up) == ({}, [])
    cut, too_short = layer_fields(base, 6, 2, made_up)
    assert (cut, too_short) == ({"layer_types": ["near"] * 2, "layer_windows": [0, 1]}, [])
    # two of what is no layer's stay
    assert layer_fields({**made_up(2)}, 2, 1, made_up)[0] == {"layer_types": ["near"]}


def test_more_layers_are_the_classs_own_or_none() -> None:
    longer, too_short = layer_fields(made_up(6), 6, 8, made_up)
    assert (longer["layer_types"], too_short) == (made_up(8)["layer_types"], [])
    of_its_own = {"layer_types": ["full"] * 6, "layer_windows": list(range(6))}
    assert layer_fields(of_its_own, 6, 8, made_up) == ({}, ["layer_types", "layer_windows"])


KINDS = (
    "qwen3",
    "gemma3_text",
    "gpt_oss",
    "smollm3",
    "laguna",
    "lfm2",
    "llama4_text",
    "granite_swa",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_may_get_another_number_of_layers(kind: str, tmp_path: Any) -> None:
    source = tiny_kind(kind, num_hidden_layers=6)
    source.save_pretrained(tmp_path)

    def read(layers: int, **more: Any) -> Any:
        changes = {"num_hidden_layers": layers, **more}
        given = section(source=str(tmp_path), config=changes, attention="eager")
        return hf_config(given, vocab_size=VOCAB, eot_token=0)

    fewer, more = read(2), read(8)
    for config, count in ((fewer, 2), (more, 8)):
        assert config.num_hidden_layers == count
        for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
            if (own := getattr(config, name, None)) is not None:
                assert len(own) == count
                assert list(own[:2]) == list(getattr(source, name)[:2])
        AutoConfig.for_model(**config.to_dict())


def test_lists_that_the_class_does_not_make_are_asked_for(tmp_path: Any) -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    source = tiny_kind("qwen3", num_hidden_layers=3, layer_types=types)
    source.save_pretrained(tmp_path)
    given = section(source=str(tmp_path), config={"num_hidden_layers": 4})
    wanted = r"num_hidden_layers = 4: the source has layer_types for its 3 layers only; give model"
    with pytest.raises(ConfigError, match=wanted):
        hf_config(given, vocab_size=VOCAB, eot_token=0)
    whole = {"num_hidden_layers": 4, "layer_types": [*types, "full_attention"]}
    given = section(source=str(tmp_path), config=whole)
    assert hf_config(given, vocab_size=VOCAB, eot_token=0).layer_types == whole["layer_types"]
