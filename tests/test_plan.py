"""The plan: phases, tokens, learning rate, splits, work and memory. All of it arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from tst_ray.architecture import describe
from tst_ray.config import load_config
from tst_ray.estimates import ModelShape, flops_per_step, memory_per_worker
from tst_ray.plan import Phase, Plan, batch_split, build_plan

SHAPE = ModelShape(
    parameters=1_000,
    active_parameters=1_000,
    embedding_parameters=300,
    tied_embeddings=False,
    vocab_size=50,
    hidden_size=6,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=2,
    intermediate_size=12,
    experts_per_token=0,
    has_head_norms=False,
    largest_block_parameters=150,
)


def plan_of(*overrides: str, path: str | None = None) -> Plan:
    return build_plan(load_config(path, overrides))


def first_phase(*overrides: str) -> Phase:
    return plan_of("--train.steps=100", *overrides).phases[0]


# ---- tokens ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper-270m", "paper-600m", "paper-3b"])
def test_paper_runs_train_on_75_of_105_billion_tokens(name: str) -> None:
    plan = plan_of(path=name)
    assert [(phase.bag_size, phase.steps) for phase in plan.phases] == [(6, 6_000), (1, 14_000)]
    assert plan.phases[0].data_tokens == 75_497_472_000
    assert plan.total_data_tokens == 104_857_600_000
    assert plan.total_latent_tokens == 20_000 * 2 * 1024 * 1024  # the baseline's 42B
    assert (plan.warmup_steps, plan.decay_steps) == (2_000, 2_000)


def test_the_papers_long_run() -> None:
    plan = plan_of("--train.steps=100000", path="paper-270m")
    assert round(plan.phases[0].data_tokens / 1e9) == 377
    assert round(plan.total_data_tokens / 1e9) == 524


def test_the_papers_moe_trains_on_1_68_of_2_trillion_tokens() -> None:
    plan = plan_of(path="paper-10b-a1b")
    assert [(phase.bag_size, phase.steps) for phase in plan.phases] == [(16, 12_483), (1, 37_500)]
    assert round(plan.phases[0].data_tokens / 1e12, 2) == 1.68
    assert round(plan.total_data_tokens / 1e12, 2) == 1.99
    assert plan.phases[0].latent_tokens_per_step == 8 * 1024 * 1024
    assert (plan.total_steps, plan.warmup_steps) == (49_983, 2_000)


def test_data_tokens_follow_the_papers_formula() -> None:
    plan = plan_of("--train.steps=1000", "--tst.ratio=0.4", "--tst.bag_size=5")
    assert plan.total_data_tokens == round(1000 * 16 * 64 * (0.4 * 5 + 0.6))


# ---- phases ------------------------------------------------------------------------------------


def test_the_demo() -> None:
    plan = plan_of("--train.steps=4500")
    one, two = plan.phases
    assert (one.name, one.first_step, one.last_step, one.bag_size) == ("superposition", 0, 1350, 4)
    assert (two.name, two.first_step, two.last_step, two.bag_size) == ("recovery", 1350, 4500, 1)
    assert (one.min_workers, one.max_workers, two.min_workers, two.max_workers) == (1, 1, 2, 2)
    assert plan.stages() == ((one,), (two,))


@pytest.mark.parametrize(
    ("fold", "mode", "num_sequences", "latent_length", "data_length"),
    [
        ("sequence", "full", 16, 64, 256),
        ("sequence", "input_only", 16, 64, 256),
        ("batch", "full", 64, 16, 64),
        ("batch", "input_only", 64, 16, 64),
        ("none", "full", 16, 16, 64),
        ("none", "input_only", 16, 16, 64),
        ("sequence", "output_only", 16, 64, 64),
    ],
)
def test_folds_and_modes(
    fold: str, mode: str, num_sequences: int, latent_length: int, data_length: int
) -> None:
    phase = first_phase(f"--tst.fold={fold}", f"--tst.mode={mode}")
    assert (phase.num_sequences, phase.latent_length) == (num_sequences, latent_length)
    assert (phase.data_length, phase.lookahead, phase.target_bag) == (data_length, 4, 4)
    assert phase.input_bag == (1 if mode == "output_only" else 4)
    assert phase.data_tokens_per_step == num_sequences * data_length
    assert phase.latent_tokens_per_step == num_sequences * latent_length


@pytest.mark.parametrize("fold", ["sequence", "batch", "none"])
@pytest.mark.parametrize("mode", ["full", "input_only", "output_only"])
def test_bags_of_one_are_ordinary_training(fold: str, mode: str) -> None:
    one = first_phase("--tst.bag_size=1", f"--tst.fold={fold}", f"--tst.mode={mode}")
    assert (one.num_sequences, one.latent_length, one.data_length) == (16, 64, 64)
    assert (one.input_bag, one.target_bag, one.lookahead) == (1, 1, 1)


def test_without_a_ratio_there_is_one_plain_phase() -> None:
    (phase,) = plan_of("--tst.ratio=0", "--train.steps=10").phases
    assert (phase.name, phase.bag_size, phase.steps, phase.first_step) == ("plain", 1, 10, 0)


def test_phases_that_keep_the_workers_are_one_stage() -> None:
    plan = plan_of(
        "--phases=[{bag_size: 8, steps: 3}, {bag_size: 4, steps: 3}, "
        "{bag_size: 1, steps: 3, workers: [1, 2]}, {bag_size: 1, steps: 1, name: last}]",
        "--cluster.workers=1",
    )
    stages = plan.stages()
    assert [[phase.index for phase in stage] for stage in stages] == [[0, 1], [2], [3]]
    assert [phase.first_step for phase in plan.phases] == [0, 3, 6, 9]
    assert [phase.name for phase in plan.phases] == ["superposition"] * 2 + ["recovery", "last"]


def test_phase_at_covers_every_step_once() -> None:
    plan = plan_of("--train.steps=20")
    assert [plan.phase_at(step).index for step in range(20)] == [0] * 6 + [1] * 14
    for outside in (-1, 20):
        with pytest.raises(IndexError):
            plan.phase_at(outside)


def test_tokens_after_adds_up_step_by_step() -> None:
    plan = plan_of("--train.steps=20", "--tst.fold=none")
    data = latent = 0
    for step in range(20):
        assert plan.tokens_after(step) == (data, latent)
        data += plan.phase_at(step).data_tokens_per_step
        latent += plan.phase_at(step).latent_tokens_per_step
    assert plan.tokens_after(20) == (data, latent)
    assert plan.tokens_after(20) == (plan.total_data_tokens, plan.total_latent_tokens)


def test_learning_rate_rises_stays_and_falls_over_the_whole_run() -> None:
    plan = plan_of("--train.steps=100", "--train.warmup=10", "--train.decay=20")
    rates = [plan.lr_multiplier(step) for step in range(100)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[10:81] == [1.0] * 71  # the phase change at step 30 is not seen
    assert rates[80:] == pytest.approx([n / 20 for n in range(20, 0, -1)])
    assert all(0 < rate <= 1 for rate in rates)
    assert plan.lr_multiplier(100) == 0.0
    steepest = max(abs(after - before) for before, after in pairwise(rates))
    assert steepest == pytest.approx(0.1)


def test_learning_rate_falls_to_the_final_ratio() -> None:
    plan = plan_of("--train.steps=10", "--train.decay=4", "--train.final_lr_ratio=0.2")
    assert [plan.lr_multiplier(step) for step in (6, 7, 8, 9, 10)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_learning_rate_without_warmup_and_decay_is_constant() -> None:
    plan = plan_of("--train.steps=10", "--train.warmup=0", "--train.decay=0")
    assert {plan.lr_multiplier(step) for step in range(10)} == {1.0}


def test_warmup_may_meet_decay() -> None:
    plan = plan_of("--train.steps=10", "--train.warmup=5", "--train.decay=5")
    rates = [plan.lr_multiplier(step) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_shares_of_steps_become_steps() -> None:
    plan = plan_of("--train.steps=4500", "--train.warmup=0.05", "--train.decay=450")
    assert (plan.warmup_steps, plan.decay_steps) == (225, 450)


# ---- batch split -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_sequences", [1, 7, 16, 1024])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_batch_split_is_even_and_whole(num_sequences: int, world_size: int) -> None:
    split = batch_split(num_sequences, world_size)
    assert (len(split), sum(split)) == (world_size, num_sequences)
    assert max(split) - min(split) <= 1
    assert list(split) == sorted(split, reverse=True)


# ---- work and memory ---------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    phase = first_phase("--train.batch_size=2", "--train.sequence_length=8")
    # 16 positions; 700 parameters in matmuls; 2 layers of attention 6 wide over 8 positions
    assert flops_per_step(SHAPE, phase) == 16 * (6 * 700 + 12 * 2 * 6 * 8)
    tied = replace(SHAPE, tied_embeddings=True)
    assert flops_per_step(tied, phase) == 16 * (6 * 1000 + 12 * 2 * 6 * 8)
    mixture = replace(SHAPE, active_parameters=600)
    assert flops_per_step(mixture, phase) == 16 * (6 * 300 + 12 * 2 * 6 * 8)


@pytest.mark.parametrize("name", ["demo", "paper-270m", "paper-10b-a1b"])
def test_a_step_costs_the_same_in_both_phases(name: str) -> None:
    one, two = plan_of(path=name).phases
    assert flops_per_step(SHAPE, one) == flops_per_step(SHAPE, two)


def test_patch_level_folding_costs_a_bags_share() -> None:
    plain, patches = (first_phase(f"--tst.fold={fold}") for fold in ("sequence", "none"))
    assert flops_per_step(SHAPE, patches) < flops_per_step(SHAPE, plain) / 4


def memory(world_size: int, *overrides: str, phase: int = 0) -> dict[str, int]:
    config = load_config(None, ["--train.steps=100", *overrides])
    plan = build_plan(config)
    return memory_per_worker(SHAPE, plan, plan.phases[phase], world_size, config.train)


def test_memory_of_one_worker() -> None:
    alone = memory(1)
    assert (alone["parameters"], alone["gradients"], alone["optimizer"]) == (4000, 4000, 8000)
    assert alone["unsharded"] == 0
    assert alone["total"] == sum(alone.values()) - alone["total"]
    assert alone["tokens"] == 8 * 16 * (64 * 4 + 4)


def test_memory_is_sharded() -> None:
    three = memory(3)
    assert (three["parameters"], three["optimizer"]) == (4 * 334, 8 * 334)
    assert three["unsharded"] == 2 * 4 * (600 + 2 * 150) + 4 * 600
    bfloat16 = memory(3, "--train.precision=bfloat16")
    assert bfloat16["unsharded"] == 2 * 2 * (600 + 2 * 150) + 4 * 600
    assert three["tokens"] == 8 * 6 * (64 * 4 + 4)  # the largest share of 16


def test_micro_batches_trade_activations_for_gathered_gradients() -> None:
    whole, cut = memory(2), memory(2, "--train.micro_batch_size=2")
    assert cut["activations"] * 4 == whole["activations"]
    assert cut["unsharded"] == whole["unsharded"] + 4 * (1000 - 500)  # half is the shard
    assert memory(2, "--train.micro_batch_size=8") == whole
    assert memory(1, "--train.micro_batch_size=2")["unsharded"] == 0  # nothing is gathered


def test_weights_that_stay_gathered_take_their_memory() -> None:
    kept = memory(2, "--train.reshard=false")["unsharded"]
    assert kept == memory(2)["unsharded"] + 4 * (1000 - (600 + 2 * 150))


def test_checkpointing_saves_activations() -> None:
    assert (
        memory(1, "--train.activation_checkpointing=true")["activations"]
        < (memory(1)["activations"])
    )


def test_bags_add_their_tokens_to_memory_and_nothing_else() -> None:
    one, two = memory(2, phase=0), memory(2, phase=1)
    assert {name for name in one if one[name] != two[name]} == {"tokens", "total"}
    assert one["total"] - two["total"] == one["tokens"] - two["tokens"]


def test_logits_never_outgrow_their_bound() -> None:
    shape = replace(SHAPE, vocab_size=128_256)
    for compile, copies in (("true", 1), ("false", 3)):
        config = load_config("paper-270m", [f"--train.compile={compile}"])
        plan = build_plan(config)
        memory = memory_per_worker(shape, plan, plan.phases[0], 8, config.train)
        assert memory["logits"] == copies * 2**30


def kept_by_autograd(model: Any, inputs_BLd: torch.Tensor) -> int:
    """The bytes that a forward pass keeps for backward, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=inputs_BLd, use_cache=False)
    return sum(
        tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in weights
    )


QWEN = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 384, "moe_intermediate_size": 64, "vocab_size": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "precision", "compile"),
    [
        ({}, "float32", False),
        ({}, "bfloat16", False),
        pytest.param({}, "bfloat16", True, marks=pytest.mark.slow),
        ({"model_type": "qwen3", **QWEN}, "bfloat16", False),
        (
            {"model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 8, **QWEN},
            "bfloat16", False,
        ),
        (
            {"model_type": "qwen2_moe", "num_experts": 16, "num_experts_per_tok": 4,
             "shared_expert_intermediate_size": 512, **QWEN},
            "float32", False,
        ),
    ],
    ids=["llama-float32", "llama-bfloat16", "llama-compiled", "qwen3", "qwen3_moe", "qwen2_moe"],
)  # fmt: skip
def test_activations_are_what_autograd_keeps(
    changes: dict[str, Any], precision: str, compile: bool
) -> None:
    from transformers import AutoConfig, AutoModel

    config = load_config(
        None,
        [
            "--train.batch_size=8",
            f"--train.precision={precision}",
            f"--train.compile={str(compile).lower()}",
        ],
    )
    plan, dtype = build_plan(config), getattr(torch, precision)
    hf = AutoConfig.for_model(**(changes or {**config.model.config, "vocab_size": 1024}))
    model = AutoModel.from_config(hf).to(dtype)
    if compile:
        for block in model.layers:
            block.compile()
    measured = kept_by_autograd(
        model, torch.randn(8, 64, hf.hidden_size, dtype=dtype, requires_grad=True)
    )
    memory = memory_per_worker(describe(hf), plan, plan.phases[0], 1, config.train)
    assert memory["activations"] == pytest.approx(measured, rel=0.1)
