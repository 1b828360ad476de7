"""How things are measured: figures and what they should reach, fair timing, bytes alive at once."""

from __future__ import annotations

import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Args:
        what: what was measured.
        unit: `s`, `x` (a ratio), `tokens/s`, `bytes`, …; empty for a number.
        at_most, at_least: what it should reach; None where it is told for itself.
    """

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether it is what it should be; None where nothing is asked."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"reached": self.reached}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": _version("ray"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    """What is installed; a model's steps are measured without Ray too."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def medians(calls: Mapping[str, Callable[[], Any]], repeats: int = 7) -> dict[str, float]:
    """Seconds of each call, the median of so many; the calls take turns, so that what disturbs the
    machine disturbs all alike. One round more goes first, uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            _synchronize()
            started = time.perf_counter()
            call()
            _synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_gpu_bytes() -> int:
    """Bytes that a GPU still has, those that torch keeps for its next tensors included."""
    import torch

    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors, made inside the block, that were alive at once; on any device.

    Attributes:
        peak: those bytes. The same on every machine: what operators take for themselves is not in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the storages of an operator's results that are new."""
        before = {
            _storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage(leaf) not in before | self._known:
                self._born(leaf)
        return result

    def _born(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _storage(tensor)
        self._known.add(key)
        self._alive += storage.nbytes()
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._died, key, storage.nbytes())

    def _died(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._alive -= num_bytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that a call has alive at once, beside what was there before."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as counted:
        call()
    return counted.peak
