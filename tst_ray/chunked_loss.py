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

CHUNK_BYTES = 1 << 30  # of float32 logits made at once; as estimates.WHOLE_LOGITS_BYTES

Softmax = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


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
    """The loss with its gradients, which the backward pass only scales.

    The gradient of a position's logits is m·(p − q), m its mass and q what share of it lies on each
    token. Only p − q is made, in place of p: m is a factor of the rows of what is far smaller, the
    hidden states and their gradient. The largest m is taken out of all, so that the others are
    mostly 1 or 0, which round nothing.
    """

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
        mass_N = masses_Ns.amax(1) if jointly else masses_Ns.sum(1)
        largest = mass_N.amax() if len(mass_N) else mass_N.sum()
        part_N1 = (mass_N / _not_zero(largest))[:, None]
        hidden_grad = torch.empty_like(hidden_Nd) if wants_hidden_grad else None
        weight_grad = None  # made by the first chunk: filling it with zeros takes as long as adding
        total = torch.zeros((), dtype=dtype, device=hidden_Nd.device)
        for start in range(0, len(hidden_Nd), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_Cd, targets_Cs, masses_Cs = hidden_Nd[rows], targets_Ns[rows], masses_Ns[rows]
            if hidden_grad is None and not wants_weight_grad:
                logp_CV = (hidden_Cd @ weight_Vd.T).log_softmax(1, dtype=dtype)
                logp_Cs = logp_CV.gather(1, targets_Cs)
                total += _losses(logp_Cs, masses_Cs, mass_N[rows], jointly)[0].sum()
                continue
            # No name for the logits: they go as soon as their softmax is there.
            logp_Cs, grad_CV = softmax(hidden_Cd @ weight_Vd.T, targets_Cs, dtype)
            losses_C, shares_Cs = _losses(logp_Cs, masses_Cs, mass_N[rows], jointly)
            total += losses_C.sum()
            _subtract_labels(grad_CV, logp_Cs, targets_Cs, shares_Cs)
            if hidden_grad is not None:
                torch.mm(grad_CV, weight_Vd, out=hidden_grad[rows])
            if wants_weight_grad:
                hidden_Cd = (hidden_Cd * part_N1[rows]).to(hidden_Nd.dtype)
                weight_grad = _add_product(weight_grad, grad_CV.T, hidden_Cd, dtype)
            del grad_CV  # before the next chunk's is made
        if wants_weight_grad and weight_grad is None:  # no positions at all
            weight_grad = torch.zeros_like(weight_Vd, dtype=dtype)
        ctx.save_for_backward(hidden_grad, weight_grad, mass_N, largest)
        ctx.weight_dtype = weight_Vd.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, mass_N, largest = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = _scaled(hidden_grad, (mass_N * grad)[:, None], hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = _scaled(weight_grad, largest * grad, ctx.weight_dtype)
        return (hidden_grad, weight_grad, *[None] * 6)


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Their product, rounded once to another dtype; on a GPU in one pass over the tensor."""
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


def _not_zero(masses: Tensor) -> Tensor:
    """What to divide masses by: where all are 0, so are their shares."""
    return masses.clamp(min=torch.finfo(masses.dtype).tiny)


def _softmax(logits_CV: Tensor, targets_Cs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """log p of each label [C, s] in `dtype`, and p of the vocabulary [C, V] in the logits'."""
    logp_CV = logits_CV.log_softmax(1, dtype=dtype)
    logp_Cs = logp_CV.gather(1, targets_Cs)
    if logits_CV.dtype == dtype:
        return logp_Cs, logp_CV.exp_()
    return logp_Cs, torch.exp(logp_CV, out=torch.empty_like(logits_CV))


def _compiled_softmax(
    logits_CV: Tensor, targets_Cs: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same in one kernel, by which none of the logits' float32 values reaches the memory.

    Compiled once for chunks and bags of any size: nothing is when the phase changes.
    """
    from torch._dynamo import maybe_mark_dynamic  # a second that only those who compile need spend

    for tensor in (logits_CV, targets_Cs):
        maybe_mark_dynamic(tensor, 0)
    maybe_mark_dynamic(targets_Cs, 1)
    return _compiler()(logits_CV, targets_Cs, dtype)


@cache
def _compiler() -> Softmax:
    return torch.compile(_softmax)


def _losses(
    logp_Cs: Tensor, masses_Cs: Tensor, mass_C: Tensor, jointly: bool
) -> tuple[Tensor, Tensor]:
    """The losses [C], and what share of each's mass falls on which label [C, s]."""
    if not jointly:
        return -(masses_Cs * logp_Cs).sum(1), masses_Cs / _not_zero(mass_C)[:, None]
    inside_Cs = logp_Cs.masked_fill(masses_Cs == 0, -math.inf)
    inside_Cs = inside_Cs.masked_fill((mass_C == 0)[:, None], 0)  # keeps what has no label finite
    return -inside_Cs.logsumexp(1) * mass_C, inside_Cs.softmax(1)


def _subtract_labels(
    grad_CV: Tensor, logp_Cs: Tensor, targets_Cs: Tensor, shares_Cs: Tensor
) -> None:
    """Turn p into p − q, at the labels.

    Written, not added: a label that is there twice gets the same number twice, so that the order
    makes no difference. And from float32: near p = 1 the two terms are nearly the same.
    """
    same_Css = targets_Cs[:, :, None] == targets_Cs[:, None, :]  # s · s is far less than V
    on_label_Cs = (same_Css * shares_Cs[:, None, :]).sum(2)
    values_Cs = logp_Cs.exp() - on_label_Cs
    grad_CV.scatter_(1, targets_Cs, values_Cs.to(grad_CV.dtype))


def _add_product(sum_: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_ + a @ b in `dtype`; in place, and without a copy of the product where torch can.

    On a GPU the product of bfloat16 is made and added in float32: neither the time nor the rounding
    of a copy in bfloat16 (d 2,048, V 128,256, an H200: 23 ms instead of 29 for the whole loss).
    """
    if a.dtype == dtype:
        return a @ b if sum_ is None else sum_.addmm_(a, b)
    if a.is_cuda:
        if sum_ is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(sum_, a, b, out_dtype=dtype, out=sum_)
    product = a @ b
    return product.to(dtype) if sum_ is None else sum_.add_(product)
