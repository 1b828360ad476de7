"""What the driver tells a worker group, and what it hears back; plain values, without torch.

driver ── Job ──> every worker, at its Place ── Ended ──> driver
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.ingest import Feed
from tst_ray.plan import Plan
from tst_ray.settings import Config

DONE, ROLLBACK, FAILED_SAVES = "done", "rollback", "failed_saves"
GROW, PREEMPTION, INTERRUPT = "grow", "preemption", "interrupt"
STOPS = (GROW, PREEMPTION, INTERRUPT, FAILED_SAVES)
"""Why rank 0 may end a group between two steps; in all but the last after a checkpoint."""


@dataclass(frozen=True)
class Job:
    """What every worker of a stage is told; picklable.

    Args:
        config, plan: the run's.
        feeds: one a phase of the plan.
        run_url: the run directory.
        last_step: where this stage ends.
        memory_url: where checkpoints in memory are kept; None for none.
        model: the model's fields, as the run began with them (`model_config.model_fields`); None
            reads them anew.
    """

    config: Config
    plan: Plan
    feeds: tuple[Feed, ...]
    run_url: str
    last_step: int
    memory_url: str | None = None
    model: dict[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """A worker's place in its group.

    Args:
        node: a name for the machine it is on.
        threads: torch's CPU threads unless `train.threads` says; None leaves them to torch.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    node: str = ""
    threads: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a group ended: after how many finished steps, and why (`DONE`, or one of the others)."""

    step: int
    reason: str
