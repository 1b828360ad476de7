"""Cross-entropy from hidden states: the logits exist a chunk of positions at a time, never whole.

    chunked_cross_entropy   of any number of labels a position, each with its own weight

A position's softmax is made once and serves all its labels. The gradients are made along the way,
so nothing is computed twice. This module knows torch only.

Shape suffixes: N positions, C of them in one chunk, s labels of a position, V vocabulary, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 512 << 20  # of float32 logits made at once; as plan.WHOLE_LOGITS_BYTES

Softmax = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    masses: Tensor,
    *,
    jointly: bool = False,
    chunk_rows: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Σ_n Σ_i −m_ni·log p_n(y_ni), where p_n is the softmax of the logits `hidden_n @ weight.T`.

    The softmax is float32 whatever the inputs are, and the weight's gradient is summed in it.

    Args:
        hidden: [N, d].
        weight: the output layer's [V, d].
        targets: [N, s], labels; any valid one where the mass is 0.
        masses: [N, s], what each label counts, 0 for nothing; float32, or the inputs' float64.
        jointly: the labels of a position are one event: −m_n·log Σ_i p_n(y_ni), m_n the largest
            mass, over those with any.
        chunk_rows: positions a chunk; by default as many as `CHUNK_BYTES` allow.
        compile: whether to torch.compile what comes between the matrix products.

    Returns:
        a scalar, of the masses' dtype.
    """
    if chunk_rows is None:
        chunk_rows = rows_within(CHUNK_BYTES, weight)
    if compile and targets.shape[1] == 1:  # torch compiles a size of one by itself
        targets, masses = targets.repeat(1, 2), F.pad(masses, (0, 1))
    softmax = _compiled_softmax if compile else _softmax
    result: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, masses, jointly, chunk_rows, softmax, torch.is_grad_enabled()
    )
    return result


def rows_within(num_bytes: int, weight: Tensor) -> int:
    """Positions whose float32 logits take so many bytes; at least one."""
    return max(1, num_bytes // (4 * weight.shape[0]))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The loss with its gradients, which the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        targets_Ns: Tensor,
        masses_Ns: Tensor,
        jointly: bool,
        chunk_rows: int,
        softmax: Softmax,
        grad_enabled: bool,
    ) -> Tensor:
        dtype = masses_Ns.dtype
        wants_hidden_grad = ctx.needs_input_grad[0] and grad_enabled
        wants_weight_grad = ctx.needs_input_grad[1] and grad_enabled
        hidden_grad = torch.empty_like(hidden_Nd) if wants_hidden_grad else None
        weight_grad = None  # made by the first chunk: filling it with zeros takes as long as adding
        total = torch.zeros((), dtype=dtype, device=hidden_Nd.device)
        for start in range(0, len(hidden_Nd), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_Cd, targets_Cs, masses_Cs = hidden_Nd[rows], targets_Ns[rows], masses_Ns[rows]
            mass_C = masses_Cs.amax(1) if jointly else masses_Cs.sum(1)
            if hidden_grad is None and not wants_weight_grad:
                logp_CV = (hidden_Cd @ weight_Vd.T).log_softmax(1, dtype=dtype)
                logp_Cs = logp_CV.gather(1, targets_Cs)
                total += _losses(logp_Cs, masses_Cs, mass_C, jointly)[0].sum()
                continue
            # No name for the logits: they go as soon as their softmax is there.
            logp_Cs, grad_CV = softmax(hidden_Cd @ weight_Vd.T, targets_Cs, mass_C)
            losses_C, masses_Cs = _losses(logp_Cs, masses_Cs, mass_C, jointly)
            total += losses_C.sum()
            _subtract_labels(grad_CV, logp_Cs, targets_Cs, masses_Cs, mass_C)
            if hidden_grad is not None:
                torch.mm(grad_CV, weight_Vd, out=hidden_grad[rows])
            if wants_weight_grad:
                weight_grad = _add_product(weight_grad, grad_CV.T, hidden_Cd, dtype)
            del grad_CV  # before the next chunk's is made
        if wants_weight_grad and weight_grad is None:  # no positions at all
            weight_grad = torch.zeros_like(weight_Vd, dtype=dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_Vd.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad.to(hidden_grad.dtype),
            None if weight_grad is None else weight_grad * grad.to(weight_grad.dtype),
            *[None] * 6,
        )


def _softmax(logits_CV: Tensor, targets_Cs: Tensor, mass_C: Tensor) -> tuple[Tensor, Tensor]:
    """log p of each label [C, s], and m·p of the whole vocabulary [C, V] in the logits' dtype."""
    logp_CV = logits_CV.log_softmax(1, dtype=mass_C.dtype)
    logp_Cs = logp_CV.gather(1, targets_Cs)
    return logp_Cs, logp_CV.exp_().mul_(mass_C[:, None]).to(logits_CV.dtype)


def _compiled_softmax(
    logits_CV: Tensor, targets_Cs: Tensor, mass_C: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in one kernel, by which none of the logits' float32 values reaches the memory.

    Compiled once for chunks and bags of any size: nothing is when the phase changes.
    """
    from torch._dynamo import maybe_mark_dynamic  # a second that only those who compile need spend

    for tensor in (logits_CV, targets_Cs, mass_C):
        maybe_mark_dynamic(tensor, 0)
    maybe_mark_dynamic(targets_Cs, 1)
    return _compiler()(logits_CV, targets_Cs, mass_C)


@cache
def _compiler() -> Softmax:
    return torch.compile(_softmax)


def _losses(
    logp_Cs: Tensor, masses_Cs: Tensor, mass_C: Tensor, jointly: bool
) -> tuple[Tensor, Tensor]:
    """The losses [C], and how each's mass falls on its labels [C, s]."""
    if not jointly:
        return -(masses_Cs * logp_Cs).sum(1), masses_Cs
    inside_Cs = logp_Cs.masked_fill(masses_Cs == 0, -math.inf)
    inside_Cs = inside_Cs.masked_fill((mass_C == 0)[:, None], 0)  # keeps what has no label finite
    return -inside_Cs.logsumexp(1) * mass_C, inside_Cs.softmax(1) * mass_C[:, None]


def _subtract_labels(
    grad_CV: Tensor, logp_Cs: Tensor, targets_Cs: Tensor, masses_Cs: Tensor, mass_C: Tensor
) -> None:
    """Turn m·p into the gradient, at its labels: m·p(y) less all the mass that lies on y.

    Written, not added: a label that is there twice gets the same number twice, so that the order
    makes no difference. And from float32: near p = 1 the two terms are nearly the same.
    """
    same_Css = targets_Cs[:, :, None] == targets_Cs[:, None, :]  # s · s is far less than V
    on_label_Cs = (same_Css * masses_Cs[:, None, :]).sum(2)
    values_Cs = logp_Cs.exp() * mass_C[:, None] - on_label_Cs
    grad_CV.scatter_(1, targets_Cs, values_Cs.to(grad_CV.dtype))


def _add_product(sum_: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_ + a @ b in `dtype`; in place, and without a copy of the product where that can be."""
    if sum_ is None:
        return (a @ b).to(dtype)
    return sum_.addmm_(a, b) if a.dtype == dtype else sum_.add_(a @ b)
