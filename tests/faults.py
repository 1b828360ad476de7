"""Faults that are planned: `Faults().not_finite_at(step=5).spike_at(step=9, nats=4.0)`.

They are injected where the numbers of a step come from, so everything behind that is real. A fault
belongs to its step's data: it strikes each time that data is trained on, as bad text would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tst_ray.worker import Trainer


@dataclass
class Faults:
    """A schedule, built by chaining; `injected` puts it into every trainer of this process."""

    _by_step: dict[int, list[tuple[str, float, int | None]]] = field(default_factory=dict)
    happened: list[tuple[int, str]] = field(default_factory=list)

    def not_finite_at(self, *steps: int, rank: int | None = None) -> Faults:
        """Gradients and loss of these steps (1 is the first) are not numbers."""
        return self._add("not_finite", steps, torch.nan, rank)

    def spike_at(self, *steps: int, nats: float, rank: int | None = None) -> Faults:
        """The loss of these steps is so much higher."""
        return self._add("spike", steps, nats, rank)

    def fail_at(self, *steps: int, rank: int | None = None) -> Faults:
        """The worker fails in these steps, the first time it comes there."""
        return self._add("fail", steps, 0.0, rank)

    def _add(self, kind: str, steps: tuple[int, ...], value: float, rank: int | None) -> Faults:
        for step in steps:
            self._by_step.setdefault(step, []).append((kind, value, rank))
        return self

    def strike(self, trainer: Trainer, step: int, losses: list[Any]) -> None:
        """Carry out what is planned for a step, on this rank."""
        for kind, value, rank in self._by_step.get(step, ()):
            if rank not in (None, trainer.place.rank):
                continue
            if kind == "fail" and (step, kind) in self.happened:
                continue
            self.happened.append((step, kind))
            if kind == "fail":
                raise RuntimeError(f"injected at step {step}")
            losses[0] += value
            if kind == "not_finite":
                next(p for p in trainer.model.parameters() if p.grad is not None).grad.fill_(value)

    @contextmanager
    def injected(self) -> Iterator[Faults]:
        """While the block runs, training steps meet these faults."""
        with pytest.MonkeyPatch.context() as patch:
            at = {"step": 0}
            backward, train_step = Trainer._backward, Trainer.train_step

            def struck_step(trainer: Trainer, phase: Any, step: int, *args: Any) -> Any:
                at["step"] = step + 1
                return train_step(trainer, phase, step, *args)

            def struck_backward(trainer: Trainer, phase: Any, batch: Any) -> Any:
                losses = backward(trainer, phase, batch)
                self.strike(trainer, at["step"], losses)
                return losses

            patch.setattr(Trainer, "train_step", struck_step)
            patch.setattr(Trainer, "_backward", struck_backward)
            yield self
