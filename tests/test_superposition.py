"""Superposition against a straightforward float64 reimplementation of the reference arithmetic.

Shape suffixes: N positions, s places of a bag, V vocabulary, d width.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tst_ray.superposition import (
    WEIGHTINGS,
    bag_weights,
    embed_bags,
    gpu_kernel,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
    multi_hot_cross_entropy_alt,
)

N, V, D = 23, 37, 8
IGNORE = -100


def make(s: int, ignored: float = 0.0, dtype: torch.dtype = torch.float64) -> Iterator[Any]:
    """(hidden [N, d], weight [V, d], targets [N, s]), always the same."""
    generator = torch.Generator().manual_seed(s)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N, s), generator=generator)
    targets[torch.rand(N, s, generator=generator) < ignored] = IGNORE
    yield hidden.to(dtype).requires_grad_()
    yield weight.to(dtype).requires_grad_()
    yield targets


def by_hand_mce(logits: Tensor, targets: Tensor, weights: Tensor, ignore: int = IGNORE) -> Tensor:
    """The loss label by label: log-softmax, a mean for each place, the weighted sum of these."""
    log_p = logits.log_softmax(dim=1)
    total = logits.new_zeros(())
    for i in range(targets.shape[1]):
        terms = [-log_p[n, targets[n, i]] for n in range(len(targets)) if targets[n, i] != ignore]
        if terms:
            total = total + weights[i] * torch.stack(terms).mean()
    return total


def by_hand_alt(logits: Tensor, targets: Tensor, weights: Tensor, ignore: int = IGNORE) -> Tensor:
    """−log of the mass that the softmax puts on the bag, a mean over positions with a label."""
    p = logits.softmax(dim=1)
    terms = []
    for n in range(len(targets)):
        labels = [y for y in targets[n].tolist() if y != ignore]
        if labels:
            terms.append(-torch.log(p[n, labels].sum()))
    return torch.stack(terms).mean() if terms else logits.sum() * 0


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=True)


# -- bags as inputs ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_embed_bags_is_the_float32_mean(dtype: torch.dtype) -> None:
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = torch.randint(0, V, (3, 5, 7), generator=torch.Generator().manual_seed(1))
    bags = embed_bags(weight, tokens)
    assert bags.shape == (3, 5, D)
    assert bags.dtype == dtype
    exact = weight.double()[tokens].mean(dim=2)
    rounding = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    torch.testing.assert_close(bags.double(), exact, rtol=rounding, atol=1e-7)


def test_embed_bags_gradient() -> None:
    _, weight, tokens = make(4)
    grad = torch.randn(N, D, dtype=torch.float64)
    expected = gradients((weight[tokens].mean(dim=1) * grad).sum(), weight)
    torch.testing.assert_close(
        gradients((embed_bags(weight, tokens) * grad).sum(), weight), expected
    )


@pytest.mark.parametrize("n", [0, 3])
def test_tokens_without_a_bag_have_no_gradient(n: int) -> None:
    weight, tokens = torch.randn(V, D, requires_grad=True), torch.randint(1, V - 1, (n, 4))
    (table_grad,) = gradients(embed_bags(weight, tokens).sum(), weight)
    seen = torch.zeros(V, dtype=torch.bool).index_fill(0, tokens.flatten(), True)
    assert torch.equal(table_grad[~seen], torch.zeros_like(table_grad[~seen]))
    assert table_grad.sum() == pytest.approx(n * D, rel=1e-6)


@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_embed_bags_of_any_layout(layout: str) -> None:
    """Tokens may be a part of a larger tensor, in int32 too; so may the bags' gradient."""
    weight = torch.randn(V, D, requires_grad=True)
    wide = torch.randint(0, V, (N, 8), dtype=torch.int32)
    tokens = wide[:, :4] if layout == "slice" else wide.T[:4].T
    grad = torch.randn(D, N).T
    expected = gradients((weight[tokens.long()].mean(dim=1) * grad).sum(), weight)
    torch.testing.assert_close(
        gradients((embed_bags(weight, tokens) * grad).sum(), weight), expected
    )


def test_a_bag_of_one_is_a_look_up() -> None:
    _, weight, tokens = make(1)
    assert torch.equal(embed_bags(weight, tokens), F.embedding(tokens[:, 0], weight))


# -- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("s", [1, 2, 6, 16, 1000])
def test_weights_sum_to_one(weighting: str, s: int) -> None:
    weights = bag_weights(weighting, s, torch.float64)
    assert weights.shape == (s,)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((weights >= 0).all())
    assert bag_weights(weighting, s).dtype == torch.float32


@pytest.mark.parametrize(
    ("weighting", "g"),
    [
        ("uniform", lambda i: 1.0),
        ("power_law", lambda i: 1 / i),
        ("exponential", lambda i: math.exp(-i)),
        ("first_token", lambda i: 1.0 if i == 1 else 0.0),
        ("mutual_information", lambda i: 3.63 + 1.35 * i**-1.25),
    ],
)
def test_weights_are_the_papers(weighting: str, g: Callable[[int], float]) -> None:
    values = [g(i) for i in range(1, 7)]
    expected = torch.tensor([value / sum(values) for value in values], dtype=torch.float64)
    torch.testing.assert_close(bag_weights(weighting, 6, torch.float64), expected)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="weighting = 'linear': must be one of uniform"):
        bag_weights("linear", 4)
    with pytest.raises(ValueError, match="bag_size = 0"):
        bag_weights("uniform", 0)
    hidden, weight, targets = make(2)
    with pytest.raises(ValueError, match="loss = 'hinge'"):
        linear_multi_hot_cross_entropy(hidden, weight, targets, torch.ones(2), loss="hinge")  # type: ignore[arg-type]


# -- the losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_losses_and_gradients_match_the_arithmetic(
    loss: Any, weighting: str, s: int, ignored: float
) -> None:
    hidden, weight, targets = make(s, ignored)
    weights = bag_weights(weighting, s, torch.float64)
    by_hand = by_hand_mce if loss == "mce" else by_hand_alt
    expected = by_hand(hidden @ weight.T, targets, weights)
    expected_grads = gradients(expected, hidden, weight)

    logits = hidden @ weight.T
    if loss == "mce":
        reference = multi_hot_cross_entropy(logits, targets, weights)
    else:
        reference = multi_hot_cross_entropy_alt(logits, targets)
    fused = linear_multi_hot_cross_entropy(hidden, weight, targets, weights, loss=loss)
    for value in (reference, fused):
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, hidden, weight), expected_grads)


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
def test_gradcheck(loss: Any) -> None:
    hidden, weight, targets = make(3, ignored=0.3)
    weights = bag_weights("power_law", 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_multi_hot_cross_entropy(
            h, w, targets, weights, loss=loss, chunk_rows=5
        ),
        (hidden, weight),
    )


def test_one_label_is_plain_cross_entropy() -> None:
    hidden, weight, targets = make(1, ignored=0.2)
    plain = F.cross_entropy(hidden @ weight.T, targets[:, 0])
    one = torch.ones(1, dtype=torch.float64)
    for loss in ("mce", "mce_alt"):
        fused = linear_multi_hot_cross_entropy(hidden, weight, targets, one, loss=loss)  # type: ignore[arg-type]
        torch.testing.assert_close(fused, plain)
        torch.testing.assert_close(
            gradients(fused, hidden, weight), gradients(plain, hidden, weight)
        )
    torch.testing.assert_close(multi_hot_cross_entropy(hidden @ weight.T, targets, one), plain)


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
def test_order_inside_the_bag_does_not_matter_under_uniform_weights(loss: Any) -> None:
    """A single-hot loss has the same value at the start of training; it fails here."""
    hidden, weight, targets = make(4)
    shuffled = targets[:, [2, 0, 3, 1]]
    uniform = bag_weights("uniform", 4, torch.float64)
    first = linear_multi_hot_cross_entropy(hidden, weight, targets, uniform, loss=loss)
    second = linear_multi_hot_cross_entropy(hidden, weight, shuffled, uniform, loss=loss)
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(gradients(first, hidden, weight), gradients(second, hidden, weight))


def test_every_place_counts_and_by_its_weight() -> None:
    hidden, weight, targets = make(4)
    weights = bag_weights("power_law", 4, torch.float64)
    before = linear_multi_hot_cross_entropy(hidden, weight, targets, weights)
    for place in range(4):
        other = targets.clone()
        other[:, place] = (other[:, place] + 1) % V
        after = linear_multi_hot_cross_entropy(hidden, weight, other, weights)
        z = hidden @ weight.T
        change = z.gather(1, targets[:, [place]]) - z.gather(1, other[:, [place]])
        torch.testing.assert_close(after - before, weights[place] * change.mean())


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
@pytest.mark.parametrize("chunk_rows", [1, 7, N, 10 * N])
def test_chunking_changes_nothing(loss: Any, chunk_rows: int) -> None:
    hidden, weight, targets = make(3, ignored=0.3)
    weights = bag_weights("exponential", 3, torch.float64)
    whole = linear_multi_hot_cross_entropy(hidden, weight, targets, weights, loss=loss)
    pieces = linear_multi_hot_cross_entropy(
        hidden, weight, targets, weights, loss=loss, chunk_rows=chunk_rows
    )
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(gradients(pieces, hidden, weight), gradients(whole, hidden, weight))


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
def test_what_the_sum_is_divided_by_may_be_given(loss: Any) -> None:
    """The targets of all micro-batches and workers, say."""
    hidden, weight, targets = make(3)
    weights = bag_weights("power_law", 3, torch.float64)
    mean = linear_multi_hot_cross_entropy(hidden, weight, targets, weights, loss=loss)
    halves = [
        linear_multi_hot_cross_entropy(
            hidden[rows], weight, targets[rows], weights, loss=loss, divisor=N
        )
        for rows in (slice(0, 9), slice(9, N))
    ]
    torch.testing.assert_close(sum(halves), mean)


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
@pytest.mark.parametrize("divisor", [None, 3.0])
def test_no_valid_label_is_zero_and_not_nan(loss: Any, divisor: float | None) -> None:
    hidden, weight, targets = make(3)
    nothing = torch.full_like(targets, IGNORE)
    weights = bag_weights("uniform", 3, torch.float64)
    value = linear_multi_hot_cross_entropy(
        hidden, weight, nothing, weights, loss=loss, divisor=divisor
    )
    assert value.item() == 0
    for grad in gradients(value, hidden, weight):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert multi_hot_cross_entropy(hidden @ weight.T, nothing, weights).item() == 0
    assert multi_hot_cross_entropy_alt(hidden @ weight.T, nothing).item() == 0


def test_another_ignore_index() -> None:
    hidden, weight, targets = make(2, ignored=0.3)
    weights = bag_weights("uniform", 2, torch.float64)
    expected = by_hand_mce(hidden @ weight.T, targets, weights)
    other = targets.masked_fill(targets == IGNORE, 5_000)
    for value in (
        multi_hot_cross_entropy(hidden @ weight.T, other, weights, ignore_index=5_000),
        linear_multi_hot_cross_entropy(hidden, weight, other, weights, 5_000),
    ):
        torch.testing.assert_close(value, expected)


def test_the_loss_at_the_start_is_log_v() -> None:
    _, weight, targets = make(4)
    hidden = torch.zeros(N, D, dtype=torch.float64)
    value = linear_multi_hot_cross_entropy(hidden, weight, targets, bag_weights("uniform", 4))
    assert value.item() == pytest.approx(math.log(V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_than_float64(dtype: torch.dtype) -> None:
    """The softmax is float32 whatever the inputs; gradients come back in the inputs' dtype."""
    hidden, weight, targets = make(4, ignored=0.2, dtype=dtype)
    weights = bag_weights("power_law", 4)
    value = linear_multi_hot_cross_entropy(hidden, weight, targets, weights, chunk_rows=6)
    assert value.dtype == torch.float32
    logits = (hidden @ weight.T).double()
    exact = by_hand_mce(logits, targets, weights.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(
        gradients(value, hidden, weight), gradients(exact, hidden, weight), strict=True
    ):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance / 10)


def test_the_gradient_is_multiplied_by_what_comes_back() -> None:
    hidden, weight, targets = make(2)
    value = linear_multi_hot_cross_entropy(hidden, weight, targets, bag_weights("uniform", 2))
    once = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * value, (hidden, weight))
    torch.testing.assert_close(thrice, tuple(3 * grad for grad in once))


# -- memory ------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the largest storage, in bytes, that any result lies in, and counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.num_bytes = max(self.num_bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("loss", ["mce", "mce_alt"])
def test_logits_never_exist_whole_and_never_s_times(loss: Any) -> None:
    n, v, d, s, chunk_rows = 64, 512, 16, 8, 16
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    targets = torch.randint(0, v, (n, s))
    with Largest() as largest:
        linear_multi_hot_cross_entropy(
            hidden, weight, targets, bag_weights("uniform", s), loss=loss, chunk_rows=chunk_rows
        ).backward()
    assert largest.num_bytes <= max(chunk_rows * v, v * d) * 4


def test_bags_are_never_embedded_one_by_one() -> None:
    weight, tokens = torch.randn(64, 16, requires_grad=True), torch.randint(0, 64, (32, 8))
    with Largest() as largest:
        embed_bags(weight, tokens).sum().backward()
    assert largest.num_bytes <= max(64 * 16 * 4, 32 * 8 * 8)


def test_no_gradient_work_without_gradients() -> None:
    hidden, weight, targets = make(2)
    weights = bag_weights("uniform", 2, torch.float64)
    expected = linear_multi_hot_cross_entropy(hidden, weight, targets, weights).item()
    with torch.no_grad(), Largest() as largest:
        value = linear_multi_hot_cross_entropy(hidden, weight, targets, weights, chunk_rows=2)
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected)
    assert largest.calls["mm"] == math.ceil(N / 2)


def test_where_the_gpu_kernel_does_not_work_torch_does_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it works here")
    gpu_kernel.cache_clear()
    assert gpu_kernel() is None
    assert "averaged by torch" in caplog.text
