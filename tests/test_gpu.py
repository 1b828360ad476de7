"""What only a CUDA device can show. Every test skips itself without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray import model as model_module
from tst_ray.job import Place
from tst_ray.superposition import (
    bag_weights,
    embed_bags,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N, D, V = 2_048, 576, 128_256


def make_batch(s: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(s)
    hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, D, device="cuda") * 0.02).to(torch.bfloat16)
    targets = torch.randint(0, V, (N, s), device="cuda")
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("s", [1, 4, 16])
def test_the_fused_loss_is_the_reference_in_float64(s: int) -> None:
    hidden, weight, targets = make_batch(s)
    weights = bag_weights("power_law", s).cuda()
    loss = linear_multi_hot_cross_entropy(hidden, weight, targets, weights)
    loss.backward()
    exact_h = hidden.detach().double().requires_grad_()
    exact_w = weight.detach().double().requires_grad_()
    exact = multi_hot_cross_entropy(exact_h @ exact_w.T, targets, weights.double())
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    assert relative(hidden.grad, exact_h.grad) < 1e-2
    assert relative(weight.grad, exact_w.grad) < 1e-2


def test_logits_never_exist_whole_nor_s_times() -> None:
    peaks = {}
    for s in (1, 16):
        hidden, weight, targets = make_batch(s)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_multi_hot_cross_entropy(
            hidden, weight, targets, bag_weights("uniform", s).cuda()
        ).backward()
        peaks[s] = torch.cuda.max_memory_allocated() - before
    whole_logits = N * V * 4
    assert peaks[16] < 1.05 * peaks[1]
    assert peaks[16] < 1.5 * whole_logits  # 16 copies would be 16


def test_bags_are_embedded_without_their_embeddings_in_memory() -> None:
    weight = torch.randn(V, D, device="cuda")
    tokens = torch.randint(0, V, (8, 512, 16), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mean = embed_bags(weight, tokens)
    assert torch.cuda.max_memory_allocated() - before < 4 * mean.numel() * 4
    assert torch.allclose(mean, F.embedding(tokens, weight).mean(dim=-2), atol=1e-5)


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
