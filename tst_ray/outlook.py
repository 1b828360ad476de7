"""What to expect of a run before it trains: its time, its passes over the text, and hints.

    FLOPs (estimates.py) / a rate measured here ──> seconds of each phase
    the order over the shards, or the bytes of the text ──> passes over each source

Hints refuse nothing. Each says what it was measured on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.compression import COMPRESSED
from pipelines.corpus import Corpus
from pipelines.kinds import PARQUET
from pipelines.order import Order
from pipelines.windows import grain_lengths
from tst_ray.estimates import ModelShape, flops_per_step
from tst_ray.plan import Phase, Plan
from tst_ray.session import local_cpus
from tst_ray.settings import Config

MANY_PASSES = 4.0
"""Up to four passes over a text teach almost as much as new text does (arXiv 2305.16264)."""
FEW_RECOVERY_STEPS = 2_500
"""Steps after the last bags. On the demo, superposition ended 0.60, 0.14 and 0.04 nats above the
baseline with 1,050, 1,400 and 2,100 of them, and 0.14 below it with 4,200 (one seed each, in the
order of the data before this one)."""
FAR_ABOVE_NATS = 0.5
_FEWEST_GRAINS = 1_000
_FEWEST_STEPS = 100  # of a run that is worth its start

_MATRIX, _STACK = 64, 64  # numpy multiplies such small matrices on one core
_MEASURE_S = 0.05
_TRAINING_SHARE = 0.5
"""What a step reaches of the rate of float32 matrix products. Measured on one core of a Xeon (torch
2.13): 0.51 to 0.82 with models of 0.4M to 19M parameters in float32; 1.3 in bfloat16, for which it
has instructions of its own, so that such a run takes less than half of what is said."""
_STEP_OVERHEAD_S = 0.003  # of Python, which a tiny model's step mostly is
_UNPACKED = 3.0  # text by the size of its gzip, zstd or Parquet file
_HOURS = 3600.0


# -- time ------------------------------------------------------------------------------------------


def core_flops_per_s() -> float:
    """Floating-point operations a second of one core here, in float32 matrix products.

    Takes 0.05 s of the core's time, by which it is measured: others may use the core, too. Torch
    reaches the same rate with large matrices.
    """
    stack = np.ones((_STACK, _MATRIX, _MATRIX), np.float32)
    out = np.matmul(stack, stack)
    count, started = 0, time.thread_time()
    while (seconds := time.thread_time() - started) < _MEASURE_S:
        np.matmul(stack, stack, out=out)
        count += 1
    return count * _STACK * 2 * _MATRIX**3 / seconds


def is_timed(config: Config) -> bool:
    """Whether a run's time can be told: it trains on CPUs of this machine."""
    joins = config.cluster.backend == "ray" and os.environ.get("RAY_ADDRESS")
    return not joins and not config.cluster.gpus_per_worker


def phase_seconds(
    config: Config, shape: ModelShape, phase: Phase, cores: int, flops_per_s: float
) -> float:
    """An estimate of the seconds that a phase trains on this machine, within a factor of two.

    Starting, reading, evaluations and checkpoints are not in it.

    Args:
        cores: of this machine.
        flops_per_s: of each (`core_flops_per_s`).
    """
    at_work = min(cores, _threads(config, phase, cores))
    step_s = flops_per_step(shape, phase) / (_TRAINING_SHARE * at_work * flops_per_s)
    return phase.steps * (step_s + _STEP_OVERHEAD_S)


def _threads(config: Config, phase: Phase, cores: int) -> int:
    """Threads that train in a phase, over all workers."""
    if config.cluster.backend == "inline":
        return config.train.threads or cores
    of_each = config.train.threads or max(int(config.cluster.cpus_per_worker), 1)
    room = int(max(cores, 2) / config.cluster.cpus_per_worker)
    return of_each * max(min(phase.max_workers, room), phase.min_workers)


def training_seconds(config: Config, plan: Plan, shape: ModelShape) -> list[float] | None:
    """An estimate for each phase; None where it cannot be told here (a cluster, GPUs)."""
    if not is_timed(config):
        return None
    cores, rate = local_cpus(config, None), core_flops_per_s()
    return [phase_seconds(config, shape, phase, cores, rate) for phase in plan.phases]


def rough_duration(seconds: float) -> str:
    """Seconds in the words of an estimate: "20 hours", "4 minutes"."""
    for unit, length in (("days", 24 * _HOURS), ("hours", _HOURS), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


# -- passes ----------------------------------------------------------------------------------------


def passes(order: Order) -> dict[str, float]:
    """Passes over each source by the end of the run, by its name."""
    done = order.epochs_after(len(order.layouts) - 1)
    return {source.name: count for source, count in zip(order.sources, done, strict=True)}


def text_bytes(found: Corpus) -> float:
    """Bytes of the text in a source's files: compressed ones hold about three times their own."""
    packed = COMPRESSED | PARQUET
    sizes = ((os.path.splitext(file.path)[1].lower(), file.size) for file in found.files)
    return sum(_UNPACKED * size if ending in packed else size for ending, size in sizes)


def estimated_passes(
    config: Config, plan: Plan, vocab_size: int, source_bytes: Mapping[str, float]
) -> dict[str, float]:
    """The same before there are tokens, from the bytes of each source's text.

    A token is taken for log2(vocabulary) / 4 bytes: 2.5 with 1,024 tokens, 3.0 with 4,000, 4.2 with
    128,000. Measured: 2.58 with 1,024 (Python's source text), 2.74 with 4,000 (licences, English).
    """
    bytes_per_token = math.log2(max(vocab_size, 2)) / 4
    share = 1 - config.data.validation_share
    tokens = {name: share * size / bytes_per_token for name, size in source_bytes.items()}
    given = {source.name: source.weight for source in config.data.sources}
    weights = {n: tokens[n] if given.get(n) is None else float(given[n] or 0) for n in tokens}
    total = sum(weights.values())
    return {
        name: plan.total_data_tokens * weights[name] / total / count if count and total else 0.0
        for name, count in tokens.items()
    }


def shown_passes(counts: Mapping[str, float]) -> str:
    """Passes as text: "0.4", or by source where they differ: "web 0.4, code 3.1"."""
    shown = {
        name: f"{count:.3g}" if count < 1000 else f"{count:,.0f}" for name, count in counts.items()
    }
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{name} {count}" for name, count in shown.items())


# -- hints -----------------------------------------------------------------------------------------


def hints(config: Config, plan: Plan, counts: Mapping[str, float]) -> list[str]:
    """What a user may want to change before the run starts, a line each.

    Args:
        counts: passes over each source.
    """
    many = _many_passes(config, plan, counts)
    few = None if many else _few_steps(plan)  # they would contradict each other
    found = [_one_worker(config), _uneven_bags(config, plan), few, many]
    return [f"hint: {hint}" for hint in found if hint]


def _one_worker(config: Config) -> str | None:
    if config.cluster.backend != "inline":
        return None
    written = [config.cluster.workers, *(p.workers for p in config.phase_settings() if p.workers)]
    if all(workers == (1, 1) for workers in written):
        return None
    return (
        "cluster.backend=inline is one process: it trains with one worker, not as many as written"
    )


def _few_steps(plan: Plan) -> str | None:
    """Where superposition is not likely to pay: too few plain steps follow the bags."""
    bags = [phase for phase in plan.phases if phase.bag_size > 1]
    if not bags:
        return None
    left = plan.total_steps - bags[-1].last_step
    if left >= FEW_RECOVERY_STEPS:
        return None
    return (
        f"{left:,} plain steps follow the bags; with fewer than about {FEW_RECOVERY_STEPS:,} the "
        "demo ended no better than without bags; raise train.steps, or try tst.ratio=0 as well"
    )


def _uneven_bags(config: Config, plan: Plan) -> str | None:
    """Where phases' sequences have so long a common multiple that few of them fill a window."""
    longest = grain_lengths(plan.phases)[0]
    if longest * _FEWEST_GRAINS <= max(config.data.shuffle_tokens, plan.phases[0].data_length):
        return None
    if longest == plan.phases[0].data_length:
        return None
    return (
        f"bags of {', '.join(str(phase.bag_size) for phase in plan.phases)} tokens share only "
        f"stretches of {longest:,} tokens: the data is shuffled coarsely; use bag sizes that "
        "divide each other, or raise data.shuffle_tokens"
    )


def _many_passes(config: Config, plan: Plan, counts: Mapping[str, float]) -> str | None:
    name = max(counts, key=lambda name: counts[name], default=None)
    if name is None or counts[name] <= MANY_PASSES:
        return None
    steps = max(int(plan.total_steps * MANY_PASSES / counts[name]), 1)
    fewer = "use fewer steps" if config.phases else f"set train.steps={steps}"
    remedy = f"add text, or {fewer}" if steps >= _FEWEST_STEPS else "add text"
    return (
        f"{counts[name]:,.0f} passes over {name}: more than {MANY_PASSES:g} teach little more, and "
        f"the model may learn the text by heart; {remedy}"
    )


def at_start(
    config: Config, plan: Plan, shape: ModelShape, counts: Mapping[str, float]
) -> list[str]:
    """What is told when a run starts: time, passes, hints; a line each."""
    lines = [f"passes over the text: {shown_passes(counts)}", *hints(config, plan, counts)]
    if seconds := training_seconds(config, plan, shape):
        lines.insert(0, f"estimated training time: {rough_duration(sum(seconds))} on this machine")
    return lines


def overfit(
    losses: Sequence[float], val_loss: float | None, counts: Mapping[str, float]
) -> str | None:
    """A line on a finished run that has learnt its text by heart; None where it has not.

    Args:
        losses: of its last plain steps.
        val_loss: its final validation loss.
        counts: passes over each source.
    """
    most = max(counts.values(), default=0.0)
    if not losses or val_loss is None or most <= MANY_PASSES:
        return None
    loss = sum(losses) / len(losses)
    if val_loss - loss < FAR_ABOVE_NATS:
        return None
    return (
        f"the validation loss ({val_loss:.2f}) is far above the training loss ({loss:.2f}): in "
        f"{most:,.3g} passes the model has learnt the text by heart; add text, or train fewer steps"
    )
