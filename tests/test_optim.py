"""The optimizer: what decays, what the learning rate is, and clipping as torch does it."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.kinds import build_kind
from tests.models import OPTIMIZER, tiny
from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray import worker
from tst_ray.model import build_model
from tst_ray.optim import build_optimizer, clip_grad_norm, decaying, set_lr


def with_gradients(size: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)
    return model


def test_only_matrices_decay() -> None:
    model = build_model(tiny("qwen3_moe"), seed=0)
    optimizer = build_optimizer(model, OPTIMIZER)
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decay.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.9, 0.95), 1e-8, 1e-2)


@pytest.mark.parametrize(
    ("kind", "settings", "not_decaying"),
    [
        ("llama", {}, set()),
        ("gpt2", {}, set()),
        ("qwen3_moe", {}, set()),
        ("jetmoe", {}, set()),
        ("bamba", {}, set()),
        ("cohere", {"use_qk_norm": True}, {"q_norm.weight", "k_norm.weight"}),
        ("gpt_oss", {}, {"experts.gate_up_proj_bias", "experts.down_proj_bias"}),
        ("mamba", {}, {"mixer.A_log"}),
        ("jamba", {}, {"mamba.A_log"}),
        ("kimi_linear", {}, {"forget_gate.A_log"}),
        ("ernie4_5_moe", {}, {"moe_statics.e_score_correction_bias"}),
        ("recurrent_gemma", {}, {"rg_lru.input_gate_bias", "rg_lru.recurrent_gate_bias"}),
        ("inkling2_text", {}, {"q_l2_clip.scale", "rel_l2_clip.scale"}),
    ],
)
def test_what_is_no_matrix_does_not_decay_whatever_its_dimensions(
    kind: str, settings: dict[str, Any], not_decaying: set[str]
) -> None:
    model = build_kind(kind, **settings)
    decays = decaying(model)
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    flat = {name for name, dim in shapes.items() if dim > 1} - decays
    assert {".".join(name.split(".")[-2:]) for name in flat} == not_decaying
    assert not [name for name in decays if shapes.get(name) == 1]


def test_the_layers_of_torch_have_one_matrix_each_whatever_its_shape() -> None:
    model = nn.ModuleDict({"one": nn.Linear(5, 1), "conv": nn.Conv1d(4, 4, 1, groups=4)})
    assert decaying(model) == {"one.weight", "conv.weight"}


def test_a_run_goes_on_where_other_parameters_decayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older version let every parameter of two dimensions decay."""
    mamba = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    monkeypatch.setattr("tests.tiny.MODEL", mamba)
    manifest = make_corpus(tmp_path / "shards")
    job = make_job(make_config(tmp_path, manifest, model__attention="eager"), manifest)

    def by_dimensions(model: nn.Module) -> set[str]:
        return {name for name, parameter in model.named_parameters() if parameter.dim() > 1}

    with monkeypatch.context() as older:
        older.setattr("tst_ray.optim.decaying", by_dimensions)
        run_inline(replace(job, last_step=4))
    steps = []
    set_rate = worker.set_lr

    def spy(optimizer: torch.optim.Optimizer, lr: float) -> None:
        steps.append([group["weight_decay"] for group in optimizer.param_groups])
        set_rate(optimizer, lr)

    monkeypatch.setattr(worker, "set_lr", spy)
    records = run_inline(job)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert steps == [[0.1, 0.0]] * 4  # the state of the first four steps was taken up


def test_a_model_of_matrices_alone() -> None:
    optimizer = build_optimizer(nn.Linear(3, 3, bias=False), OPTIMIZER)
    assert len(optimizer.param_groups) == 1


def test_set_lr_is_the_rate_of_the_next_step() -> None:
    model = with_gradients(1.0)
    optimizer = build_optimizer(model, OPTIMIZER)
    before = deepcopy(model.state_dict())
    set_lr(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    set_lr(optimizer, 1e-3)
    optimizer.step()
    moved = (before["0.bias"] - model.state_dict()["0.bias"]).abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("size", [0.01, 10.0], ids=["within", "beyond"])
def test_clipping_is_torchs(size: float) -> None:
    mine, theirs = with_gradients(size), with_gradients(size)
    norm = clip_grad_norm(mine, 1.0)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
    assert norm.dtype == torch.float32
    assert (float(norm) > 1) == (size > 1)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_a_parameter_without_gradient_is_left_out() -> None:
    model = with_gradients(1.0)
    expected = torch.stack([p.grad.norm() for p in list(model.parameters())[1:]]).norm()  # type: ignore[union-attr]
    next(model.parameters()).grad = None
    torch.testing.assert_close(clip_grad_norm(model, 1e9), expected)


def test_an_infinite_gradient_shows_in_the_norm() -> None:
    model = with_gradients(1.0)
    next(model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index]
    assert not torch.isfinite(clip_grad_norm(model, 1.0))
