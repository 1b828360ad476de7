"""The driver: which phase, on how many workers, from which checkpoint. The one user of ray.train.

    PREPARE ──> PLAN ──> TRAIN ──> SWITCH ──> TRAIN ──> … ──> EXPORT ──> FINISHED
                           │ ▲                                             (terminal)
                 a worker  └─┘                          any ──────────> FAILED
                 died: same stage, newest                                 (terminal, resumable)
                 committed checkpoint

A *stage* is a run of phases with the same workers: one worker group. Inside it the phase changes
between two steps; from stage to stage the run goes through a committed checkpoint. The coordinator
holds no tensors and sees no samples: it reads which checkpoints are committed, starts the group
that comes next, and ends. Where the run stands is on storage alone, so a killed driver loses
nothing: the same command finds the newest committed checkpoint and goes on in the right phase.
"""

from __future__ import annotations

import contextlib
import enum
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipelines.errors import DataError
from pipelines.ingest import Feed
from pipelines.manifest import Manifest, verify_shards
from pipelines.storage import locate
from tst_ray.checkpoint import committed
from tst_ray.config import Config
from tst_ray.corpus import build_feeds, build_order, prepare_corpus
from tst_ray.errors import ConfigError, RunError, UserError
from tst_ray.metrics import METRICS, add_event, write_hparams
from tst_ray.plan import Phase, Plan, build_plan
from tst_ray.runstore import MANIFEST, PLAN, open_run, read_events, update_state
from tst_ray.session import check_capacity, ray_session, worker_resources, workers_that_fit
from tst_ray.storage import Storage

Say = Callable[[str], None]


class State(enum.Enum):
    """Where the driver is. FINISHED and FAILED are terminal; FAILED can be resumed."""

    PREPARE = "preparing the corpus"
    PLAN = "planning"
    TRAIN = "training a stage on its worker group"
    SWITCH = "the stage is committed; the next one has other workers"
    EXPORT = "writing the model folder"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind.

    Attributes:
        records: the last line of metrics.jsonl of each phase.
        val_loss: the final validation loss in nats; None where no text was held out.
        samples: a few continuations by the trained model.
        log_path: where Ray's output went; None without Ray.
    """

    run: Storage
    plan: Plan
    records: tuple[dict[str, Any], ...]
    val_loss: float | None
    model_folder: str
    samples: tuple[str, ...]
    log_path: str | None


def prepare_only(config: Config, say: Say) -> Manifest:
    """Tokenize without training, on Ray or in this process as `cluster.backend` says."""
    if config.cluster.backend == "inline":
        return prepare_corpus(config, "inline", say)
    with ray_session(config, build_plan(config)):
        return prepare_corpus(config, "ray", say)


class Coordinator:
    """Drives one run from where it stands to its end.

    Args:
        config: the run's.
        terminal: what the user sees; `say` and `quiet` (see display.py).
    """

    def __init__(self, config: Config, terminal: Any) -> None:
        self.config, self.terminal, self.say = config, terminal, terminal.say
        self.plan = build_plan(config)
        self.state = State.PREPARE
        self.log_path: str | None = None

    def run(self) -> Outcome:
        """Train to the end.

        Raises:
            ConfigError: before anything starts.
            RunError, DataError: the run stopped; the same command resumes it.
        """
        with open_run(self.config) as run:
            try:
                if self.config.cluster.backend == "inline":
                    return self._drive(run, self._train_inline, "inline")
                return self._with_ray(run)
            except BaseException as error:
                self._record_failure(run, error)
                if isinstance(error, DataError):
                    raise RunError(f"{run.url}: {error}") from error
                raise

    def _record_failure(self, run: Storage, error: BaseException) -> None:
        """Note how the run stopped; what was refused before training changes nothing."""
        trained = self.state not in (State.PREPARE, State.PLAN)
        self.state = State.FAILED
        with contextlib.suppress(Exception):  # the error itself is what the user must see
            if trained:
                update_state(run, status="failed")
                add_event(run, "failed", error=_one_line(error))

    def _with_ray(self, run: Storage) -> Outcome:
        self.log_path = run.at("ray.log") if run.is_local else f"{self.config.run.name}-ray.log"
        with self.terminal.quiet(self.log_path):
            self.say("starting Ray")
            with ray_session(self.config, self.plan):
                check_capacity(self.config, self.plan, self.say)
                return self._drive(run, self._train_on_ray, "ray")

    def _drive(self, run: Storage, train_stage: Callable[..., None], backend: str) -> Outcome:
        manifest = self._corpus_of(run, backend)
        self._check_model(manifest)
        self._enter(State.PLAN)
        order = build_order(self.config, self.plan, manifest)
        feeds = build_feeds(self.plan, order, manifest, run.location(MANIFEST))
        self._record_plan(run, manifest)
        while True:
            for number, stage in enumerate(self.plan.stages()):
                self._train(run, feeds, stage, train_stage, switched=number > 0)
            self._enter(State.EXPORT)
            self.say("writing the model folder")
            step, samples = _call(backend, export_model, run.url)
            if step == self.plan.total_steps:
                return self._finish(run, samples)
            self.say(f"the last checkpoint is damaged; going back to step {step:,}")

    def _corpus_of(self, run: Storage, backend: str) -> Manifest:
        """The shards that the run began with; for a new run, those of its text.

        Raises:
            ConfigError: they are gone, and the text is not what it was.
        """
        before = run.read_json(PLAN)
        if before and run.exists(MANIFEST):
            try:
                # Text that was added since must not keep a run from going on.
                manifest = Manifest.load(before["shards"], run.location(MANIFEST))
                verify_shards(manifest)
                return manifest
            except DataError as error:
                self.say(f"{error}; preparing the text again")
        manifest = prepare_corpus(self.config, backend, self.say)
        if before and before["corpus"] != manifest.fingerprint:
            raise ConfigError(
                f"data: {manifest.folder} holds another corpus (fingerprint "
                f"{manifest.fingerprint[:12]}) than {run.url} began with "
                f"({before['corpus'][:12]}); restore the text, or use another run.name"
            )
        return manifest

    def _record_plan(self, run: Storage, manifest: Manifest) -> None:
        """Write the plan and the manifest, once, before the first step."""
        if not run.exists(PLAN) or not run.exists(MANIFEST):
            manifest.save(run.location(MANIFEST))
            facts = {"corpus": manifest.fingerprint, "shards": manifest.folder}
            run.write_json(PLAN, {**asdict(self.plan), **facts})

    def _train(
        self,
        run: Storage,
        feeds: tuple[Feed, ...],
        stage: tuple[Phase, ...],
        train_stage: Callable[..., None],
        switched: bool,
    ) -> None:
        """Train what is left of a stage, from the newest committed checkpoint."""
        from tst_ray.display import watch
        from tst_ray.worker import Job

        step, last_step = newest_step(run), stage[-1].last_step
        if step >= last_step:
            return
        if switched and step == stage[0].first_step:
            self._enter(State.SWITCH)
            add_event(run, "switch", step=step, workers=_workers(stage[0]))
        self._enter(State.TRAIN)
        self._announce(stage, step)
        job = Job(self.config, self.plan, feeds, run.url, last_step)
        with watch(run, self.plan, self.terminal):
            train_stage(run, job, stage)
        if newest_step(run) < last_step:
            raise RunError(
                f"{run.url}: training reached step {last_step}, but its checkpoint was not "
                "committed; see events.jsonl there, and run the same command again"
            )

    def _train_inline(self, run: Storage, job: Any, stage: tuple[Phase, ...]) -> None:
        """Train in this process: one worker, no Ray."""
        from pipelines.ingest import read_inline
        from tst_ray.worker import Place, train

        device = "cuda" if self.config.cluster.gpus_per_worker else "cpu"
        train(
            job,
            Place(device=device),
            lambda phase, step: read_inline(job.feeds[phase.index], step),
        )

    def _train_on_ray(self, run: Storage, job: Any, stage: tuple[Phase, ...]) -> None:
        """Train one stage on its worker group; Ray Train restarts the group when a worker dies."""
        events_before = len(read_events(run))
        try:
            fit_stage(run, job, stage[0], self.config)
        except Exception as error:
            told = [event for event in read_events(run)[events_before:] if event.get("fatal")]
            message = told[-1]["error"] if told else _one_line(error)
            raise RunError(f"{run.url}: {message}") from error

    def _check_model(self, manifest: Manifest) -> None:
        """Refuse, before workers start, a model that cannot be trained or does not fit the text."""
        from tst_ray.architecture import check_supported, hf_config

        model = hf_config(
            self.config.model, vocab_size=manifest.vocab_size, eot_token=manifest.eot_token
        )
        longest = max(phase.latent_length for phase in self.plan.phases)
        check_supported(model, latent_length=longest)

    def _announce(self, stage: tuple[Phase, ...], step: int) -> None:
        names = " and ".join(f"phase {phase.index + 1}" for phase in stage)
        how = f"resuming at step {step:,}" if step else "from the first step"
        self.say(f"training {names} on {_workers(stage[0])}, {how}")

    def _finish(self, run: Storage, samples: list[str]) -> Outcome:
        records = run.read_lines(METRICS)
        last = tuple(
            next(r for r in reversed(records) if r["phase"] == phase.index)
            for phase in self.plan.phases
        )
        val_loss = last[-1].get("val_loss")
        step, final = last[-1]["step"], {"loss": last[-1]["loss"]}
        if val_loss is not None:
            final["val_loss"] = val_loss
        if not any(event["event"] == "finish" for event in read_events(run)):
            write_hparams(run, self.config.dump(), final, step)
            add_event(run, "finish", step=step, **final)
        update_state(run, status="finished", step=step, **final)
        self._enter(State.FINISHED)
        model_folder = (run / "model").url
        return Outcome(run, self.plan, last, val_loss, model_folder, tuple(samples), self.log_path)

    def _enter(self, state: State) -> None:
        self.state = state


def newest_step(run: Storage) -> int:
    """The step of the newest committed checkpoint that nobody found damaged; 0 without any.

    Workers, who verify before they load, may find it damaged and go back to an earlier one.
    """
    found = committed(run / "checkpoints")
    return found[0].step if found else 0


def export_model(run_url: str) -> tuple[int, list[str]]:
    """Export the newest good checkpoint and sample; runs where tensors may live.

    Returns:
        the checkpoint's step, and the samples.
    """
    from tst_ray.export import export_run, sample_text

    step, folder = export_run(Storage(run_url))
    return step, sample_text(folder)


def fit_stage(run: Storage, job: Any, phase: Phase, config: Config) -> None:
    """Run `train_worker` on a Ray Train group until the stage is done.

    See https://docs.ray.io/en/latest/train/api/doc/ray.train.torch.TorchTrainer.html.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    workers: Any = (phase.min_workers, workers_that_fit(config, phase.max_workers))
    gpus = config.cluster.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers,
            use_gpu=gpus > 0,
            resources_per_worker=worker_resources(config),
        ),
        run_config=ray.train.RunConfig(
            # Ray Train would take a known name for a run of its own to restore. What restores ours
            # is the newest committed checkpoint, which is newer than what Ray has been told of.
            name=f"group-{uuid.uuid4().hex[:8]}",
            **_ray_storage(run),
            failure_config=ray.train.FailureConfig(max_failures=config.fault.max_failures),
            callbacks=[_stop_on_user_error()],
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        datasets=_datasets(job),
        dataset_config=_phase_data(run.url),
    )
    trainer.fit()


def _ray_storage(run: Storage) -> dict[str, Any]:
    """Where Ray Train keeps its own state: beside the run's, opened as the shards are."""
    if run.is_local:
        return {"storage_path": run.at("ray")}
    filesystem, path = locate(run.location("ray"))
    return {"storage_path": path, "storage_filesystem": filesystem}


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: `worker.train`, fed by Ray Data."""
    import ray.train
    import ray.train.torch

    from tst_ray.worker import Job, Place, train

    job: Job = loop_config["job"]
    context = ray.train.get_context()
    place = Place(
        context.get_world_rank(), context.get_world_size(), str(ray.train.torch.get_device())
    )

    def open_batches(phase: Phase, step: int) -> Iterator[Any]:
        feed = job.feeds[phase.index]
        rows = feed.rows_per_rank(place.world_size)
        for first, last in feed.parts(phase.max_workers):
            if step < last:
                shard = ray.train.get_dataset_shard(_dataset_name(feed, first))
                yield from shard.iter_batches(
                    batch_size=rows, batch_format="numpy", prefetch_batches=4
                )

    try:
        train(job, place, open_batches)
    except (UserError, DataError) as error:
        # Trying again would meet the same: tell the driver, and stop the run.
        add_event(Storage(job.run_url), "failure", fatal=True, rank=place.rank, error=str(error))
        raise


@dataclass(frozen=True)
class _Part:
    """The steps [first, last) of a phase, read as one Ray dataset."""

    feed: Feed
    first: int
    last: int


def _dataset_name(feed: Feed, first: int) -> str:
    return f"phase-{feed.phase}-from-{first}"


def _datasets(job: Any) -> dict[str, Callable[[], Any]]:
    """What Ray Train calls at each group start; `_phase_data` makes datasets of what it gets."""
    parts = [
        _Part(feed, first, last)
        for feed, phase in zip(job.feeds, job.plan.phases, strict=True)
        for first, last in feed.parts(phase.max_workers)
    ]
    return {_dataset_name(part.feed, part.first): partial(_itself, part) for part in parts}


def _itself(part: _Part) -> Any:
    return part


def _phase_data(run_url: str) -> Any:
    import ray.data
    import ray.train

    from pipelines.ingest import ray_dataset

    class PhaseData(ray.train.DataConfig):  # type: ignore[misc,unused-ignore]
        """Makes each dataset for the group that is there, from the step it starts at.

        Ray Train calls `configure` when rank 0 first asks for a dataset, so after rank 0 has
        restored a checkpoint and written to run.json which step that was.
        """

        def __init__(self) -> None:
            super().__init__()
            self._splits: list[Any] = []  # of each dataset made so far

        def configure(
            self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
        ) -> list[dict[str, Any]]:
            step = int((Storage(run_url).read_json("run.json") or {})["step"])
            output: list[dict[str, Any]] = [{} for _ in range(world_size)]
            for name, part in datasets.items():
                dataset = ray_dataset(part.feed, max(step, part.first), part.last, world_size)
                dataset.set_name(name)
                dataset.context.execution_options = ray.data.ExecutionOptions(preserve_order=True)
                dataset.context.enable_progress_bars = False
                splits = dataset.streaming_split(world_size, equal=True)
                for rank, split in enumerate(splits):
                    output[rank][name] = split
                self._retire(splits[0])
            return output

        def _retire(self, newest: Any) -> None:
            """End the actor behind all datasets but the last two: Ray Train keeps each for ever.

            When rank 0 opens a dataset, others may still read the one before, but none older: they
            train in step.
            """
            self._splits.append(newest)
            while len(self._splits) > 2:
                ray.kill(self._splits.pop(0)._coord_actor)

    return PhaseData()


def _stop_on_user_error() -> Any:
    import ray.train

    class StopOnUserError(ray.train.UserCallback):  # type: ignore[misc,unused-ignore]
        """Ends the run on errors that a restart would only meet again."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            for error in worker_exceptions.values():
                cause = getattr(error, "_base_exc", error)
                if isinstance(cause, (UserError, DataError)):
                    raise RunError(str(cause))

    return StopOnUserError()


def _call(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as a Ray task, or here where there is no Ray."""
    if backend == "inline":
        return function(*args)
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(ray.remote(function).options(num_cpus=1).remote(*args))
    except RayTaskError as error:
        raise error.cause from None  # the function's own error, without Ray's frames around it


def _workers(phase: Phase) -> str:
    low, high = phase.min_workers, phase.max_workers
    if low != high:
        return f"{low} to {high} workers"
    return f"{low} worker{'s' if low != 1 else ''}"


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1][:500]
