"""How fast a run is: a step's times as throughput, utilisation and memory."""

from __future__ import annotations

import re
import resource
from typing import Any

import torch

from tst_ray.estimates import ModelShape, flops_per_step
from tst_ray.plan import Phase, Plan

# Dense bf16 matrix FLOP/s by CUDA device name, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its CUDA name; None where it is not known."""
    matches = [name for name in PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class Speed:
    """Turns a step's times into throughput, utilisation and memory.

    Args:
        shape: the model's.
        device: this worker's, such as cuda:0.
    """

    def __init__(self, plan: Plan, shape: ModelShape, device: str, world_size: int) -> None:
        self._plan, self._device = plan, device
        self._cuda = device.startswith("cuda")
        peak = peak_flops(torch.cuda.get_device_name(device) if self._cuda else "")
        self._peak = peak * world_size if peak else None
        self._flops = [flops_per_step(shape, phase) for phase in plan.phases]

    def measure(self, phase: Phase, step: int, compute_s: float, wait_s: float) -> dict[str, Any]:
        """Fields of metrics.jsonl for the step that just ended."""
        step_time_s = compute_s + wait_s
        data_tokens, latent_tokens = self._plan.tokens_after(step)
        return {
            "data_tokens": data_tokens,
            "latent_tokens": latent_tokens,
            "step_time_s": round(step_time_s, 6),
            "data_wait_s": round(wait_s, 6),
            "tokens_per_s": round(phase.data_tokens_per_step / step_time_s, 1),
            "latent_tokens_per_s": round(phase.latent_tokens_per_step / step_time_s, 1),
            "memory_bytes": self._memory_bytes(),
            "mfu": self._flops[phase.index] / step_time_s / self._peak if self._peak else None,
        }

    def _memory_bytes(self) -> int:
        """The most this worker has held: device memory, or resident memory on CPU."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
