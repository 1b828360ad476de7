"""What a run reports: one line a step in metrics.jsonl, and curves in TensorBoard.

Rank 0 writes both, from threads beside the loop. After a restart the lines of steps that will be
trained again are dropped first, and TensorBoard is told to purge them, so each step stands once and
curves go on where they were.
"""

from __future__ import annotations

import json
import logging
import math
import time
from typing import Any

from tst_ray.goodput import PARTS
from tst_ray.storage import Storage

log = logging.getLogger(__name__)

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
    "goodput": "time/goodput",
    **{f"time_{part}_s": f"time/{part}_s" for part in PARTS},
}

_REMOTE_FLUSH_S = 10.0
_FLUSH_SHARE = 0.02  # an object store's file is written anew each time: the longer, the less often
_TAIL_BYTES = 1 << 20


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
        self._pending: list[str] = []
        self._flushed_at, self._flush_s = time.monotonic(), 0.0
        _wait_for_a_later_name(run / TENSORBOARD)
        self._board = SummaryWriter(
            (run / TENSORBOARD).path if run.is_local else (run / TENSORBOARD).url,
            purge_step=step + 1,
        )
        if step == 0:
            self._board.add_text("config", f"```yaml\n{config_text}\n```", 1)

    def write(self, record: dict[str, Any], curves: dict[str, Any] | None = None) -> None:
        """Add one step's record, to be flushed, and what is drawn beside it but not logged.

        Lines wait where storage takes none (a full disk), and are lost only with this process, when
        their steps are trained again.
        """
        self._pending.append(json.dumps(_finite(record)) + "\n")
        if record["step"] % self._every == 0 or "val_loss" in record:
            self._draw({**record, **(curves or {})})

    def _draw(self, values: dict[str, Any]) -> None:
        try:
            for field, tag in TAGS.items():
                if values.get(field) is not None:
                    self._board.add_scalar(tag, values[field], values["step"])
        except OSError as error:  # the writer's thread met it, and tells at the next point
            log.warning("TensorBoard's curves miss points: %s", error)

    def is_due(self) -> bool:
        """Whether lines have waited long enough to be worth a flush."""
        every_s = max(_REMOTE_FLUSH_S, self._flush_s / _FLUSH_SHARE)
        return self._run.is_local or time.monotonic() - self._flushed_at > every_s

    def flush(self) -> None:
        """Make what was written so far stand; in one thread at a time, while others write.

        Raises:
            OSError: storage does not take it; it waits for the next flush.
        """
        lines = self._pending[:]
        if not lines:
            return
        started = time.monotonic()
        try:
            self._run.append(METRICS, "".join(lines))
        except OSError as error:
            raise OSError(f"{len(lines)} lines of {METRICS} wait for storage: {error}") from error
        finally:
            self._flushed_at = time.monotonic()
        self._flush_s = self._flushed_at - started
        del self._pending[: len(lines)]

    def try_flush(self) -> None:
        """Flush; lines that storage does not take are a warning, and wait."""
        try:
            self.flush()
        except OSError as error:
            log.warning("%s", error)

    def close(self) -> None:
        """Flush and close; no write may follow."""
        self.try_flush()
        try:
            self._board.close()
        except OSError as error:
            log.warning("TensorBoard's curves miss their end: %s", error)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for what is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _wait_for_a_later_name(folder: Storage) -> None:
    """Let the second pass in which the newest event file was opened, if it is this one.

    TensorBoard reads event files by name, and a name starts with whole seconds: two of one second
    may be read the wrong way round, and the older attempt's points would stand.
    """
    stamps = [name.split(".")[3] for name in folder.names() if name.startswith("events.out.")]
    while str(int(time.time())).zfill(10) in stamps:
        time.sleep(0.02)


def drop_after(run: Storage, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps after `step`, and a torn last line: they will be trained again.

    Reads from the end, so it takes as long as what it drops, not as the run.

    Returns:
        the dropped records, in step order.
    """
    num_bytes = _TAIL_BYTES
    while True:
        offset, lines = run.tail_lines(METRICS, num_bytes)
        records = [(line, parse_record(line)) for line in lines]
        first = next((record for _, record in records if record), None)
        if offset == 0 or (first and first["step"] <= step):
            break
        num_bytes *= 4
    size, keep, dropped = offset, offset, []
    for line, record in records:
        size += len(line)
        if record is None:
            continue
        if record["step"] <= step:
            keep = size
        else:
            dropped.append(record)
    if lines and keep < size:
        run.truncate(METRICS, keep)
    return dropped


def one_line_a_step(run: Storage) -> list[dict[str, Any]]:
    """All records, each step once; the file is mended where it is not so.

    Workers on a node that only the network has lost may write a line more before they notice that
    another attempt has begun: the last attempt's stands.
    """
    records = run.read_lines(METRICS)
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        held = by_step.get(record["step"])
        if held is None or record["attempt"] >= held["attempt"]:
            by_step[record["step"]] = record
    kept = [by_step[step] for step in sorted(by_step)]
    if kept != records:
        run.write(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def recent_records(run: Storage, count: int) -> list[dict[str, Any]]:
    """The last `count` records of metrics.jsonl, or all there are."""
    num_bytes = _TAIL_BYTES
    while True:
        offset, lines = run.tail_lines(METRICS, num_bytes)
        records = [record for record in map(parse_record, lines) if record]
        if offset == 0 or len(records) >= count:
            return records[-count:]
        num_bytes *= 4


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a torn one (its writer was killed)."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if line.endswith(b"\n") and isinstance(record, dict) else None


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


def try_event(run: Storage, kind: str, **details: Any) -> None:
    """Add an event; one that storage does not take is a warning, and keeps nobody from going on."""
    try:
        add_event(run, kind, **details)
    except OSError as error:
        log.warning("event %s %s is lost: %s", kind, details, error)


def add_event(run: Storage, kind: str, **details: Any) -> None:
    """Add a line to events.jsonl: what happened, when (Unix seconds), and its details."""
    record = {"time": round(time.time(), 3), "event": kind, **details}
    run.add(EVENTS, json.dumps(record) + "\n")
