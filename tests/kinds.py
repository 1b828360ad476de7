"""Tiny configurations of the kinds of causal language models that transformers has.

`python -m tests.kinds` builds each without storage, and lists its parameters of two and more
dimensions that do not decay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "time_step_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "kv_channels", "index_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_groups"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "qk_head_dim"), 16),
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "index_n_heads": 2,
    "index_topk": 4,
    "vocab_size_per_layer_input": 64,
}
_LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("num_heads",),
)


def tiny_kind(kind: str, **changes: Any) -> Any:
    """A tiny configuration of one kind: its defaults, with every size that it knows made small."""
    from transformers import CONFIG_MAPPING, AutoConfig

    default = CONFIG_MAPPING[kind]()
    known = {name for name in SIZES if hasattr(default, name)}
    known |= SIZES.keys() & type(default).attribute_map.keys()
    for left_out in _LEFT_OUT:
        fields = {name: SIZES[name] for name in sorted(known) if name not in left_out}
        try:
            config = AutoConfig.for_model(kind, **{**fields, **changes})
        except Exception:  # sizes that do not go together, in each kind's own way
            continue
        config._attn_implementation = "eager"
        return config
    raise ValueError(f"{kind}: no tiny configuration")


def build_kind(kind: str, device: str = "meta", **changes: Any) -> Any:
    """A tiny model of one kind; without storage unless told otherwise."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        config = tiny_kind(kind, **changes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def kinds() -> Iterator[str]:
    """Every kind of causal language model that a tiny one can be made of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            build_kind(kind)
        except Exception:  # about twenty want sizes, or libraries, of their own
            continue
        yield kind


def main() -> None:
    from tst_ray.optim import decaying

    for kind in kinds():
        model = build_kind(kind)
        decays = decaying(model)
        others = {
            ".".join(part for part in name.split(".") if not part.isdigit()): tuple(p.shape)
            for name, p in model.named_parameters()
            if p.dim() > 1 and name not in decays
        }
        print(f"{kind}: {others or 'every one of two and more dimensions decays'}")


if __name__ == "__main__":
    main()
