"""What superposition costs a step: the loss and the embedding, against what they stand in for.

    loss     the multi-hot loss of s labels, against the cross-entropy of one
    embed    the mean of s embeddings, against the look-up of one

Forward and backward; on a GPU where there is one.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from tst_ray.bench.measure import Figure, free_gpu_bytes, medians, peak_bytes

_BAGS = (4, 8, 16)


def loss() -> list[Figure]:
    """Time and memory of `linear_multi_hot_cross_entropy`.

    On a CPU N = 512 positions, d = 576, V = 32,768 in float32; on a GPU N = 8,192, d = 576 to
    4,096, V = 128,256 in bfloat16.
    """
    import torch

    if not torch.cuda.is_available():
        return list(_losses(512, 576, 32_768, torch.float32, "cpu"))
    return [
        figure
        for width in (576, 2048, 4096)
        for figure in _losses(8192, width, 128_256, torch.bfloat16, "cuda")
    ]


def _holds_loop(n: int, vocab: int, device: str) -> bool:
    """Whether a device has room for the loop, which keeps the logits once for each label."""
    return device == "cpu" or free_gpu_bytes() > (max(_BAGS) + 4) * 4 * n * vocab


def _losses(n: int, d: int, vocab: int, dtype: Any, device: str) -> Iterator[Figure]:
    import torch
    import torch.nn.functional as F

    from tst_ray.superposition import (
        bag_weights,
        linear_multi_hot_cross_entropy,
        multi_hot_cross_entropy,
    )

    generator = torch.Generator(device).manual_seed(0)
    options: Any = {"generator": generator, "device": device}
    hidden = torch.randn(n, d, dtype=dtype, **options).requires_grad_()
    weight = (torch.randn(vocab, d, dtype=dtype, **options) / d**0.5).requires_grad_()
    targets = torch.randint(vocab, (n, max(_BAGS)), **options)

    def backward(value: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            hidden.grad = weight.grad = None
            value().backward()  # type: ignore[no-untyped-call]

        return call

    def many(s: int, compile: bool = False) -> Callable[[], None]:
        weights = bag_weights("uniform", s).to(device)
        return backward(
            lambda: linear_multi_hot_cross_entropy(
                hidden, weight, targets[:, :s], weights, compile=compile
            )
        )

    one = backward(lambda: F.cross_entropy((hidden @ weight.T).float(), targets[:, 0]))
    loop = backward(
        lambda: multi_hot_cross_entropy(
            hidden @ weight.T, targets, bag_weights("uniform", targets.shape[1]).to(device)
        )
    )
    ours = {f"s = {s}": many(s) for s in _BAGS}
    largest = f"s = {max(_BAGS)}"
    if device == "cuda":  # a CPU has little to gain, and half a minute to wait for its compiler
        ours[f"{largest}, compiled"] = many(max(_BAGS), compile=True)
    calls = {"one": one, **ours}
    loops = _holds_loop(n, vocab, device)
    if loops:
        calls["loop"] = loop
    calls |= {name: backward(call) for name, call in _others(hidden, weight, targets[:, 0])}
    seconds = medians(calls, repeats=5)
    peaks = {name: peak_bytes(call) for name, call in calls.items()}

    shape = f"N {n}, d {d}, V {vocab}"
    yield Figure(f"{shape}: one-target cross-entropy", seconds["one"], "s")
    for name in ours:
        yield Figure(
            f"{shape}: {name}, time against one target", seconds[name] / seconds["one"], "x", 1.05
        )
        yield Figure(
            f"{shape}: {name}, memory against one target", peaks[name] / peaks["one"], "x", 1.05
        )
    if loops:
        yield Figure(
            f"{shape}: a loop of 16 cross-entropies, time against {largest}",
            seconds["loop"] / seconds[largest], "x", at_least=3.0,
        )  # fmt: skip
        yield Figure(
            f"{shape}: the loop's memory against {largest}", peaks["loop"] / peaks[largest], "x",
            at_least=4.0 if device == "cuda" else None,
        )  # fmt: skip
    for name, other in itertools.product(
        [name for name in ours if name.startswith(largest)],
        [name for name in calls if name not in ("one", "loop", *ours)],
    ):
        yield Figure(
            f"{shape}: {name}, time against {other} with one target",
            seconds[name] / seconds[other], "x", 1.0 if device == "cuda" else None,
        )  # fmt: skip


def _others(hidden: Any, weight: Any, labels: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Other fused losses of one target, as far as they are installed."""
    import torch
    import torch.nn.functional as F

    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()  # without it, the logits are whole
        yield (
            "torch's chunked linear_cross_entropy",
            lambda: F.linear_cross_entropy(hidden, weight, labels, options=options),
        )
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_cross_entropy import (  # type: ignore[import-not-found,unused-ignore]
            LigerFusedLinearCrossEntropyLoss,
        )

        yield "Liger's", lambda: LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def embed() -> list[Figure]:
    """Time of `embed_bags` on [n, L, s] tokens, against `F.embedding` of [n, L]."""
    import torch
    import torch.nn.functional as F

    from tst_ray.superposition import embed_bags

    device, dtype = "cpu", torch.float32
    n, length, d, vocab = 4, 1024, 576, 32_768
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
        n, length, d, vocab = 8, 2048, 2048, 128_256
    weight = torch.randn(vocab, d, device=device, dtype=dtype).requires_grad_()
    tokens = torch.randint(vocab, (n, length, max(_BAGS)), device=device)

    def backward(value: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            weight.grad = None
            value().sum().backward()  # type: ignore[no-untyped-call]

        return call

    calls = {"one": backward(lambda: F.embedding(tokens[..., 0], weight))}
    for s in _BAGS:
        calls[f"s = {s}"] = backward(lambda s=s: embed_bags(weight, tokens[..., :s]))  # type: ignore[misc]
    seconds = medians(calls)
    shape = f"{n} x {length} positions, d {d}, V {vocab}"
    figures = [Figure(f"{shape}: look-up of one token a position", seconds["one"], "s")]
    for s in _BAGS:
        ratio = seconds[f"s = {s}"] / seconds["one"]
        figures.append(
            Figure(f"{shape}: s = {s}, time against it", ratio, "x", 1.5 if s == 16 else None)
        )
    return figures
