"""What a run reports: one line a step in metrics.jsonl, and curves in TensorBoard.

Rank 0 writes both. After a restart the lines of steps that will be trained again are dropped first,
and TensorBoard is told to purge them, so each step stands once and curves go on where they were.
"""

from __future__ import annotations

import json
import time
from typing import Any

from tst_ray.storage import Storage

METRICS, EVENTS, TENSORBOARD = "metrics.jsonl", "events.jsonl", "tensorboard"

# metrics.jsonl field -> TensorBoard tag. The step axis is the optimizer step throughout.
TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/validation",
    "router_loss": "loss/router",
    "lr": "optimizer/lr",
    "grad_norm": "optimizer/grad_norm",
    "data_tokens": "tokens/data",
    "latent_tokens": "tokens/latent",
    "tokens_per_s": "speed/data_tokens_per_s",
    "latent_tokens_per_s": "speed/latent_tokens_per_s",
    "step_time_s": "speed/step_time_s",
    "data_wait_s": "speed/data_wait_s",
    "mfu": "speed/mfu",
    "world_size": "run/world_size",
    "phase": "run/phase",
    "bag_size": "run/bag_size",
    "attempt": "run/attempt",
    "memory_bytes": "run/memory_bytes",
}

_REMOTE_FLUSH_S = 10.0

# Dense bf16 matrix FLOP/s by CUDA device name, from NVIDIA's data sheets (without sparsity).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by its CUDA name; None where it is not known."""
    matches = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class MetricsLog:
    """Writes a run's metrics; only rank 0 holds one.

    Args:
        run: the run directory.
        step: the step this attempt starts from; later lines are dropped.
        tensorboard_every: steps between points of the curves (evaluations are always written).
        config_text: the resolved config, shown under TensorBoard's Text tab.
    """

    def __init__(self, run: Storage, step: int, tensorboard_every: int, config_text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._every = run, tensorboard_every
        drop_after(run, step)
        self._pending: list[str] = []
        self._flushed_at = time.monotonic()
        _wait_for_a_later_name(run / TENSORBOARD)
        self._board = SummaryWriter(
            (run / TENSORBOARD).path if run.is_local else (run / TENSORBOARD).url,
            purge_step=step + 1,
        )
        if step == 0:
            self._board.add_text("config", f"```yaml\n{config_text}\n```", 1)

    def write(self, record: dict[str, Any]) -> None:
        """Add one step's record."""
        self._pending.append(json.dumps(record) + "\n")
        if self._run.is_local or time.monotonic() - self._flushed_at > _REMOTE_FLUSH_S:
            self.flush()
        if record["step"] % self._every == 0 or "val_loss" in record:
            for field, tag in TAGS.items():
                if record.get(field) is not None:
                    self._board.add_scalar(tag, record[field], record["step"])

    def flush(self) -> None:
        """Make what was written so far visible to readers."""
        if self._pending:
            self._run.append(METRICS, "".join(self._pending))
            self._pending = []
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close; no write may follow."""
        self.flush()
        self._board.close()


def _wait_for_a_later_name(folder: Storage) -> None:
    """Let the second pass in which the newest event file was opened, if it is this one.

    TensorBoard reads event files by name, and a name starts with whole seconds: two of one second
    may be read the wrong way round, and the older attempt's points would stand.
    """
    stamps = [name.split(".")[3] for name in folder.names() if name.startswith("events.out.")]
    while str(int(time.time())).zfill(10) in stamps:
        time.sleep(0.02)


def drop_after(run: Storage, step: int) -> None:
    """Drop the lines of steps after `step`, and a torn last line: they will be trained again."""
    if not run.exists(METRICS):
        return
    kept = [record for record in run.read_lines(METRICS) if record["step"] <= step]
    run.write(METRICS, "".join(json.dumps(record) + "\n" for record in kept))


def write_hparams(
    run: Storage, hparams: dict[str, Any], final: dict[str, float], step: int
) -> None:
    """Record the run's settings with its final metrics under TensorBoard's HParams tab."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams as hparams_summary

    folder = run / TENSORBOARD
    board = SummaryWriter(folder.path if folder.is_local else folder.url)
    flat = {
        name: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
        for name, value in flatten(hparams).items()
        if value is not None
    }
    metrics = {f"final/{name}": value for name, value in final.items()}
    # The writer's own add_hparams would open a second run beside this one's curves.
    for summary in hparams_summary(flat, metrics):
        board._get_file_writer().add_summary(summary, step)
    for name, value in metrics.items():
        board.add_scalar(name, value, step)
    board.close()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out


def add_event(run: Storage, kind: str, **details: Any) -> None:
    """Add a line to events.jsonl: what happened, when (Unix seconds), and its details."""
    record = {"time": round(time.time(), 3), "event": kind, **details}
    run.append(EVENTS, json.dumps(record) + "\n")
