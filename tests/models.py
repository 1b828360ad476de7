"""Tiny models of every family that is tested, and phases, for the tests."""

from typing import Any

from tst_ray.model_config import hf_config
from tst_ray.plan import Phase
from tst_ray.settings import ModelConfig, TrainConfig

VOCAB = 50
FAMILIES = ("llama", "qwen3", "qwen3_moe", "mistral", "gpt_neox")
OPTIMIZER = TrainConfig(learning_rate=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.01,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.01},
    "falcon_h1": {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}


def section(**settings: Any) -> Any:
    """A model section."""
    defaults = {"source": None, "config": {}, "pretrained": False, "attention": "sdpa"}
    return ModelConfig.model_construct(**{**defaults, **settings})


def tiny(family: str, attention: str = "sdpa", **settings: Any) -> Any:
    """A tiny configuration of a family, over a vocabulary of VOCAB tokens."""
    config: dict[str, Any] = {"model_type": family, **_EXTRA.get(family, {}), **settings}
    if family != "gpt2":
        config = _SIZES | config
    if family not in ("gpt_neox", "gpt2"):
        config = {"num_key_value_heads": 2, "head_dim": 8} | config
    return hf_config(section(config=config, attention=attention), vocab_size=VOCAB, eot_token=0)


def a_phase(**settings: Any) -> Phase:
    """A phase of one step, uniform and full unless told otherwise."""
    s, output_only = settings["bag_size"], settings.get("mode") == "output_only"
    defaults: dict[str, Any] = {
        "index": 0,
        "name": "phase",
        "steps": 1,
        "first_step": 0,
        "min_workers": 1,
        "max_workers": 1,
        "weighting": "uniform",
        "loss": "mce",
        "mode": "full",
        "fold": "sequence",
        "input_bag": 1 if output_only else s,
        "target_bag": s,
    }
    return Phase(**{**defaults, **settings})
