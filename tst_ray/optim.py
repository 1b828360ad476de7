"""The optimizer: AdamW with decoupled decay, and gradient clipping, of whole or sharded weights.

The learning rate is the plan's (`plan.lr_multiplier`); `set_lr` puts it in before each step.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tst_ray.settings import TrainConfig

_FUSED_ON = ("cpu", "cuda", "xpu")
_MATRICES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_NO_MATRIX = re.compile(r"bias|norm|scale|gain|decay|a_log|^d$", re.IGNORECASE)


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters; only those that are matrices decay (`decaying`)."""
    matrices = decaying(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if name in matrices]
    others = [p for name, p in parameters.items() if name not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=all(p.device.type in _FUSED_ON for p in parameters.values()),
    )


def decaying(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay is for: matrices, which inputs are multiplied with.

    What a parameter is does not show in its number of dimensions: experts' biases and the norms of
    heads have two, and so has Mamba's A_log. A parameter is asked for its kind instead.
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if _is_matrix(module, name, parameter)
    }


def _is_matrix(owner: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a module multiplies its input with this parameter of its own.

    The layers of torch have one such, their weight. Of other modules (stacks of experts, routers,
    recurrences) it is what has at least two real dimensions and is named after nothing else.
    """
    if isinstance(owner, _MATRICES):
        return name == "weight"
    if "norm" in type(owner).__name__.lower() or _NO_MATRIX.search(name):
        return False
    return sum(size > 1 for size in parameter.shape) >= 2


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
