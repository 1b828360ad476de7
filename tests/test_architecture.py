"""What is refused of a model before anything is tokenized, and what is not."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from tests.models import FAMILIES, tiny
from tst_ray.architecture import check_supported, describe
from tst_ray.config import load_config
from tst_ray.errors import ConfigError
from tst_ray.plan import build_plan
from tst_ray.preview import plan_facts
from tst_ray.tasks import check_model

L = 6


# -- attention ---------------------------------------------------------------------------------


def test_a_class_without_sdpa_may_have_a_gpus_attention() -> None:
    config = tiny("gemma2", attention="eager", final_logit_softcapping=None)
    config._attn_implementation = "flash_attention_2"
    check_supported(config, latent_length=L)
    assert describe(config).num_layers == 2


@pytest.mark.parametrize("name", ["flash_atention_2", "spda", "paged|eager"])
def test_an_attention_that_transformers_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention = .*: .* give one of eager, flash"):
        check_supported(tiny("llama", attention=name), latent_length=L)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "kernels-community/flash-attn2"])
def test_an_attention_that_workers_may_have_is_not(name: str) -> None:
    check_supported(tiny("llama", attention=name), latent_length=L)


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_there_is_one_of_each_at_least(name: str) -> None:
    config = tiny("qwen3", **{name: 0})
    with pytest.raises(ConfigError, match=rf"^model\.config\.{name} = 0: must be at least 1$"):
        check_supported(config, latent_length=L)


def test_of_what_layers_have_of_their_own_the_largest_is_told() -> None:
    config = tiny("gemma4_unified_text", global_head_dim=32)
    check_supported(config, latent_length=L)
    assert describe(config).head_dim == 32


# -- a pass without storage --------------------------------------------------------------------


def test_blocks_that_need_token_ids_are_refused() -> None:
    """Its first blocks' experts are looked up by the token."""
    config = tiny("deepseek_v4", attention="eager", head_dim=64, num_key_value_heads=1)
    with pytest.raises(ConfigError, match=r"^model: deepseek_v4 needs token ids, .*give another"):
        check_supported(config, latent_length=L)


def test_a_model_that_looks_for_the_token_of_an_embedding_is_refused() -> None:
    """Of a bag of one token it finds it."""
    config = tiny("gemma4_text", hidden_size_per_layer_input=8)
    with pytest.raises(ConfigError, match=r"^model: Gemma4ForCausalLM .*takes no inputs_embeds"):
        check_supported(config, latent_length=L)
    check_supported(tiny("gemma4_text", hidden_size_per_layer_input=0), latent_length=L)


def test_blocks_are_tried_beside_a_gpu_too_without_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class JITFunction:
        def run(self) -> None:
            pytest.fail("a kernel ran on what has no storage")

    jit: Any = ModuleType("triton.runtime.jit")
    jit.JITFunction = JITFunction
    for name in ("triton", "triton.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "triton.runtime.jit", jit)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"^model.config: the blocks of llama cannot run: .*key"):
        check_supported(
            tiny("llama", num_attention_heads=8, num_key_value_heads=3), latent_length=L
        )
    monkeypatch.setattr(LlamaMLP, "forward", lambda *args: JITFunction().run())
    check_supported(tiny("llama"), latent_length=L)


def test_a_mixture_is_tried_beyond_its_first_router(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Qwen3MoeAttention.forward

    def fails(self: Any, *args: Any, **options: Any) -> Any:
        if self.layer_idx == 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return attention(self, *args, **options)

    monkeypatch.setattr(Qwen3MoeAttention, "forward", fails)
    with pytest.raises(ConfigError, match="the blocks of qwen3_moe cannot run: mat1"):
        check_supported(tiny("qwen3_moe"), latent_length=L)


@pytest.mark.parametrize("family", ["mamba", "openai-gpt"])
def test_what_cannot_run_in_bfloat16_is_refused_where_it_is_to(family: str) -> None:
    config = tiny(family, attention="eager")
    check_supported(config, latent_length=L)
    with pytest.raises(ConfigError, match=rf"^train\.precision = bfloat16: {family} .*=float32"):
        check_supported(config, latent_length=L, precision="bfloat16")


@pytest.mark.parametrize("family", [*FAMILIES, "gemma", "xglm", "jetmoe", "falcon_h1"])
def test_what_can_is_not(family: str) -> None:
    check_supported(tiny(family, attention="eager"), latent_length=L, precision="bfloat16")


@pytest.mark.parametrize(
    "facts", [plan_facts, lambda config: check_model(config, build_plan(config), None)]
)
def test_a_runs_precision_is_the_one_that_is_tried(facts: Any) -> None:
    model = "{model_type: mamba, hidden_size: 16, num_hidden_layers: 2}"
    settings = ["--model.attention=eager", "--train.precision=bfloat16"]
    config = load_config(None, [f"--model.config={model}", *settings])
    with pytest.raises(ConfigError, match=r"^train\.precision = bfloat16: mamba"):
        facts(config)
    on_gpus = "--cluster.gpus_per_worker=1"  # for which it may have kernels of its own
    facts(load_config(None, [f"--model.config={model}", *settings, on_gpus]))
