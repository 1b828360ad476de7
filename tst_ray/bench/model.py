"""A whole training step of the shipped models, in one process, over tokens already in memory.

mfu    tokens/s, utilisation and memory: next tokens, bags of 16, and transformers by itself

On a GPU the published shapes that fit it, in bfloat16 and compiled, as their files say; on a CPU
the demo's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

from tst_ray.bench.measure import Figure, medians
from tst_ray.config import Config, load_config
from tst_ray.plan import Phase, build_plan, flops_per_step, memory_per_worker

_ON_GPU = {"paper-270m": (16, None), "paper-600m": (16, 0.5), "paper-3b": (8, 0.5)}
_ON_CPU = {"demo": (16, None)}
"""Sequences of a step, and the utilisation to reach."""

_BAG = 16
_WARM_STEPS, _STEPS = 3, 20

Step = Callable[[], None]


def mfu() -> list[Figure]:
    """Steps of each model that fits, the largest last."""
    import torch

    models = _ON_GPU if torch.cuda.is_available() else _ON_CPU
    return [f for name, (rows, least) in models.items() for f in _measured(name, rows, least)]


def _measured(name: str, rows: int, least: float | None) -> Iterator[Figure]:
    import torch

    from tst_ray.architecture import describe, hf_config
    from tst_ray.speed import peak_flops

    on_gpu = torch.cuda.is_available()
    config = load_config(
        name,
        [
            f"--train.batch_size={rows}", f"--train.micro_batch_size={rows}", "--train.steps=2",
            "--train.warmup=0", "--train.decay=0", f"--tst.bag_size={_BAG}", "--tst.ratio=0.5",
        ],
    )  # fmt: skip
    vocab_size = config.model.config.get("vocab_size") or config.data.vocab_size
    hf = hf_config(config.model, vocab_size=vocab_size, eot_token=0)
    _release()
    plan, shape = build_plan(config), describe(hf)
    bags, tokens = plan.phases
    estimate = memory_per_worker(shape, plan, bags, 1, config.train)["total"]
    if on_gpu and estimate > torch.cuda.mem_get_info()[0]:
        return
    steps, held = _ours(hf, config, plan.phases)
    # transformers makes the logits whole, and its loss some copies of them
    plain = estimate + 14 * tokens.latent_tokens_per_step * vocab_size
    if not on_gpu or plain < torch.cuda.mem_get_info()[0]:
        steps["transformers"] = _plain(hf, config, (rows, tokens.latent_length + 1))
    seconds = medians(steps, repeats=_STEPS)

    speed = tokens.latent_tokens_per_step / seconds["tokens"]
    yield Figure(f"{name}: next tokens", speed, "tokens/s")
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    if peak:
        used = flops_per_step(shape, tokens) / seconds["tokens"] / peak
        yield Figure(f"{name}: share of the device's arithmetic", used, "x", at_least=least)
    ratios = {
        f"a step in bags of {_BAG}": ("bags", 1.10),
        "transformers' own": ("transformers", None),
    }
    for what, (kind, most) in ratios.items():
        if kind in seconds:
            ratio = seconds[kind] / seconds["tokens"]
            yield Figure(f"{name}: {what}, time against that", ratio, "x", most)
    if on_gpu:
        yield Figure(f"{name}: memory held", held / 1e9, "GB")
        yield Figure(f"{name}: the same, against the plan's estimate", held / estimate, "x")


def _release() -> None:
    """Give back what the models before held, compiled code included."""
    import torch

    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def _ours(hf: Any, config: Config, phases: tuple[Phase, ...]) -> tuple[dict[str, Step], int]:
    """A step in bags and one of next tokens, and the most bytes that they hold (of a GPU)."""
    import torch

    from tst_ray.model import build_model

    device = _device()
    train = config.train
    model = build_model(
        hf,
        seed=0,
        device=device,
        precision=train.precision,
        compile=train.compile,
        activation_checkpointing=train.activation_checkpointing,
    )
    step = _step_of(model, config)

    def of(phase: Phase) -> Step:
        rows = (phase.num_sequences, phase.latent_length + 1)
        shape = rows if phase.bag_size == 1 else (*rows, phase.bag_size)
        tokens = torch.randint(hf.vocab_size, shape, device=device)
        return lambda: step(lambda: model(tokens, phase).objective)

    steps = {"bags" if phase.bag_size > 1 else "tokens": of(phase) for phase in phases}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    medians(steps, repeats=_WARM_STEPS)
    return steps, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _plain(hf: Any, config: Config, rows: tuple[int, int]) -> Step:
    """A step of next tokens as transformers and FSDP2 do it by themselves."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    from tst_ray.architecture import anatomy

    device = _device()
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32).to(device).train()
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    blocks = anatomy(model).blocks
    if config.train.compile:
        for block in blocks:
            block.compile()
    if config.train.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in [*blocks, model]:
            fully_shard(module, mp_policy=policy)
    tokens = torch.randint(hf.vocab_size, rows, device=device)[:, :-1].contiguous()
    step = _step_of(model, config)
    medians({"warm": lambda: step(lambda: _loss(model, tokens))}, repeats=_WARM_STEPS)
    return lambda: step(lambda: _loss(model, tokens))


def _loss(model: Any, tokens: Any) -> Any:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _step_of(model: Any, config: Config) -> Callable[[Callable[[], Any]], None]:
    """What trains a model on what a call gives: backward, clipping, the optimizer's step."""
    from tst_ray.optim import build_optimizer, clip_grad_norm

    optimizer = build_optimizer(model, config.train)

    def step(objective: Callable[[], Any]) -> None:
        objective().backward()
        clip_grad_norm(model, config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
