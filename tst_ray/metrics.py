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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tst_ray.curves import Curves
from tst_ray.goodput import PARTS
from tst_ray.storage import Storage, parse_record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
EVENT_FIELDS = ("time", "event")  # of every event; a line without one was damaged
_FIELDS = ("step", "phase", "attempt", "loss", "step_time_s")  # of every step, among others

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
_FLUSH_SHARE = 0.02  # an object store's files are written whole: the longer that takes, the rarer
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
        self._run, self._every = run, tensorboard_every
        self._pending: list[str] = []
        self._published_at, self._publish_s = time.monotonic(), 0.0
        self._curves = Curves(run, step + 1)
        if step == 0:
            text = f"```yaml\n{config_text}\n```"
            self._curves.add(1, lambda board: board.add_text("config", text, 1))

    def write(self, record: dict[str, Any], curves: dict[str, Any] | None = None) -> None:
        """Add one step's record, to be flushed, and what is drawn beside it but not logged.

        Lines wait where storage takes none (a full disk), and are lost only with this process, when
        their steps are trained again.
        """
        self._pending.append(json.dumps(_finite(record)) + "\n")
        if record["step"] % self._every == 0 or "val_loss" in record:
            values, now = {**record, **(curves or {})}, time.time()
            self._curves.add(record["step"], lambda board: _draw(board, values, now))

    def is_due(self) -> bool:
        """Whether lines and points have waited long enough to be published."""
        every_s = max(_REMOTE_FLUSH_S, self._publish_s / _FLUSH_SHARE)
        return self._run.is_local or time.monotonic() - self._published_at > every_s

    def flush(self) -> None:
        """Make the lines written so far stand; in one thread at a time, while others write.

        Raises:
            OSError: storage does not take them; they wait for the next flush.
        """
        lines = self._pending[:]
        if not lines:
            return
        try:
            self._run.append(METRICS, "".join(lines))
        except OSError as error:
            raise OSError(f"{len(lines)} lines of {METRICS} wait for storage: {error}") from error
        del self._pending[: len(lines)]

    def publish(self) -> None:
        """Make lines and curves stand, in the thread of `flush`; what storage does not take is a
        warning, and waits."""
        started = time.monotonic()
        for action in (self.flush, self._curves.publish):
            _try(action)
        self._published_at = time.monotonic()
        self._publish_s = self._published_at - started

    def close(self) -> None:
        """Publish and close; no write may follow."""
        for action in (self.flush, self._curves.close):
            _try(action)


def _draw(board: SummaryWriter, values: dict[str, Any], now: float) -> None:
    """A step's points, as of when it ended."""
    if values.get("phase") is not None:
        values = {**values, "phase": values["phase"] + 1}  # people count them from 1
    for field, tag in TAGS.items():
        if values.get(field) is not None:
            board.add_scalar(tag, values[field], values["step"], walltime=now)  # type: ignore[no-untyped-call]


def _try(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        log.warning("%s", error)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN: null stands for what is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def drop_after(run: Storage, step: int) -> list[dict[str, Any]]:
    """Drop the lines of steps after `step`, and a torn last line: they will be trained again.

    Reads from the end, so it takes as long as what it drops, not as the run.

    Returns:
        the dropped records, in step order.
    """
    offset, lines = _tail(run, lambda records: bool(records) and records[0]["step"] <= step)
    size, keep, dropped = offset, offset, []
    for line, record in lines:
        size += len(line)
        if record is None:
            continue
        if record["step"] <= step:
            keep = size
        else:
            dropped.append(record)
    if keep < size:
        run.truncate(METRICS, keep)
    return dropped


def recent_records(run: Storage, count: int) -> list[dict[str, Any]]:
    """The last `count` records of metrics.jsonl, or all there are."""
    _, lines = _tail(run, lambda records: len(records) >= count)
    return [record for _, record in lines if record][-count:]


def _tail(
    run: Storage, is_enough: Callable[[list[dict[str, Any]]], bool]
) -> tuple[int, list[tuple[bytes, dict[str, Any] | None]]]:
    """The last lines of metrics.jsonl and their records, from as far back as is enough, or all;
    and where in the file the first begins."""
    num_bytes = _TAIL_BYTES
    while True:
        offset, lines = run.tail_lines(METRICS, num_bytes)
        parsed = [(line, parse_record(line, _FIELDS)) for line in lines]
        if offset == 0 or is_enough([record for _, record in parsed if record]):
            return offset, parsed
        num_bytes *= 4


def one_line_a_step(run: Storage) -> dict[int, dict[str, Any]]:
    """The last record of each phase, by its index; the file is mended where a step has two lines.

    Workers on a node that only the network has lost may write a line more before they notice that
    another attempt has begun: the last attempt's stands. A long run has a long file: where nothing
    is to be mended, a few lines are held at a time.
    """
    last: dict[int, dict[str, Any]] = {}
    step = 0
    for _, record in _told(run):
        if record["step"] <= step:
            _mend(run)
            return one_line_a_step(run)
        step, last[record["phase"]] = record["step"], record
    return last


def _mend(run: Storage) -> None:
    """Keep of each step the line of the last attempt, in the order of steps."""
    kept: dict[int, tuple[int, bytes]] = {}
    for line, record in _told(run):
        step, attempt = record["step"], record["attempt"]
        if step not in kept or attempt >= kept[step][0]:
            kept[step] = attempt, line
    run.write(METRICS, b"".join(kept[step][1].rstrip() + b"\n" for step in sorted(kept)))


def _told(run: Storage) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines of metrics.jsonl and their records."""
    for line in run.lines(METRICS):
        if record := parse_record(line, _FIELDS):
            yield line, record


def write_hparams(
    run: Storage, hparams: dict[str, Any], final: dict[str, float], step: int
) -> None:
    """Record the run's settings with its final metrics under TensorBoard's HParams tab.

    The metrics are the curves' own tags, of which the tab shows the last point: tags of their own
    would be cards of one point among the curves.

    Args:
        final: the last step's metrics, by their fields in metrics.jsonl.

    Raises:
        OSError: storage does not take it.
    """
    from torch.utils.tensorboard.summary import hparams as hparams_summary

    flat = {
        name: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
        for name, value in flatten(hparams).items()
        if value is not None
    }
    metrics = {TAGS[name]: value for name, value in final.items()}

    def draw(board: SummaryWriter) -> None:
        # The writer's own add_hparams would open a second run beside this one's curves.
        for summary in hparams_summary(flat, metrics):
            board._get_file_writer().add_summary(summary, step)

    curves = Curves(run)
    curves.add(step, draw)
    curves.close()


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
