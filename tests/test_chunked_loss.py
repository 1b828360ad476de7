"""The chunked loss: what it says in float64, and what bfloat16 and the compiler may not take away.

Shape suffixes: N positions, s labels of a position, V vocabulary, d width.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tst_ray.bench.measure import PeakBytes
from tst_ray.chunked_loss import _softmax, chunked_cross_entropy, rows_within

N, V, D = 48, 37, 8


def make(s: int, dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, ...]:
    """(hidden [N, d], weight [V, d], targets [N, s], masses [N, s]), some masses 0."""
    generator = torch.Generator().manual_seed(s)
    hidden = torch.randn(n, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (n, s), generator=generator)
    masses = torch.rand(n, s, generator=generator).to(torch.promote_types(dtype, torch.float32))
    masses[torch.rand(n, s, generator=generator) < 0.3] = 0
    return hidden, weight, targets, masses


def by_hand(hidden: Tensor, weight: Tensor, targets: Tensor, masses: Tensor) -> Tensor:
    """The sum, label by label, in float64."""
    logp_NV = (hidden.double() @ weight.double().T).log_softmax(1)
    return -(masses.double() * logp_NV.gather(1, targets)).sum()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("s", [1, 3])
@pytest.mark.parametrize("chunk_rows", [1, 7, None])
def test_it_is_the_sum_label_by_label(s: int, chunk_rows: int | None) -> None:
    hidden, weight, targets, masses = make(s)
    loss = chunked_cross_entropy(hidden, weight, targets, masses, chunk_rows=chunk_rows)
    exact = by_hand(hidden, weight, targets, masses)
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(gradients(loss, hidden, weight), gradients(exact, hidden, weight))


def test_one_label_a_position_is_plain_cross_entropy() -> None:
    hidden, weight, targets, _ = make(1)
    loss = chunked_cross_entropy(hidden, weight, targets, torch.full((N, 1), 1 / N).double())
    plain = F.cross_entropy(hidden @ weight.T, targets[:, 0])
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for mine, theirs in zip(
        gradients(loss, hidden, weight), gradients(plain, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_a_label_that_is_there_many_times_counts_each_time() -> None:
    hidden, weight, _, masses = make(4)
    same = torch.full((N, 4), 5)
    loss = chunked_cross_entropy(hidden, weight, same, masses)
    exact = by_hand(hidden, weight, same, masses)
    torch.testing.assert_close(gradients(loss, hidden, weight), gradients(exact, hidden, weight))


def test_many_chunks_do_not_round_the_weights_gradient_many_times() -> None:
    """Each chunk's share, added up in bfloat16, would be lost below 1/256 of the sum."""
    hidden, weight, targets, masses = make(1, torch.bfloat16, n=2048)
    hidden.data.abs_()  # so that the shares of the chunks add up
    errors = {}
    for chunk_rows in (2048, 2):
        loss = chunked_cross_entropy(hidden, weight, targets, masses, chunk_rows=chunk_rows)
        exact = by_hand(hidden, weight, targets, masses)
        errors[chunk_rows] = relative(gradients(loss, weight)[0], gradients(exact, weight)[0])
    assert errors[2048] < 2**-8
    assert errors[2] < 2**-8


def test_a_well_predicted_label_keeps_its_gradient_in_bfloat16() -> None:
    """At p = 0.999, p − 1 from a p in bfloat16 would be 0."""
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    target, mass = torch.tensor([[0]]), torch.ones(1, 1)
    (grad,) = gradients(chunked_cross_entropy(hidden, weight, target, mass), weight)
    p = torch.sigmoid(torch.tensor(7.0, dtype=torch.float64))
    assert float(grad[0, 0]) == pytest.approx(float(p - 1), rel=2**-7)


def test_chunks_are_not_in_memory_together() -> None:
    """Of each, at most the logits, their logarithms and, below float32, the gradient's copy."""
    vocab, rows = 4096, 16
    hidden, weight = torch.randn(8 * rows, D).requires_grad_(), torch.randn(vocab, D)
    targets, masses = torch.zeros(8 * rows, 2, dtype=torch.int64), torch.ones(8 * rows, 2)
    with PeakBytes() as counted:
        chunked_cross_entropy(hidden, weight, targets, masses, chunk_rows=rows).backward()
    assert counted.peak < 2.3 * 4 * rows * vocab


def test_logits_are_gone_when_the_weights_gradient_is_made() -> None:
    """It is as large as they are here: it, the softmax, and little else."""
    n = width = 64
    hidden, weight = torch.randn(n, width), torch.randn(8 * n, width).requires_grad_()
    with PeakBytes() as counted:
        targets = torch.zeros(n, 2, dtype=torch.int64)
        chunked_cross_entropy(hidden, weight, targets, torch.ones(n, 2)).backward()
    assert counted.peak < 2.5 * 4 * n * 8 * n


@pytest.mark.parametrize("jointly", [False, True])
def test_without_gradients_the_loss_is_the_same(jointly: bool) -> None:
    hidden, weight, targets, masses = make(3)
    with_grad = chunked_cross_entropy(hidden, weight, targets, masses, jointly=jointly)
    with torch.no_grad():
        without = chunked_cross_entropy(hidden, weight, targets, masses, jointly=jointly)
    assert not without.requires_grad
    assert torch.equal(without, with_grad.detach())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("jointly", [False, True])
def test_compiled_it_is_the_same(dtype: torch.dtype, jointly: bool) -> None:
    results = []
    for compile in (False, True):
        hidden, weight, targets, masses = make(3, dtype)
        loss = chunked_cross_entropy(
            hidden, weight, targets, masses, jointly=jointly, chunk_rows=20, compile=compile
        )
        results.append((loss.detach(), *gradients(loss, hidden, weight)))
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(results[1], results[0], rtol=rounding, atol=rounding / 10)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_compiled_once_for_all_phases(dtype: torch.dtype) -> None:
    """Bags, a last chunk that is smaller, other bags, next tokens: the switch compiles nothing."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s, chunk_rows in ((4, 20), (2, 16), (1, 48)):
            hidden, weight, targets, masses = make(s, dtype)
            loss = chunked_cross_entropy(
                hidden, weight, targets, masses, chunk_rows=chunk_rows, compile=True
            )
            exact = by_hand(hidden, weight, targets, masses)
            rounding = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(loss.double(), exact, rtol=rounding, atol=0)


@pytest.mark.slow
def test_compiled_no_logit_is_in_memory_as_float32() -> None:
    """What its softmax allocates of the size of the logits is their gradient, in bfloat16."""
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    args = torch.randn(N, 4 * V).bfloat16(), torch.zeros(N, 3, dtype=torch.int64), torch.float32
    _, (code,) = run_and_get_code(torch.compile(_softmax), *args)
    allocated = re.findall(rf"empty_strided_\w+\(\({N}, {4 * V}\).*torch\.(\w+)\)", code)
    assert allocated == ["bfloat16"]


def test_rows_that_fit() -> None:
    weight = torch.empty(1000, 4)
    assert rows_within(4000 * 12, weight) == 12
    assert rows_within(1, weight) == 1
