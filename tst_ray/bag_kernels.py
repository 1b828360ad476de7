"""The mean embedding of bags on a GPU, and its gradient, as Triton kernels.

    mean_of_bags    what `superposition.embed_bags` does where there is Triton

torch's `embedding_bag` takes 5.7 times as long for bags of 16 as a look-up of one token a position
(an H200, `tests/benchmarks/LOG.md`), most of it for the gradient; these take 0.96 times as long. A
position's rows are added up where they are read, and a row of the table's gradient is written once.
The order of all sums is fixed by the text, so the same bags give the same bits.

Backward sorts the tokens. A tile of them is summed by one program: what begins and ends in a tile
is written at once, what crosses tiles leaves its pieces, which a second kernel joins.

Shape suffixes: N positions, s places of a bag, M = N·s tokens, V vocabulary, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 64  # tokens that one program adds up
_MAX_BLOCK = 1024  # columns of one program


def mean_of_bags(table: Tensor, bags: Tensor) -> Tensor:
    """The mean embedding of each bag, summed in float32; so is the table's gradient.

    Args:
        table: [V, d], float32, bfloat16 or float16, on a GPU.
        bags: int64 [N, s] on the same GPU, each below V: a kernel does not check it.

    Returns:
        [N, d], in the table's dtype.
    """
    result: Tensor = _MeanOfBags.apply(table, bags)  # type: ignore[no-untyped-call]
    return result


class _MeanOfBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_Vd: Tensor, bags_Ns: Tensor) -> Tensor:
        table_Vd, bags_Ns = table_Vd.contiguous(), bags_Ns.contiguous()
        (n, s), d = bags_Ns.shape, table_Vd.shape[1]
        mean_Nd = table_Vd.new_empty(n, d)
        if n:
            block, blocks = _blocks(d)
            with torch.cuda.device_of(table_Vd):
                _mean[(n, blocks)](table_Vd, bags_Ns, mean_Nd, d, s, BLOCK=block)
        ctx.save_for_backward(bags_Ns)
        ctx.rows = table_Vd.shape[0]
        return mean_Nd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Nd: Tensor) -> tuple[Tensor | None, None]:
        (bags_Ns,) = ctx.saved_tensors
        grad_Nd = grad_Nd.contiguous()
        s, d = bags_Ns.shape[1], grad_Nd.shape[1]
        table_grad_Vd = grad_Nd.new_zeros(ctx.rows, d)
        m = bags_Ns.numel()
        if m:  # a grid of no programs cannot be started
            tokens_M, places_M = torch.sort(bags_Ns.view(-1).int(), stable=True)
            tiles = triton.cdiv(m, _TILE)
            pieces_T2d = grad_Nd.new_empty(tiles, 2, d, dtype=torch.float32)
            # where the last token of each tile ends; the last tile's own ends there
            last_M = tokens_M[_TILE - 1 :: _TILE].contiguous()
            last_tiles_T = (torch.searchsorted(tokens_M, last_M, right=True) - 1) // _TILE
            block, blocks = _blocks(d)
            with torch.cuda.device_of(grad_Nd):
                _sum_tiles[(tiles, blocks)](
                    grad_Nd, tokens_M, places_M, table_grad_Vd, pieces_T2d, m, d, s,
                    TILE=_TILE, BLOCK=block,
                )  # fmt: skip
                if len(last_M):
                    _join_tiles[(len(last_M), blocks)](
                        tokens_M, last_tiles_T, table_grad_Vd, pieces_T2d, d, s,
                        TILE=_TILE, BLOCK=block,
                    )  # fmt: skip
        return table_grad_Vd, None


def _blocks(d: int) -> tuple[int, int]:
    """Columns of one program, a power of two, and how many of them make the width."""
    block = min(triton.next_power_of_2(d), _MAX_BLOCK)
    return block, triton.cdiv(d, block)


@triton.jit
def _mean(table, bags, mean, d, s, BLOCK: tl.constexpr):
    """One position's mean, a block of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(s):
        token = tl.load(bags + row * s + place)
        total += tl.load(table + token * d + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(mean + row * d + columns, total / s, mask=inside)


@triton.jit
def _sum_tiles(
    grad, tokens, places, table_grad, pieces, m, d, s, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums of one tile of the sorted tokens, a block of columns.

    A piece of a token that began in an earlier tile goes to pieces[tile, 0], one that begins here
    and goes on to pieces[tile, 1].
    """
    tile = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tile * TILE
    end = tl.minimum(start + TILE, m)
    token = tl.load(tokens + start).to(tl.int64)
    began_before = tl.load(tokens + start - 1, mask=start > 0, other=-1).to(tl.int64) == token
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(start, end):
        next_token = tl.load(tokens + i).to(tl.int64)
        if next_token != token:
            if began_before:
                tl.store(pieces + tile * 2 * d + columns, total, mask=inside)
            else:
                tl.store(table_grad + token * d + columns, total / s, mask=inside)
            token = next_token
            began_before = tile < 0  # no longer; and of the type that it had
            total = tl.zeros([BLOCK], tl.float32)
        row = tl.load(places + i) // s
        total += tl.load(grad + row * d + columns, mask=inside, other=0.0).to(tl.float32)
    goes_on = tl.load(tokens + end, mask=end < m, other=-1).to(tl.int64) == token
    if began_before:
        tl.store(pieces + tile * 2 * d + columns, total, mask=inside)
    else:
        if goes_on:
            tl.store(pieces + (tile * 2 + 1) * d + columns, total, mask=inside)
        else:
            tl.store(table_grad + token * d + columns, total / s, mask=inside)


@triton.jit
def _join_tiles(
    tokens, last_tiles, table_grad, pieces, d, s, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of a tile's last token, where it begins in this tile and goes on in the next ones."""
    tile = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tile * TILE
    last_tile = tl.load(last_tiles + tile)
    if last_tile > tile:
        token = tl.load(tokens + start + TILE - 1).to(tl.int64)
        began_before = tl.load(tokens + start - 1, mask=start > 0, other=-1).to(tl.int64) == token
        if began_before == 0:
            total = tl.load(pieces + (tile * 2 + 1) * d + columns, mask=inside, other=0.0)
            for other in range(tile + 1, last_tile + 1):
                total += tl.load(pieces + other * 2 * d + columns, mask=inside, other=0.0)
            tl.store(table_grad + token * d + columns, total / s, mask=inside)
