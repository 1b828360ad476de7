"""The training loop. It knows torch, not Ray.

    restore → for each phase of the stage → for each batch → step → evaluate, log, checkpoint

`train` is what every rank runs. Where the batches come from is the caller's: `open_batches(phase,
step)` returns an iterator of local batches (through Ray Data, or read in this process). All state
is the model, the optimizer and one integer, the number of finished steps: learning rate, data
order and random numbers are functions of it, so restoring a step restores everything.

Ranks agree without extra messages: what one of them wants (to stop, say) rides along in the sum of
the losses that each step needs anyway, so all see it after the same step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict

from pipelines.ingest import BatchMismatch, Columns, check_batch, load_manifest
from pipelines.order import digest, named_spans
from pipelines.permute import combine
from tst_ray.architecture import describe
from tst_ray.batches import Validation, micro_batches, timed, to_device
from tst_ray.checkpoint import Ranks
from tst_ray.errors import RunError
from tst_ray.guard import PASSED_OVER, Guard, Rollback, is_finite
from tst_ray.job import DONE, FAILED_SAVES, ROLLBACK, STOPS, Ended, Job, Place
from tst_ray.journal import Journal, Writer, read_passed_over, steps_passed_over
from tst_ray.machine import check_gpu
from tst_ray.model import SuperpositionLM, build_model, join_group
from tst_ray.model_config import hf_config
from tst_ray.optim import build_optimizer, clip_grad_norm, set_lr
from tst_ray.plan import Phase
from tst_ray.saving import Saving
from tst_ray.speed import Speed
from tst_ray.storage import Storage
from tst_ray.timeouts import Bounds
from tst_ray.watchdog import Unwatched, Watchdog

OpenBatches = Callable[[Phase, int], Iterable[Columns]]
_SAVE = len(STOPS) + 1  # among what ranks may want: a checkpoint, and then to go on


def train(job: Job, place: Place, open_batches: OpenBatches) -> Ended:
    """Train from the newest good checkpoint to the end of the stage, or until told to stop.

    Raises:
        RunError: no checkpoint of several is intact, or too many roll-backs.
        BatchMismatch: a batch is not the one the plan says.
    """
    join_group(job.config.train.precision, torch.device(place.device))
    ranks = Ranks()
    run = Storage(job.run_url)
    nodes = tuple(node for node in ranks.gather(place.node) if node)
    writer = Writer(place.rank, place.world_size, nodes)
    with (
        Journal(run, job.plan, writer) as journal,
        watching(job, journal, place.rank) as watchdog,
    ):
        trainer = Trainer(job, place, ranks, journal, watchdog)
        return train_phases(trainer, open_batches)


def train_phases(trainer: Trainer, open_batches: OpenBatches) -> Ended:
    """The loop itself."""
    step, last_step = trainer.restore(), trainer.job.last_step
    for phase in trainer.plan.phases:
        if not phase.first_step <= step < min(phase.last_step, last_step):
            continue
        trainer.start_phase(phase, step)
        for batch, wait_s in timed(open_batches(phase, step)):
            record = trainer.train_step(phase, step, batch, wait_s)
            step += 1
            if trainer.evaluation_due(phase, step):
                record["val_loss"] = trainer.evaluate(step)
            trainer.journal.log(record)
            if rollback := trainer.guard.rollback(step - 1):
                return trainer.roll_back(rollback, step)
            if trainer.stop_reason:
                return trainer.stop(step)
            trainer.saving.if_due(step)
            trainer.expect("data", step)
            if step == phase.last_step:
                break
        if step < min(phase.last_step, last_step):
            raise BatchMismatch(
                f"phase {phase.index + 1}: the batches ended after step {step}, {phase.last_step} "
                "were planned"
            )
    return trainer.finish(step)


@contextlib.contextmanager
def watching(job: Job, journal: Journal, rank: int) -> Iterator[Unwatched]:
    """A watchdog over this worker while the block runs; none where `fault.hang_s` is null."""
    fault = job.config.fault
    bounds = Bounds(fault.hang_s or 0.0, fault.start_s)
    dog = Unwatched(bounds)
    if fault.hang_s is not None:
        dog = Watchdog(job.run_url, bounds, journal.attempt, rank)
    dog.expect("start", 0)
    try:
        yield dog
    finally:
        dog.close()


class Trainer:
    """One worker's model, optimizer, checkpoints and guard, and what it tells."""

    def __init__(
        self, job: Job, place: Place, ranks: Ranks, journal: Journal, watchdog: Unwatched
    ) -> None:
        config = job.config
        self.job, self.place, self.config, self.plan = job, place, config, job.plan
        self.ranks, self.journal, self.watchdog = ranks, journal, watchdog
        self.device = torch.device(place.device)
        self.run = Storage(job.run_url)
        self.times = {"entered": round(time.time(), 3)}
        if threads := config.train.threads or place.threads:
            torch.set_num_threads(threads)
        self.guard = Guard(config.fault)
        self.saving = Saving(job, ranks, journal, watchdog, self.guard, self.state)
        self.checkpoint = self.saving.newest_good()  # to go on from; None at the start of a run
        self.times["verified"] = round(time.time(), 3)
        manifest = load_manifest(job.feeds[0])
        self.hf_config = hf_config(
            config.model,
            vocab_size=manifest.vocab_size,
            eot_token=manifest.eot_token,
            kept=job.model,
        )
        shape = describe(self.hf_config)
        if self.device.type == "cuda":
            done = self.checkpoint.step if self.checkpoint else 0
            phases = [p for p in self.plan.phases if p.last_step > done]
            check_gpu(self.device, shape, self.plan, phases, place.world_size, config.train)
        self.model: SuperpositionLM = build_model(
            self.hf_config,
            pretrained=config.model.source if config.model.pretrained else None,
            seed=config.run.seed,
            weights=self.checkpoint is None,
            device=self.device,
            precision=config.train.precision,
            compile=config.train.compile,
            activation_checkpointing=config.train.activation_checkpointing,
            reshard=config.train.reshard,
        )
        self.optimizer = build_optimizer(self.model, config.train)
        self.validation = Validation.load(config, self.plan, manifest, place.rank, place.world_size)
        self.speed = Speed(self.plan, shape, place.device, place.world_size)
        self.passed_over: Callable[[int], bool] = lambda step: False
        self.stop_reason: str | None = None
        self._state: dict[str, Any] | None = None
        self.times["built"] = round(time.time(), 3)

    # -- a step ---------------------------------------------------------------------------------

    def train_step(self, phase: Phase, step: int, batch: Columns, wait_s: float) -> dict[str, Any]:
        """Train on this rank's share of one global batch and return the step's record."""
        self.expect("step", step)
        started = time.perf_counter()
        feed = self.job.feeds[phase.index]
        lanes = check_batch(batch, feed, step, self.place.rank, self.place.world_size)
        passed_over = self.passed_over(step)
        lr = self.config.train.learning_rate * self.plan.lr_multiplier(step)
        losses = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(2)]
        norm_tensor = torch.zeros((), device=self.device)
        if not passed_over:
            seed_step(self.config.run.seed, step, self.place.rank)
            losses = self._backward(phase, batch)
            norm_tensor = clip_grad_norm(self.model, self.config.train.clip_norm)

        *sums, wish, norm = self.all_sum(losses, [*lanes.tolist(), self._wish()], [norm_tensor])
        self.stop_reason = STOPS[int(wish) - 1] if 0 < wish < _SAVE else None
        self.saving.wanted = wish == _SAVE
        mark: str | None = PASSED_OVER
        if not passed_over:
            mark = self.guard.observe(step, sums[0], norm)
            if is_finite(sums[0], norm):
                set_lr(self.optimizer, lr)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        record = {
            "step": step + 1,
            "phase": phase.index,
            "bag_size": phase.bag_size,
            "loss": None if passed_over else sums[0],
            "lr": lr,
            "grad_norm": None if passed_over else norm,
            "world_size": self.place.world_size,
            "attempt": self.journal.attempt,
            "data_digest": digest(sums[2:]),
            "mark": mark,
        }
        if self.model.has_router:
            record["router_loss"] = sums[1]
        record.update(self.speed.measure(phase, step + 1, time.perf_counter() - started, wait_s))
        return record

    def _backward(self, phase: Phase, batch: Columns) -> list[torch.Tensor]:
        """Gradients of this rank's share; its sums of the loss and of the router's, float64."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        router_sum = torch.zeros_like(loss_sum)
        pieces = micro_batches(batch, self.config.train.micro_batch_size)
        for number, (tokens, num_real) in enumerate(pieces):
            self.model.set_last_micro_batch(number == len(pieces) - 1)
            out = self.model(to_device(tokens, self.device), phase, num_real=num_real)
            out.objective.backward()
            loss_sum += out.loss.detach()
            router_sum += out.router_loss.detach()
        return [loss_sum, router_sum]

    def evaluate(self, step: int) -> float | None:
        """Plain next-token cross-entropy (nats) on held-out text; None where none was held out."""
        if self.validation.num_targets == 0:
            return None
        started = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, num_real in self.validation.micro_batches:
            self.expect("evaluation", step)
            tokens = to_device(tokens, self.device)
            total += self.model.next_token_loss(tokens, num_real=num_real)
        loss = self.all_sum([total])[0] / self.validation.num_targets
        self.journal.timing(eval_s=time.perf_counter() - started)
        return loss

    def all_sum(
        self,
        values: list[torch.Tensor],
        lanes: Sequence[int] = (),
        alike: Sequence[torch.Tensor] = (),
    ) -> list[float]:
        """Sum over the ranks, in one collective, and wait for the device once; float64.

        Args:
            values: scalar tensors to sum.
            lanes: integers below 2^40 to sum.
            alike: scalar tensors that all ranks have alike, and that come after the sums.
        """
        exact = to_device(torch.tensor(lanes, dtype=torch.float64), self.device)
        packed = torch.cat([torch.stack(values).double(), exact])
        if dist.is_initialized():
            dist.all_reduce(packed)
        return list(torch.cat([packed, *(value.double().view(1) for value in alike)]).tolist())

    def _wish(self) -> int:
        """What this rank wants all to do after the step: a place in `STOPS`, from 1, or `_SAVE`."""
        if self.place.rank == 0:
            if self.saving.failed >= self.config.fault.max_failed_saves:
                return STOPS.index(FAILED_SAVES) + 1
            if reason := self.journal.stop_reason():
                return STOPS.index(reason) + 1
            if self.saving.is_overdue():
                return _SAVE
        return 0

    def expect(self, kind: str, step: int) -> None:
        """Tell the watchdog that what came before is done, and what comes next."""
        self.watchdog.expect(kind, step)

    # -- state ----------------------------------------------------------------------------------

    def evaluation_due(self, phase: Phase, step: int) -> bool:
        """At every `metrics.val_every` steps, and where a phase ends."""
        return step % self.config.metrics.val_every == 0 or step == phase.last_step

    def state(self) -> dict[str, Any]:
        """Model and optimizer state by parameter name, sharded as they are; live tensors.

        Gathered once: it takes longer than copying a small model, and all updates are in place.
        """
        if self._state is None:
            self._state = full_state(self.model, self.optimizer)
        return self._state

    def restore(self) -> int:
        """Load the checkpoint to go on from and open the journal behind it; the finished steps."""
        state = self.state()  # before an update: torch makes none for what never gets a gradient
        if (info := self.checkpoint) is not None:
            self.saving.load(info, state)
        step = info.step if info else 0
        if step and self.place.rank == 0:
            # What is newer could not be read, or is damaged. Were it good again one day, a run that
            # jumped to it would miss the lines of the steps between.
            self.saving.forget_after(step)
        self.times["loaded"] = round(time.time(), 3)
        self._begin(step, in_memory=bool(info and self.saving.is_in_memory(info)))
        return step

    def _begin(self, step: int, in_memory: bool) -> None:
        """Open the journal, and take up what the guard and the roll-backs before left."""
        wanted = 4 * self.config.fault.spike_window
        self.journal.begin(
            step,
            self.config.metrics.tensorboard_every,
            self.config.to_yaml(),
            from_memory=in_memory,
            times=self.times,
        )
        first_step = self.plan.phase_at(step).first_step if step < self.plan.total_steps else step
        history, rollbacks = self.ranks.gather(
            (
                [
                    (record["step"] - 1, record["loss"], record.get("mark"))
                    for record in self.journal.recent(wanted)
                    if record["step"] > first_step
                ],
                read_passed_over(self.run),
            )
        )[0]
        self.guard.resume(history)
        self.num_rollbacks = len(rollbacks)
        self.passed_over = steps_passed_over(rollbacks)

    def roll_back(self, rollback: Rollback, step: int) -> Ended:
        """Forget the checkpoints since before the offending steps, and pass over their data.

        Raises:
            RunError: that was done `fault.max_rollbacks` times already.
        """
        self.saving.wait(step)
        most = self.config.fault.max_rollbacks
        if self.num_rollbacks >= most:
            raise RunError(
                f"step {step}: {rollback.why}, after {most} roll-backs (fault.max_rollbacks); see "
                "events.jsonl for the data, lower train.learning_rate in a new run, or raise it"
            )
        if self.place.rank == 0:
            self._record_rollback(rollback)
        self.ranks.gather(None)  # nobody restarts before it is written
        self.journal.finish(step)
        return Ended(step, ROLLBACK)

    def _record_rollback(self, rollback: Rollback) -> None:
        back_to = self.saving.forget_after(rollback.first_step)
        facts = {
            "first_step": rollback.first_step,
            "last_step": rollback.last_step,
            "why": rollback.why,
            "back_to": back_to,
        }
        self.journal.pass_over(facts)
        spans = named_spans(
            self.job.feeds[0].order, range(rollback.first_step, rollback.last_step + 1)
        )
        self.journal.event("rollback", **facts, spans=spans)

    def start_phase(self, phase: Phase, step: int) -> None:
        """Record that a phase begins or goes on."""
        if step == phase.first_step:
            self.guard.start_phase()
        # Its first step may compile, and reading start anew.
        self.watchdog.bounds.forget("step", "data")
        self.journal.event(
            "phase_start",
            phase=phase.index,
            bag_size=phase.bag_size,
            step=step,
            world_size=self.place.world_size,
        )
        self.journal.step_began()
        self.expect("data", step)

    def stop(self, step: int) -> Ended:
        """End between two steps because rank 0 wants it, with a checkpoint where storage works."""
        reason = self.stop_reason
        assert reason is not None
        if reason == FAILED_SAVES:
            self.saving.wait(step)
        else:
            self.saving.finish(step, save=True)
        self.journal.event("stop", step=step, reason=reason)
        self.journal.finish(step)
        return Ended(step, reason)

    def finish(self, step: int) -> Ended:
        """End where the stage does, with its last checkpoint."""
        self.saving.finish(step)
        self.journal.finish(step)
        return Ended(step, DONE)


def full_state(model: SuperpositionLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a checkpoint holds, by parameter name, sharded as it is; the live tensors.

    The settings of the optimizer's groups are not among it: those are the config's, which a run
    keeps, and the learning rate is set before each step.
    """
    is_new = not optimizer.state
    model_state, optimizer_state = get_state_dict(model, optimizer)
    if is_new:  # torch has made one, by a step without gradients; it counts for nothing
        for state in optimizer.state.values():
            state["step"].zero_()
    return {"model": model_state, "optimizer": {"state": optimizer_state["state"]}}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make random numbers (dropout) a function of the step, so that no generator state is saved."""
    value = int(combine(seed, step, rank)) & 0x7FFF_FFFF_FFFF_FFFF
    torch.default_generator.manual_seed(value)  # torch.manual_seed takes half a millisecond
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
