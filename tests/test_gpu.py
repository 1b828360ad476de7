"""What only a CUDA device can show. Every test skips itself without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray import model as model_module
from tst_ray.job import Place
from tst_ray.sharded import Stager
from tst_ray.superposition import (
    bag_weights,
    embed_bags,
    gpu_kernel,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, D, V = 2_048, 576, 128_256


def make_batch(s: int, n: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(s)
    hidden = torch.randn(n, D, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, D, device="cuda") * 0.02).to(torch.bfloat16)
    targets = torch.randint(0, V, (n, s), device="cuda")
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("s", "compile"), [(1, False), (4, False), (16, False), (16, True)])
def test_the_fused_loss_is_the_reference_in_float64(s: int, compile: bool) -> None:
    hidden, weight, targets = make_batch(s)
    weights = bag_weights("power_law", s).cuda()
    loss = linear_multi_hot_cross_entropy(
        hidden, weight, targets, weights, chunk_rows=N // 2 + 100, compile=compile
    )
    loss.backward()
    exact_h = hidden.detach().double().requires_grad_()
    exact_w = weight.detach().double().requires_grad_()
    exact = multi_hot_cross_entropy(exact_h @ exact_w.T, targets, weights.double())
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert relative(hidden.grad, exact_h.grad) < 1e-2
    assert relative(weight.grad, exact_w.grad) < 1e-2


def test_logits_never_exist_whole_nor_s_times() -> None:
    peaks, n = {}, 4 * N
    for s in (1, 16):
        hidden, weight, targets = make_batch(s, n)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_multi_hot_cross_entropy(
            hidden, weight, targets, bag_weights("uniform", s).cuda(), chunk_rows=n // 8
        ).backward()
        peaks[s] = torch.cuda.max_memory_allocated() - before
    whole_logits = n * V * 4
    assert peaks[16] < 1.05 * peaks[1]
    assert peaks[16] < 0.6 * whole_logits  # of a chunk's: bfloat16, float32 twice, its gradient


def test_bags_are_embedded_without_their_embeddings_in_memory() -> None:
    weight = torch.randn(V, D, device="cuda")
    tokens = torch.randint(0, V, (8, 512, 16), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mean = embed_bags(weight, tokens)
    assert torch.cuda.max_memory_allocated() - before < 4 * mean.numel() * 4
    assert torch.allclose(mean, F.embedding(tokens, weight).mean(dim=-2), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "length"), [(1, 50), (3, 50), (5_000, 50), (3, 2)])
def test_the_mean_of_bags_is_that_of_float64(dtype: torch.dtype, vocab: int, length: int) -> None:
    """Tokens whose sums cross no tile, many, and all; and the same bits each time."""
    torch.manual_seed(vocab)
    weight = torch.randn(vocab, 600, device="cuda", dtype=dtype).requires_grad_()
    tokens = (torch.rand(3, length, 7, device="cuda").pow(3) * vocab).long()
    grad = torch.randn(3, length, 600, device="cuda", dtype=dtype)
    exact = weight.detach().double().requires_grad_()
    exact_mean = F.embedding(tokens, exact).mean(dim=-2)
    (exact_grad,) = torch.autograd.grad(exact_mean, exact, grad.double())
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    assert gpu_kernel() is not None
    grads = []
    for _ in range(2):
        mean = embed_bags(weight, tokens)
        grads += torch.autograd.grad(mean, weight, grad)
        assert relative(mean, exact_mean) < rounding
        assert relative(grads[-1], exact_grad) < rounding
    assert torch.equal(*grads)


def test_memory_for_checkpoints_is_pinned_ahead() -> None:
    state = {"w": torch.randn(1000, 33, device="cuda"), "deep": {"step": torch.tensor(3.0), "n": 7}}
    stager = Stager()
    stager.reserve(state)
    staged = stager.stage(state)
    assert staged["deep"]["step"].is_pinned()  # of what copies make for themselves, it is not
    assert staged["w"].is_pinned() and not staged["w"].is_cuda
    assert torch.equal(staged["w"], state["w"].cpu())
    assert staged["deep"]["step"] == 3 and staged["deep"]["n"] == 7
    state["w"].zero_()
    assert staged["w"].any()
    assert stager.stage(state)["w"].data_ptr() == staged["w"].data_ptr()


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_in_bfloat16_on_the_device(
    tmp_path: Path, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both phases under FSDP2's mixed precision, a group a block, the logits in chunks."""
    monkeypatch.setattr(model_module, "_ONE_GROUP_BYTES", 0)
    monkeypatch.setattr(model_module, "WHOLE_LOGITS_BYTES", 20 * 97 * 4)
    manifest = make_corpus(tmp_path / "corpus")
    config = make_config(
        tmp_path,
        manifest,
        train__precision="bfloat16",
        train__compile=str(compile).lower(),
        train__activation_checkpointing="true",
    )
    reference = make_config(tmp_path, manifest, run__name="reference")
    device = run_inline(make_job(config, manifest), Place(device="cuda"))
    cpu = run_inline(make_job(reference, manifest))
    assert [r["data_digest"] for r in device] == [r["data_digest"] for r in cpu]
    for a, b in zip(device, cpu, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert a["memory_bytes"] > 0
    assert device[-1]["val_loss"] == pytest.approx(cpu[-1]["val_loss"], rel=2e-2)


@pytest.mark.slow
def test_two_ranks_then_one_train_what_one_does(tmp_path: Path) -> None:
    """FSDP2's collectives on device memory, and a checkpoint of two ranks read by one.

    Over gloo: NCCL wants a device for each rank.
    """
    manifest = make_corpus(tmp_path / "corpus")
    jobs = [
        make_job(make_config(tmp_path, manifest, run__name=name), manifest)
        for name in ("one", "two")
    ]
    mp.spawn(two_ranks, (tmp_path / "store", replace(jobs[1], last_step=4)), nprocs=2)
    one, two = (run_inline(job, Place(device="cuda")) for job in jobs)
    assert [record["world_size"] for record in two] == [2] * 4 + [1] * 4
    for a, b in zip(one, two, strict=True):
        assert a["data_digest"] == b["data_digest"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def two_ranks(rank: int, store: Path, job: Any) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    model_module._ONE_GROUP_BYTES = 0
    run_inline(job, Place(rank, 2, "cuda"))
    dist.barrier()
    dist.destroy_process_group()
