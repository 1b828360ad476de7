"""What people are told of a model before a run: its shape, and what it lacks."""

from __future__ import annotations

from typing import Any

from tst_ray.architecture import describe, experts, outline
from tst_ray.router import balance_remark


def shape_facts(config: Any) -> dict[str, Any]:
    """A model's shape as plain values; 0 experts if it is no mixture.

    Raises:
        ConfigError: the model's class refuses the configuration.
    """
    shape, (num_experts, top_k) = describe(config), experts(config)
    return {
        "model_type": config.model_type,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "heads": shape.num_heads,
        "kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "experts": num_experts,
        "experts_per_token": top_k,
        "vocab_size": shape.vocab_size,
        "tied_embeddings": shape.tied_embeddings,
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
    }


def mixture_remark(config: Any) -> str | None:
    """What to tell of a mixture of experts that trains without a balancing loss, else None."""
    return balance_remark(outline(config))
