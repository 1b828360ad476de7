"""What checkpoints cost: `checkpoint`, in one process, against torch's own files.

With the demo's model, 5 MB of state, and with a model of 200 MB.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tst_ray.bench.measure import Figure
from tst_ray.storage import Storage

_SIZES: dict[int, dict[str, int]] = {
    20: {},
    8: {"hidden_size": 576, "num_hidden_layers": 5, "intermediate_size": 1536},
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
    seconds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        plain = f"{folder}/plain.pt"

        def on_event(kind: str, **details: Any) -> None:
            committed_at.append(time.perf_counter())

        committed_at: list[float] = []
        savers = {
            kind: Checkpointer(
                Storage(f"{folder}/{kind}"),
                keep=2,
                background=kind == "background",
                on_event=on_event,
            )
            for kind in ("foreground", "background")
        }

        def saved(kind: str, step: int) -> None:
            started = time.perf_counter()
            savers[kind].save(step, state, {})
            seconds[kind].append(time.perf_counter() - started)
            savers[kind].wait()
            seconds[f"{kind}, committed"].append(committed_at[-1] - started)

        def loaded() -> None:
            root = savers["background"].root
            info = find_good([root], lambda name, **details: None)
            assert info is not None
            savers["background"].load(info, state)

        # They take turns, so that what disturbs the machine disturbs all alike.
        for step in range(1, saves + 1):
            saved("foreground", step)
            saved("background", step)
            for name, call in {
                "torch.save": lambda: torch.save(state, plain),
                "to disk": lambda: _save_to_disk(state, plain),
                "load": loaded,
                "torch.load": lambda: torch.load(plain),
            }.items():
                seconds[name].append(_timed(call))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    committed = median["background, committed"]
    size = f"{num_bytes / 1e6:.0f} MB: "
    figures = [
        Figure("stall, foreground", median["foreground"] * 1e3, "ms"),
        Figure("stall, background", median["background"] * 1e3, "ms"),
        Figure(
            "background against foreground", median["background"] / median["foreground"], "x", 0.05
        ),
        Figure("until committed and hashed", committed * 1e3, "ms"),
        Figure("the same, against torch.save to the disk", committed / median["to disk"], "x", 1.2),
        Figure("the same, against torch.save alone", committed / median["torch.save"], "x"),
        Figure("found, verified and loaded", median["load"] * 1e3, "ms"),
        Figure("the same, against torch.load", median["load"] / median["torch.load"], "x"),
    ]
    return [replace(figure, what=size + figure.what) for figure in figures]


def _state(changes: dict[str, int]) -> dict[str, Any]:
    import torch

    from tst_ray.config import load_config
    from tst_ray.model import build_model
    from tst_ray.model_config import hf_config
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


def _save_to_disk(state: dict[str, Any], path: str) -> None:
    """What `torch.save` leaves to the operating system: a checkpoint must outlive its machine."""
    import torch

    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _tensors(state: Any) -> list[Any]:
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
