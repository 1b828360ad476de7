"""A whole training step of the shipped models, in one process, over tokens already in memory.

mfu    tokens/s, utilisation and memory: next tokens, bags of 16, and transformers by itself

On a GPU the published shapes that fit it, as their files say: in bfloat16, compiled, and one
worker's share of the batch in its micro-batches. On a CPU the demo's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tst_ray.bench.measure import Figure, free_gpu_bytes, medians
from tst_ray.config import load_config
from tst_ray.estimates import flops_per_step, memory_per_worker
from tst_ray.plan import Phase, build_plan
from tst_ray.settings import Config

_ON_GPU = {"paper-270m": None, "paper-600m": 0.5, "paper-3b": 0.5}
_ON_CPU = {"demo": None}
"""The models, and the utilisation to reach."""

_BAG = 16

Step = Callable[[], None]


def mfu() -> list[Figure]:
    """Steps of each model that fits, the largest last."""
    import torch

    models = _ON_GPU if torch.cuda.is_available() else _ON_CPU
    return [figure for name, least in models.items() for figure in _measured(name, least)]


def _measured(name: str, least: float | None) -> Iterator[Figure]:
    import torch

    from tst_ray.architecture import describe
    from tst_ray.model_config import hf_config
    from tst_ray.speed import peak_flops

    on_gpu = torch.cuda.is_available()
    config = _one_workers_share(name)
    vocab_size = config.model.config.get("vocab_size") or config.data.vocab_size
    hf = hf_config(config.model, vocab_size=vocab_size, eot_token=0)
    _release()
    plan, shape = build_plan(config), describe(hf)
    bags, tokens = plan.phases
    estimate = memory_per_worker(shape, plan, bags, 1, config.train)["total"]
    if on_gpu and estimate > free_gpu_bytes():
        return
    steps, held = _ours(hf, config, plan.phases)
    height = config.train.micro_batch_size or tokens.num_sequences
    if on_gpu:  # transformers makes the logits whole, and its loss some copies of them
        fit = (free_gpu_bytes() - estimate) // (14 * tokens.latent_length * vocab_size)
        height = _even_height(tokens.num_sequences, min(height, fit))
    if height:
        steps["transformers"] = _plain(hf, config, tokens, height)
    seconds = medians(steps, repeats=3 if on_gpu else 20)

    speed = tokens.latent_tokens_per_step / seconds["tokens"]
    yield Figure(f"{name}: next tokens", speed, "tokens/s")
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    if peak:
        used = flops_per_step(shape, tokens) / seconds["tokens"] / peak
        yield Figure(f"{name}: share of the device's arithmetic", used, "x", at_least=least)
    ratios = {
        f"a step in bags of {_BAG}": ("bags", 1.10),
        f"transformers' own, {height} sequences at once": ("transformers", None),
    }
    for what, (kind, most) in ratios.items():
        if kind in seconds:
            ratio = seconds[kind] / seconds["tokens"]
            yield Figure(f"{name}: {what}, time against that", ratio, "x", most)
    if on_gpu:
        yield Figure(f"{name}: memory held", held / 1e9, "GB")
        yield Figure(f"{name}: the same, against the plan's estimate", held / estimate, "x")


def _one_workers_share(name: str) -> Config:
    """A shipped run as one of its workers sees it, in as few steps as may be."""
    config = load_config(name)
    rows = math.ceil(config.train.batch_size / config.cluster.workers[1])
    return load_config(
        name,
        [
            f"--train.batch_size={rows}", "--cluster.workers=1", "--tst.workers=null",
            "--train.steps=2", "--train.warmup=0", "--train.decay=0",
            f"--tst.bag_size={_BAG}", "--tst.ratio=0.5",
        ],
    )  # fmt: skip


def _even_height(rows: int, most: int) -> int:
    """Rows of micro-batches of one size, `most` of them at most; 0 where none fits.

    With a smaller one at the end, compiled code would be that of any size.
    """
    return max((height for height in range(1, most + 1) if rows % height == 0), default=0)


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
        weights=False,
        device=device,
        precision=train.precision,
        compile=train.compile,
        activation_checkpointing=train.activation_checkpointing,
        reshard=train.reshard,
    )
    _fill(model)
    step = _step_of(model, config)

    def of(phase: Phase) -> Step:
        rows = (phase.num_sequences, phase.latent_length + 1)
        shape = rows if phase.bag_size == 1 else (*rows, phase.bag_size)
        tokens = torch.randint(hf.vocab_size, shape, device=device)
        pieces = tokens.split(train.micro_batch_size or len(tokens))

        def loss(piece: Any, is_last: bool) -> Any:
            model.set_last_micro_batch(is_last)
            return model(piece, phase).objective

        return lambda: step(pieces, loss)

    steps = {"bags" if phase.bag_size > 1 else "tokens": of(phase) for phase in phases}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    medians(steps, repeats=1)
    return steps, torch.cuda.max_memory_allocated() if device == "cuda" else 0


def _plain(hf: Any, config: Config, phase: Phase, height: int) -> Step:
    """A step of next tokens as transformers and FSDP2 do it by themselves, `height` rows a time."""
    import torch
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    from tst_ray.architecture import anatomy

    device = _device()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32, trust_remote_code=False)
        model.train()
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
    tokens = torch.randint(hf.vocab_size, (phase.num_sequences, phase.latent_length), device=device)
    pieces = tokens.split(height)
    step = _step_of(model, config)

    def loss(piece: Any, is_last: bool) -> Any:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
            model.set_is_last_backward(is_last)
        return model(input_ids=piece, labels=piece, use_cache=False).loss / len(pieces)

    medians({"warm": lambda: step(pieces, loss)}, repeats=1)
    return lambda: step(pieces, loss)


def _fill(model: Any) -> None:
    """Weights as large as a new model's, made where they are: on a CPU it takes minutes."""
    import torch

    for parameter in model.parameters():
        value = parameter.data
        local = value.to_local() if hasattr(value, "to_local") else value
        if local.dim() < 2:
            torch.nn.init.ones_(local)
        else:
            torch.nn.init.normal_(local, std=0.02)


def _step_of(model: Any, config: Config) -> Callable[[Sequence[Any], Callable[..., Any]], None]:
    """What trains a model on micro-batches: backward of each, clipping, the optimizer's step."""
    from tst_ray.optim import build_optimizer, clip_grad_norm

    optimizer = build_optimizer(model, config.train)

    def step(pieces: Sequence[Any], loss: Callable[[Any, bool], Any]) -> None:
        for number, piece in enumerate(pieces):
            loss(piece, number == len(pieces) - 1).backward()
        clip_grad_norm(model, config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
