"""Token superposition: bags of tokens as inputs, and the next bag as a multi-hot target.

    embed_bags                         a bag's input: the mean of its tokens' embeddings
    bag_weights                        how much each place of the target bag counts
    multi_hot_cross_entropy            the loss, as one reads it in the paper
    multi_hot_cross_entropy_alt        its alternative: the mass on the bag sums to one
    linear_multi_hot_cross_entropy     either loss from the hidden states, as training computes it

Source: Peng, Gigant, Quesnelle, *Efficient Pre-Training with Token Superposition*,
arXiv 2605.06546. This module knows torch only; on a GPU `bag_kernels.py` makes the mean.

Shape suffixes: N positions, s places of a bag, M = N·s tokens, V vocabulary, d width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipelines.errors import one_line
from tst_ray.chunked_loss import chunked_cross_entropy

log = logging.getLogger(__name__)

Loss = Literal["mce", "mce_alt"]

WEIGHTINGS = ("uniform", "power_law", "exponential", "first_token", "mutual_information")

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
    kernel = gpu_kernel() if weight.is_cuda and weight.dtype != torch.float64 else None
    if kernel is not None:
        mean = kernel(weight, bags)
    elif weight.device.type == "cpu":
        table = _at_least_float32(weight)
        mean = _MeanOfBags.apply(table, bags).to(weight.dtype)  # type: ignore[no-untyped-call]
    else:
        mean = F.embedding_bag(bags, weight, mode="mean")
    return mean.view(*tokens.shape[:-1], weight.shape[1])


class _MeanOfBags(torch.autograd.Function):
    """The mean on a CPU, with a gradient that is such a sum too.

    A row of the table's gradient is the sum of the bags' gradients over the places of its token.
    With the places sorted by token, that is `embedding_bag` the other way round: each row is
    written once, in an order that the text fixes. torch's own makes a table of zeros, and adds.
    """

    @staticmethod
    def forward(ctx: Any, table_Vd: Tensor, bags_Ns: Tensor) -> Tensor:
        bags_Ns = bags_Ns.int()  # half the bytes to sort and to read
        ctx.save_for_backward(bags_Ns)
        ctx.rows = table_Vd.shape[0]
        return F.embedding_bag(bags_Ns, table_Vd, mode="sum").div_(bags_Ns.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor, None]:
        (bags_Ns,) = ctx.saved_tensors
        s = bags_Ns.shape[1]
        tokens_M, places_M = bags_Ns.reshape(-1).sort(stable=True)
        rows_V = torch.arange(ctx.rows, dtype=torch.int32)
        begins_V = torch.searchsorted(tokens_M, rows_V, out_int32=True)
        bags_M = (places_M // s).int()
        return F.embedding_bag(bags_M, grad_Nd / s, begins_V, mode="sum"), None


@cache
def gpu_kernel() -> Callable[[Tensor, Tensor], Tensor] | None:
    """`mean_of_bags`, tried on the GPU; None where it does not work, and then it is said why.

    torch's wheels for CUDA bring Triton, but it needs a C compiler too.
    """
    try:
        from tst_ray.bag_kernels import mean_of_bags

        with torch.enable_grad():  # of one token so often that its sum takes all the kernels
            table = torch.zeros(1, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            bags = torch.zeros(100, 2, device="cuda", dtype=torch.int64)
            torch.autograd.grad(mean_of_bags(table, bags).sum(), table)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        log.warning("bags are averaged by torch, which takes longer; Triton: %s", one_line(error))
        return None
    return mean_of_bags


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
    divisor: float | None = None,
    chunk_rows: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Either multi-hot loss of the logits `hidden @ weight.T`, which never exist whole.

    One softmax serves all s labels of a position (`chunked_loss.py`); no s copies are made.

    Args:
        hidden: [N, d].
        weight: the output layer's [V, d].
        targets: [N, s], labels or `ignore_index`.
        weights: [s]; `mce_alt` has no place weights and does not look at them.
        loss: `mce` is multi_hot_cross_entropy, `mce_alt` multi_hot_cross_entropy_alt.
        divisor: what the sum is divided by; theirs unless given, the number of valid labels (of
            each place, or of positions for `mce_alt`). Not to be done later: that would round the
            same factor into every bfloat16 gradient.
        chunk_rows: positions a chunk; by default as many as 1 GiB of logits allows.
        compile: whether to torch.compile the softmax.

    Returns:
        a scalar, float32 or the hidden states' float64.

    Raises:
        ValueError: for another loss.
    """
    if loss not in ("mce", "mce_alt"):
        raise ValueError(f"loss = {loss!r}: must be mce or mce_alt")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    valid_Ns = targets != ignore_index
    if loss == "mce":
        masses_Ns = valid_Ns * weights.to(hidden.device, dtype)
        counts = valid_Ns.sum(dim=0)  # [s]
    else:
        masses_Ns = valid_Ns.to(dtype)
        counts = valid_Ns.any(dim=1).sum()
    return chunked_cross_entropy(
        hidden,
        weight,
        targets.masked_fill(~valid_Ns, 0),
        masses_Ns / (counts.clamp(min=1) if divisor is None else divisor),
        jointly=loss == "mce_alt",
        chunk_rows=chunk_rows,
        compile=compile,
    )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
