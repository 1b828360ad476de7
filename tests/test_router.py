"""The balancing loss of a mixture: transformers' own if it has one, and said if it has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kinds import build_kind
from tests.models import VOCAB, a_phase, section, tiny
from tst_ray.config import load_config
from tst_ray.model import SuperpositionLM
from tst_ray.model_config import hf_config, ignored_fields
from tst_ray.plan import build_plan
from tst_ray.preview import plan_facts, print_plan
from tst_ray.router import balance_remark, balance_weight
from tst_ray.tasks import check_model

WITH_LOSS = ("jetmoe", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe", "olmoe", "jamba")
WITHOUT = ("deepseek_v3", "glm4_moe", "llama4_text", "hunyuan_v1_moe", "aria_text", "afmoe")
DEEPSEEK = """{model_type: deepseek_v3, hidden_size: 32, intermediate_size: 64, n_group: 1,
    num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4, n_routed_experts: 4,
    num_experts_per_tok: 2, topk_group: 1, moe_intermediate_size: 16, first_k_dense_replace: 0,
    q_lora_rank: 16, kv_lora_rank: 16, qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 8}"""


@pytest.mark.parametrize("kind", WITH_LOSS)
def test_the_loss_is_the_one_that_transformers_trains(kind: str) -> None:
    torch.manual_seed(0)
    model = build_kind(kind, "cpu").eval()  # Phi's router draws experts at random in training
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # far from even
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    trained = SuperpositionLM(model)
    loss = trained(tokens, a_phase(bag_size=1, num_sequences=2, latent_length=8))
    own = model(input_ids=tokens[:, :-1], output_router_logits=True, use_cache=False)
    assert trained.has_router
    torch.testing.assert_close(loss.router_loss, own.aux_loss.detach())
    weighted = loss.loss + balance_weight(model) * loss.router_loss
    torch.testing.assert_close(loss.objective.detach(), weighted)
    assert balance_remark(model) is None


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_mixture_without_one_is_told(kind: str) -> None:
    model = build_kind(kind)
    assert balance_weight(model) == 0
    assert str(balance_remark(model)).startswith(f"model: {kind} is a mixture of experts without")


@pytest.mark.parametrize("kind", ["llama", "doge", "granitemoehybrid"])
def test_what_is_no_mixture_is_not(kind: str) -> None:
    assert balance_remark(build_kind(kind, num_local_experts=0)) is None


def test_jetmoes_is_switched_off_in_the_words_of_transformers() -> None:
    no = {"model_type": "jetmoe", "output_router_logits": False, "aux_loss_coef": 0.5}
    config = hf_config(section(config=no), vocab_size=VOCAB, eot_token=0)
    assert config.aux_loss_coef == 0
    (line,) = ignored_fields(section(config=no))
    assert line == "model.config.aux_loss_coef = 0.5: it is ignored; output_router_logits is false"
    assert balance_weight(build_kind("jetmoe", aux_loss_coef=0.5)) == 0.5
    assert tiny("mixtral", output_router_logits=False).router_aux_loss_coef == 0


def test_a_run_and_a_plan_tell_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = [f"--model.config={DEEPSEEK}", f"--run.storage={tmp_path}"]
    config = load_config(None, overrides)
    remarks, _, _ = check_model(config, build_plan(config), None)
    (line,) = [remark for remark in remarks if "balancing" in remark]
    print_plan(plan_facts(config))
    assert line in " ".join(capsys.readouterr().out.split())
    assert plan_facts(load_config(None, overrides[1:]))["remark"] is None
