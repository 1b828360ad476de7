"""Token superposition: bags of tokens as inputs, and the next bag as a multi-hot target.

    embed_bags                         a bag's input: the mean of its tokens' embeddings
    bag_weights                        how much each place of the target bag counts
    multi_hot_cross_entropy            the loss, as one reads it in the paper
    multi_hot_cross_entropy_alt        its alternative: the mass on the bag sums to one
    linear_multi_hot_cross_entropy     either loss from the hidden states, as training computes it

Source: Peng, Gigant, Quesnelle, *Efficient Pre-Training with Token Superposition*,
arXiv 2605.06546. This module knows torch only.

Shape suffixes: N positions, C positions of one chunk, s places of a bag, V vocabulary, d width.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Loss = Literal["mce", "mce_alt"]
Reduction = Literal["mean", "sum"]

WEIGHTINGS = ("uniform", "power_law", "exponential", "first_token", "mutual_information")

_MAX_CHUNK_BYTES = 256 << 20  # of logits in memory at once
_MUTUAL_INFORMATION = (3.63, 1.35, -1.25)  # C0, a, k of C0 + a·i^k, fitted in the paper


def embed_bags(weight: Tensor, tokens: Tensor) -> Tensor:
    """The mean embedding of each bag, summed in float32 at least, in the weight's dtype.

    Args:
        weight: the embedding table [V, d].
        tokens: token ids [..., s].

    Returns:
        [..., d]. No [..., s, d] copy of the embeddings is made.
    """
    bags = tokens.reshape(-1, tokens.shape[-1])
    table = weight
    if weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16):
        table = weight.float()  # CUDA's kernel sums these in float32, the CPU's does not
    mean = F.embedding_bag(bags, table, mode="mean").to(weight.dtype)
    return mean.view(*tokens.shape[:-1], weight.shape[1])


def bag_weights(weighting: str, s: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights g(i), i = 1 … s, of the places of a target bag, scaled to sum to 1.

    Args:
        weighting: `uniform` 1; `power_law` 1/i; `exponential` exp(−i); `first_token` 1 at i = 1
            and 0 elsewhere; `mutual_information` 3.63 + 1.35·i^−1.25.
        s: the size of the bag.
        dtype: of the result; the arithmetic is float64.

    Returns:
        [s].

    Raises:
        ValueError: for another weighting, or a bag of no tokens.
    """
    if s < 1:
        raise ValueError(f"bag_size = {s}: must be at least 1")
    place = torch.arange(1, s + 1, dtype=torch.float64)
    if weighting == "uniform":
        weights = torch.ones_like(place)
    elif weighting == "power_law":
        weights = 1 / place
    elif weighting == "exponential":
        weights = torch.exp(1 - place)  # exp(−i), scaled so that no bag is long enough for 0 / 0
    elif weighting == "first_token":
        weights = (place == 1).double()
    elif weighting == "mutual_information":
        c0, a, k = _MUTUAL_INFORMATION
        weights = c0 + a * place**k
    else:
        raise ValueError(f"weighting = {weighting!r}: must be one of {', '.join(WEIGHTINGS)}")
    return (weights / weights.sum()).to(dtype)


def multi_hot_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, ignore_index: int = -100
) -> Tensor:
    """The multi-hot cross-entropy Σ_i w_i · mean_n CE(z_n, y_ni); the reference, made to be read.

    The mean of each place is over its own valid labels; a place without any counts 0.

    Args:
        logits: [N, V]; taken to float32 where they are less.
        targets: [N, s], labels or `ignore_index`.
        weights: [s].

    Returns:
        a scalar, float32 or the logits' float64.
    """
    logits_NV = _at_least_float32(logits)
    loss = logits_NV.new_zeros(())
    for place, weight in enumerate(weights):
        labels_N = targets[:, place]
        total = F.cross_entropy(logits_NV, labels_N, ignore_index=ignore_index, reduction="sum")
        num_valid = (labels_N != ignore_index).sum().clamp(min=1)
        loss = loss + weight * (total / num_valid)
    return loss


def multi_hot_cross_entropy_alt(
    logits: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """MCEAlt: mean_n of logsumexp(z_n) − logsumexp(z_n[y_n]), over positions with a valid label.

    It has no place weights. A token that is in the bag twice counts twice.

    Args:
        logits: [N, V]; taken to float32 where they are less.
        targets: [N, s], labels or `ignore_index`.

    Returns:
        a scalar, float32 or the logits' float64; 0 where no label is valid.
    """
    valid_Ns = targets != ignore_index
    valid_N = valid_Ns.any(dim=1)
    logits_NV = _at_least_float32(logits)[valid_N]
    picked_Ns = logits_NV.gather(1, targets[valid_N].clamp(min=0))
    picked_Ns = picked_Ns.masked_fill(~valid_Ns[valid_N], -math.inf)
    losses_N = logits_NV.logsumexp(dim=1) - picked_Ns.logsumexp(dim=1)
    return losses_N.sum() / valid_N.sum().clamp(min=1)


def linear_multi_hot_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    ignore_index: int = -100,
    *,
    loss: Loss = "mce",
    reduction: Reduction = "mean",
    divisor: float = 1.0,
    chunk_rows: int | None = None,
) -> Tensor:
    """Either multi-hot loss of the logits `hidden @ weight.T`, which never exist whole.

    Positions go through in chunks. One logsumexp serves all s labels of a position, and the
    gradients are made along the way, so nothing is computed twice and no s copies are made.

    Args:
        hidden: [N, d].
        weight: the output layer's [V, d].
        targets: [N, s], labels or `ignore_index`.
        weights: [s]; `mce_alt` has no place weights and does not look at them.
        loss: `mce` is multi_hot_cross_entropy, `mce_alt` multi_hot_cross_entropy_alt.
        reduction: `mean` is theirs; `sum` leaves the division by the number of valid labels (of
            each place, or of positions for `mce_alt`) to the caller.
        divisor: what the result is divided by, before gradients are cast to the inputs' dtype: a
            later division would round the same factor into every bfloat16 gradient.
        chunk_rows: positions a chunk; by default as many as 256 MiB of logits allow.

    Returns:
        a scalar, float32 or the hidden states' float64.

    Raises:
        ValueError: for another loss or reduction.
    """
    if loss not in ("mce", "mce_alt"):
        raise ValueError(f"loss = {loss!r}: must be mce or mce_alt")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}: must be mean or sum")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    valid_Ns = targets != ignore_index
    if loss == "mce":
        shares_Ns = valid_Ns * weights.to(hidden.device, dtype)
        counts = valid_Ns.sum(dim=0)
    else:
        shares_Ns = valid_Ns.to(dtype)  # only whether a label counts; `_bag_terms` shares them out
        counts = valid_Ns.any(dim=1).sum()
    ones = torch.ones_like(counts, dtype=dtype)
    scale = ones / counts.clamp(min=1).to(dtype) if reduction == "mean" else ones
    if chunk_rows is None:
        chunk_rows = max(1, _MAX_CHUNK_BYTES // (4 * weight.shape[0]))
    result: Tensor = _LinearMultiHot.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        targets.masked_fill(~valid_Ns, 0),
        shares_Ns,
        scale / divisor,
        loss,
        chunk_rows,
        torch.is_grad_enabled(),
    )
    return result


class _LinearMultiHot(torch.autograd.Function):
    """Σ_n a_n·logsumexp(z_n) − (the bag's term), chunk by chunk, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        targets_Ns: Tensor,
        shares_Ns: Tensor,
        scale: Tensor,
        loss: Loss,
        chunk_rows: int,
        grad_enabled: bool,
    ) -> Tensor:
        dtype = shares_Ns.dtype
        hidden_grad = torch.empty_like(hidden_Nd) if ctx.needs_input_grad[0] else None
        wants_weight_grad = ctx.needs_input_grad[1] and grad_enabled
        weight_grad = None  # made by the first chunk: filling it with zeros takes as long as adding
        if not grad_enabled:
            hidden_grad = None
        total = torch.zeros((), dtype=dtype, device=hidden_Nd.device)
        for start in range(0, len(hidden_Nd), chunk_rows):
            rows = slice(start, start + chunk_rows)
            hidden_Cd, targets_Cs = hidden_Nd[rows], targets_Ns[rows]
            logits_CV = (hidden_Cd @ weight_Vd.T).to(dtype)
            lse_C = logits_CV.logsumexp(dim=1)
            picked_Cs = logits_CV.gather(1, targets_Cs)
            mass_Cs, bag_C = _bag_terms(picked_Cs, shares_Ns[rows], scale, loss)
            mass_C = mass_Cs.sum(dim=1)
            total += (mass_C * lse_C - bag_C).sum()
            if hidden_grad is None and not wants_weight_grad:
                continue
            # d loss / d z = a·softmax(z) − (what the bag's labels get), made in the logits' memory
            grad_CV = logits_CV.sub_(lse_C[:, None]).exp_().mul_(mass_C[:, None])
            grad_CV = grad_CV.scatter_add_(1, targets_Cs, -mass_Cs).to(hidden_Cd.dtype)
            if hidden_grad is not None:
                torch.mm(grad_CV, weight_Vd, out=hidden_grad[rows])
            if wants_weight_grad:
                weight_grad = _add_product(weight_grad, grad_CV.T, hidden_Cd, dtype)
        if wants_weight_grad and weight_grad is None:  # no positions at all
            weight_grad = torch.zeros_like(weight_Vd, dtype=dtype)
        ctx.save_for_backward(hidden_grad, _cast(weight_grad, weight_Vd.dtype))
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


def _bag_terms(
    picked_Cs: Tensor, shares_Cs: Tensor, scale: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """What the labels of each position's bag contribute, from their logits.

    Returns:
        the gradient's mass on each label [C, s], whose row sum is a_n, and the bag's term [C].
    """
    if loss == "mce":
        mass_Cs = shares_Cs * scale
        return mass_Cs, (mass_Cs * picked_Cs).sum(dim=1)
    valid_C = shares_Cs.any(dim=1)
    inside_Cs = picked_Cs.masked_fill(shares_Cs == 0, -math.inf)
    inside_Cs = inside_Cs.masked_fill(~valid_C[:, None], 0)  # keeps a bag of no labels finite
    factor_C = valid_C * scale
    return inside_Cs.softmax(1) * factor_C[:, None], inside_Cs.logsumexp(1) * factor_C


def _add_product(sum_: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """sum_ + a @ b in `dtype`; in place, and without a copy of the product where that can be."""
    if sum_ is None:
        return (a @ b).to(dtype)
    return sum_.addmm_(a, b) if a.dtype == dtype else sum_.add_(a @ b)


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
