"""What a machine has, for those who decide whether a run fits on it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tst_ray.errors import ConfigError
from tst_ray.estimates import ModelShape, gpu_problem
from tst_ray.plan import Phase, Plan
from tst_ray.settings import TrainConfig


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The bytes of memory that this process may use: the machine's, or its control groups' limit.

    A limit of any group above the process's own holds too; beyond it the kernel kills.

    Args:
        root: where control groups are mounted.
        own: this process's groups, a line each: number:controllers:path.
    """
    return min([_physical(), *_limits(root, own)])


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limits(root: Path, own: Path) -> Iterator[int]:
    lines: list[str] = []
    with contextlib.suppress(OSError):  # no Linux
        lines = own.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            mount, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # none there, or it is "max"
                yield int((folder / name).read_text())
            if folder == mount:
                break


def check_gpu(
    device: Any,
    shape: ModelShape,
    plan: Plan,
    phases: Iterable[Phase],
    world_size: int,
    train: TrainConfig,
) -> None:
    """Refuse a model that this worker's GPU has no memory for, in one of the phases it trains.

    Raises:
        ConfigError: with both numbers.
    """
    import torch

    _, gpu_bytes = torch.cuda.mem_get_info(device)
    for phase in phases:
        if not phase.min_workers <= world_size <= phase.max_workers:
            continue
        if problem := gpu_problem(shape, plan, phase, world_size, train, gpu_bytes):
            raise ConfigError(problem)
