"""The optimizer: what decays, what the learning rate is, and clipping as torch does it."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.models import OPTIMIZER, tiny
from tst_ray.model import build_model
from tst_ray.optim import build_optimizer, clip_grad_norm, set_lr


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
