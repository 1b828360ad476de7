"""What checkpoints cost: `checkpoint`, in one process, against torch's own files.

With the demo's model, 5 MB of state, and with a model of 200 MB.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tst_ray.bench.measure import Figure
from tst_ray.storage import Storage

_SIZES: dict[int, dict[str, int]] = {
    10: {},
    3: {"hidden_size": 576, "num_hidden_layers": 5, "intermediate_size": 1536},
}
"""How many saves are timed, of the demo's model with what changes."""


def checkpoint() -> list[Figure]:
    """What the loop waits for a save, how long until it is committed, and how long a load takes."""
    return [
        figure for saves, changes in _SIZES.items() for figure in _measured(_state(changes), saves)
    ]


def _measured(state: dict[str, Any], saves: int) -> list[Figure]:
    import torch

    from tst_ray.checkpoint import find_good
    from tst_ray.checkpointer import Checkpointer

    num_bytes = sum(t.numel() * t.element_size() for t in _tensors(state))
    stall: dict[str, list[float]] = {"foreground": [], "background": []}
    commit: list[float] = []
    load: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, waits in stall.items():
            saver = Checkpointer(
                Storage(f"{folder}/{kind}"),
                keep=2,
                background=kind == "background",
                on_event=lambda name, **details: None,
            )
            for step in range(1, saves + 1):
                started = time.perf_counter()
                saver.save(step, state, {})
                waits.append(time.perf_counter() - started)
                saver.wait()
                if kind == "background":
                    commit.append(time.perf_counter() - started)
        for _ in range(saves):
            started = time.perf_counter()
            info = find_good([saver.root], lambda name, **details: None)
            assert info is not None
            saver.load(info, state)
            load.append(time.perf_counter() - started)
        plain = f"{folder}/plain.pt"
        torch_save = [_timed(lambda: torch.save(state, plain)) for _ in range(saves)]
        torch_load = [_timed(lambda: torch.load(plain)) for _ in range(saves)]
    fore, back = (statistics.median(values) for values in stall.values())
    committed, saved = statistics.median(commit), statistics.median(torch_save)
    loaded, plain_loaded = statistics.median(load), statistics.median(torch_load)
    size = f"{num_bytes / 1e6:.0f} MB: "
    figures = [
        Figure("stall, foreground", fore * 1e3, "ms"),
        Figure("stall, background", back * 1e3, "ms"),
        Figure("background against foreground", back / fore, "x", 0.05),
        Figure("until committed and hashed", committed * 1e3, "ms"),
        Figure("the same, against torch.save", committed / saved, "x", 1.2),
        Figure("found, verified and loaded", loaded * 1e3, "ms"),
        Figure("the same, against torch.load", loaded / plain_loaded, "x"),
    ]
    return [replace(figure, what=size + figure.what) for figure in figures]


def _state(changes: dict[str, int]) -> dict[str, Any]:
    import torch

    from tst_ray.architecture import hf_config
    from tst_ray.config import load_config
    from tst_ray.model import build_model
    from tst_ray.optim import build_optimizer
    from tst_ray.worker import full_state

    overrides = [f"--model.config.{name}={value}" for name, value in changes.items()]
    config = load_config(None, overrides)
    model = build_model(
        hf_config(config.model, vocab_size=config.data.vocab_size, eot_token=0), seed=0
    )
    optimizer = build_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return full_state(model, optimizer)


def _tensors(state: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
