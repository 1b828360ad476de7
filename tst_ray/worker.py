"""The training loop. It knows torch, not Ray.

    restore → for each phase of the stage → for each batch → step → evaluate, log, checkpoint

`train` is what every rank runs. Where the batches come from is the caller's: `open_batches(phase,
step)` returns an iterator of local batches (through Ray Data, or read in this process). All state
is the model, the optimizer and one integer, the number of finished steps: learning rate, data
order and random numbers are functions of it, so restoring a step restores everything.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from pipelines.ingest import (
    FILLER,
    BatchMismatch,
    Columns,
    Feed,
    check_batch,
    load_manifest,
)
from pipelines.order import digest, rank_slots, rows_per_rank, span_hashes
from pipelines.permute import combine
from pipelines.shards import Manifest, TokenReader
from tst_ray.architecture import describe, hf_config
from tst_ray.checkpoint import Checkpointer
from tst_ray.config import Config
from tst_ray.errors import RunError
from tst_ray.metrics import MetricsLog, add_event, peak_flops
from tst_ray.model import SuperpositionLM, build_model
from tst_ray.optim import build_optimizer, clip_grad_norm, set_lr
from tst_ray.plan import Phase, Plan, flops_per_step
from tst_ray.storage import Storage

OpenBatches = Callable[[Phase, int], Iterable[Columns]]

_STATE_EVERY_S = 1.0


@dataclass(frozen=True)
class Job:
    """What every worker of a stage is told; picklable.

    Args:
        config, plan: the run's.
        feeds: one a phase of the plan.
        run_url: the run directory.
        last_step: where this stage ends.
    """

    config: Config
    plan: Plan
    feeds: tuple[Feed, ...]
    run_url: str
    last_step: int


@dataclass(frozen=True)
class Place:
    """This worker's place in its group."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


def train(job: Job, place: Place, open_batches: OpenBatches) -> int:
    """Train from the newest good checkpoint to the end of the stage.

    Returns:
        the number of finished steps, `job.last_step`.

    Raises:
        RunError: no checkpoint of several is intact.
        BatchMismatch: a batch is not the one the plan says.
    """
    trainer = Trainer(job, place)
    step = trainer.restore()
    for phase in job.plan.phases:
        if not phase.first_step <= step < min(phase.last_step, job.last_step):
            continue
        trainer.start_phase(phase, step)
        for batch, wait_s in timed(open_batches(phase, step)):
            record = trainer.train_step(phase, step, batch, wait_s)
            step += 1
            if trainer.evaluation_due(phase, step):
                record["val_loss"] = trainer.evaluate()
            trainer.log(record)
            if trainer.checkpoint_due(step):
                trainer.save(step)
            if step == phase.last_step:
                break
        if step < min(phase.last_step, job.last_step):
            raise BatchMismatch(
                f"phase {phase.index + 1}: the batches ended after step {step}, {phase.last_step} "
                "were planned"
            )
    trainer.finish(step)
    return step


class Trainer:
    """One worker's model, optimizer, checkpointer and (on rank 0) log."""

    def __init__(self, job: Job, place: Place) -> None:
        config = job.config
        self.job, self.place, self.config, self.plan = job, place, config, job.plan
        self.device = torch.device(place.device)
        self.run = Storage(job.run_url)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        manifest = load_manifest(job.feeds[0])
        self.hf_config = hf_config(
            config.model, vocab_size=manifest.vocab_size, eot_token=manifest.eot_token
        )
        self.model: SuperpositionLM = build_model(
            self.hf_config,
            pretrained=config.model.source if config.model.pretrained else None,
            seed=config.run.seed,
            device=self.device,
            precision=config.train.precision,
            compile=config.train.compile,
            activation_checkpointing=config.train.activation_checkpointing,
        )
        self.optimizer = build_optimizer(self.model, config.train)
        self.checkpointer = Checkpointer(
            self.run / "checkpoints",
            keep=config.checkpoint.keep,
            background=config.checkpoint.async_,
            on_event=self.event,
            is_current=self.is_current,
        )
        self.validation = Validation.load(config, self.plan, manifest, place)
        self.speed = Speed(self.plan, describe(self.hf_config), place)
        self.metrics: MetricsLog | None = None
        self.attempt = 0
        self._state_at = 0.0

    # -- a step ---------------------------------------------------------------------------------

    def train_step(self, phase: Phase, step: int, batch: Columns, wait_s: float) -> dict[str, Any]:
        """Train on this rank's share of one global batch and return the step's record."""
        started = time.perf_counter()
        feed = self.job.feeds[phase.index]
        spans = check_batch(batch, feed, step, self.place.rank, self.place.world_size)
        seed_step(self.config.run.seed, step, self.place.rank)

        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        router_sum = torch.zeros_like(loss_sum)
        pieces = micro_batches(batch, self.config.train.micro_batch_size)
        for number, (tokens, num_real) in enumerate(pieces):
            self.model.set_last_micro_batch(number == len(pieces) - 1)
            tokens = tokens.to(self.device, non_blocking=True)
            out = self.model(tokens, phase, num_real=num_real)
            out.objective.backward()
            loss_sum += out.loss.detach()
            router_sum += out.router_loss.detach()
        lr = self.config.train.learning_rate * self.plan.lr_multiplier(step)
        set_lr(self.optimizer, lr)
        grad_norm = clip_grad_norm(self.model, self.config.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        lanes = span_hashes(spans, feed.salt).sum(axis=0)
        sums = self.all_sum([loss_sum, router_sum], lanes.tolist())
        record = {
            "step": step + 1,
            "phase": phase.index,
            "bag_size": phase.bag_size,
            "loss": sums[0],
            "lr": lr,
            "grad_norm": float(grad_norm),
            "world_size": self.place.world_size,
            "attempt": self.attempt,
            "data_digest": digest(sums[2:]),
        }
        if self.model.has_router:
            record["router_loss"] = sums[1]
        record.update(self.speed.measure(phase, step + 1, time.perf_counter() - started, wait_s))
        return record

    def evaluate(self) -> float | None:
        """Plain next-token cross-entropy (nats) on held-out text; None where none was held out."""
        if self.validation.num_targets == 0:
            return None
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, num_real in self.validation.micro_batches:
            total += self.model.next_token_loss(tokens.to(self.device), num_real=num_real)
        return self.all_sum([total])[0] / self.validation.num_targets

    def all_sum(self, values: list[torch.Tensor], lanes: Sequence[int] = ()) -> list[float]:
        """Sum scalar tensors and integers below 2^40 over the ranks, in one collective; float64."""
        exact = torch.tensor(lanes, dtype=torch.float64, device=self.device)
        packed = torch.cat([torch.stack(values).double(), exact])
        if dist.is_initialized():
            dist.all_reduce(packed)
        return list(packed.tolist())

    # -- when things are due --------------------------------------------------------------------

    def evaluation_due(self, phase: Phase, step: int) -> bool:
        """At every `metrics.val_every` steps, and where a phase ends."""
        return step % self.config.metrics.val_every == 0 or step == phase.last_step

    def checkpoint_due(self, step: int) -> bool:
        """At every `checkpoint.every` steps, and where the stage ends."""
        return step % self.config.checkpoint.every == 0 or step == self.job.last_step

    # -- state ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Model and optimizer state by parameter name, sharded as they are."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def restore(self) -> int:
        """Load the newest good checkpoint and open the log behind it; the finished steps."""
        info = self.checkpointer.newest_good()
        if info is not None:
            state = self.state()
            self.checkpointer.load(info, state)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        step = info.step if info else 0
        self._begin_attempt(step)
        return step

    def _begin_attempt(self, step: int) -> None:
        """Count the attempt, record where it starts, and cut the log back to there."""
        before = self.run.read_json("run.json") or {}
        if dist.is_initialized():
            dist.barrier()  # every rank has read run.json before rank 0 replaces it
        self.attempt = int(before.get("attempt", 0)) + 1
        if self.place.rank != 0:
            return
        self.metrics = MetricsLog(
            self.run, step, self.config.metrics.tensorboard_every, self.config.to_yaml()
        )
        self.write_state(step)
        self.event("attempt", step=step, attempt=self.attempt, world_size=self.place.world_size)

    def save(self, step: int) -> None:
        """Start a checkpoint of the state after `step` steps."""
        if self.metrics is not None:
            self.metrics.flush()  # a committed step is not trained again, so its line must stand
        data_tokens, latent_tokens = self.plan.tokens_after(step)
        meta = {"attempt": self.attempt, "data_tokens": data_tokens, "latent_tokens": latent_tokens}
        self.checkpointer.save(step, self.state(), meta)

    # -- telling --------------------------------------------------------------------------------

    def start_phase(self, phase: Phase, step: int) -> None:
        """Record that a phase begins or goes on."""
        self.event(
            "phase_start",
            phase=phase.index,
            bag_size=phase.bag_size,
            step=step,
            world_size=self.place.world_size,
        )

    def log(self, record: dict[str, Any]) -> None:
        """Write a step's record, and now and then where the run stands."""
        if self.metrics is None:
            return
        self.metrics.write({name: value for name, value in record.items() if value is not None})
        if time.monotonic() - self._state_at > _STATE_EVERY_S:
            self.write_state(record["step"])

    def write_state(self, step: int) -> None:
        """Replace run.json.

        Raises:
            RunError: another attempt has taken over; this one must not write any more.
        """
        if not self.is_current():
            raise RunError("another attempt of this run has taken over; this one ends")
        self._state_at = time.monotonic()
        done = step >= self.plan.total_steps
        self.run.write_json(
            "run.json",
            {
                "status": "running",
                "phase": self.plan.phases[-1].index if done else self.plan.phase_at(step).index,
                "step": step,
                "total_steps": self.plan.total_steps,
                "world_size": self.place.world_size,
                "attempt": self.attempt,
                "updated": round(time.time(), 3),
            },
        )

    def is_current(self) -> bool:
        """Whether no newer attempt has started: workers can outlive a driver that was killed."""
        state = self.run.read_json("run.json") or {}
        return int(state.get("attempt", 0)) <= self.attempt

    def event(self, kind: str, **details: Any) -> None:
        """Add an event to the run's log; rank 0 only."""
        if self.place.rank == 0:
            add_event(self.run, kind, **details)

    def finish(self, step: int) -> None:
        """Wait for the last checkpoint and close the log."""
        self.checkpointer.wait()
        if self.metrics is not None:
            self.metrics.close()
            self.write_state(step)


@dataclass(frozen=True)
class Validation:
    """This rank's share of the held-out sequences, in micro-batches of equal number on all ranks.

    Attributes:
        micro_batches: (tokens [n, L + 1], how many of the rows are real).
        num_targets: predicted tokens over all ranks.
    """

    micro_batches: list[tuple[torch.Tensor, int]]
    num_targets: int

    @classmethod
    def load(cls, config: Config, plan: Plan, manifest: Manifest, place: Place) -> Validation:
        """Read evenly spaced sequences of the validation split, the same at every world size."""
        tokens_NL = validation_tokens(
            manifest, config.metrics.val_sequences, plan.sequence_length + 1
        )
        mine = tokens_NL[rank_slots(len(tokens_NL), place.world_size, place.rank)]
        height = rows_per_rank(len(tokens_NL), place.world_size)
        padded = np.zeros((height, plan.sequence_length + 1), np.int64)
        padded[: len(mine)] = mine
        batch = {"tokens": padded, "slot": np.where(np.arange(height) < len(mine), 0, FILLER)}
        pieces = micro_batches(batch, config.train.micro_batch_size) if height else []
        return cls(pieces, len(tokens_NL) * plan.sequence_length)


def validation_tokens(manifest: Manifest, num_sequences: int, length: int) -> np.ndarray[Any, Any]:
    """Up to `num_sequences` evenly spaced sequences of `length` tokens, over all sources."""
    rows: list[np.ndarray[Any, Any]] = []
    total = sum(source.validation.tokens for source in manifest.sources)
    for source in manifest.sources:
        available = source.validation.tokens // length
        share = round(num_sequences * source.validation.tokens / total) if total else 0
        count = min(max(share, 1), available) if available else 0
        reader = TokenReader(manifest, source.name, "validation")
        for number in range(count):
            start = number * available // count * length
            rows.append(reader.read(start, start + length))
    return np.stack(rows).astype(np.int64) if rows else np.zeros((0, length), np.int64)


class Speed:
    """Turns a step's times into throughput, utilisation and memory.

    Args:
        shape: the model's `ModelShape`.
    """

    def __init__(self, plan: Plan, shape: Any, place: Place) -> None:
        self._plan, self._place = plan, place
        self._cuda = place.device.startswith("cuda")
        name = torch.cuda.get_device_name(place.device) if self._cuda else ""
        peak = peak_flops(name)
        self._peak = peak * place.world_size if peak else None
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
            return torch.cuda.max_memory_allocated(self._place.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def micro_batches(batch: Columns, micro_batch_size: int | None) -> list[tuple[torch.Tensor, int]]:
    """Split a local batch into micro-batches: as many on every rank, whatever its share.

    Filler rows come last. They are dropped where real rows are left; a micro-batch with none keeps
    one filler, which counts for nothing, because FSDP needs the same passes on every rank.

    Args:
        batch: `tokens` [rows, …] and `slot` [rows], −1 for a filler.
        micro_batch_size: rows of a micro-batch at most; None takes all at once.

    Returns:
        (tokens int64 [n, …], how many of the n rows are real), n >= 1.
    """
    height = len(batch["slot"])
    num_real = int((batch["slot"] != FILLER).sum())
    count = math.ceil(height / (micro_batch_size or height))
    out = []
    for rows in np.array_split(np.arange(height), count):
        real = int((rows < num_real).sum())
        kept = rows[:real] if real else rows[:1]
        out.append((torch.from_numpy(batch["tokens"][kept].astype(np.int64)), real))
    return out


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make random numbers (dropout) a function of the step, so that no generator state is saved."""
    torch.manual_seed(int(combine(seed, step, rank)) & 0x7FFF_FFFF_FFFF_FFFF)


def timed(batches: Iterable[Columns]) -> Iterator[tuple[Columns, float]]:
    """Each batch, with the seconds that were spent waiting for it."""
    iterator = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started
