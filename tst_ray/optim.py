"""The optimizer: AdamW with decoupled decay, and gradient clipping, of whole or sharded weights.

The learning rate is the plan's (`plan.lr_multiplier`); `set_lr` puts it in before each step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tst_ray.settings import TrainConfig

_FUSED_ON = ("cpu", "cuda", "xpu")


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters; those of one dimension (norms, biases) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=all(p.device.type in _FUSED_ON for p in parameters),
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down so that their norm over all ranks is at most `max_norm`.

    Works on each rank's shards and adds up their squares in one collective.

    Returns:
        the norm before, a float32 scalar, the same on every rank.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
    norms = torch.stack(torch._foreach_norm(local))
    norm: Tensor = torch.linalg.vector_norm(norms.float())
    if any(isinstance(g, DTensor) for g in grads):
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
