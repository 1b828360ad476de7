"""The driver: a run from its text to its model folder.

    PREPARE ──> PLAN ──> TRAIN ──> SWITCH ──> TRAIN ──> … ──> EXPORT ──> FINISHED
                           │ ▲                                             (terminal)
                           └─┘ attempts                any ──────────> FAILED
                          (stage.py)                                   (terminal, resumable)

A *stage* is a run of phases with the same workers: one worker group. Inside it the phase changes
between two steps; from stage to stage the run goes through a committed checkpoint. The coordinator
holds no tensors and sees no samples: it reads which checkpoints are committed, has the stage that
comes next trained, and ends. Where the run stands is on storage alone, so a killed driver loses
nothing: the same command finds the newest committed checkpoint and goes on in the right phase.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.errors import BadInput, DataError
from pipelines.ingest import Feed
from pipelines.manifest import Manifest
from pipelines.order import ORDER_VERSION
from tst_ray import outlook
from tst_ray.checkpoint import newest_step
from tst_ray.corpus import (
    build_feeds,
    build_order,
    cache_folder,
    check_inputs,
    copied_manifest,
    corpus_begun_with,
    mixture,
    prepare_corpus,
    shown_mixture,
)
from tst_ray.environment import check_environment, cluster_address
from tst_ray.errors import Interrupted, RunError, last_line
from tst_ray.goodput import Account
from tst_ray.hold import Hold
from tst_ray.host_memory import check_memory
from tst_ray.job import Job
from tst_ray.journal import charge, read_state, update_state
from tst_ray.metrics import EVENTS, add_event, one_line_a_step, try_event, write_hparams
from tst_ray.nodes import (
    ask_autoscaler,
    check_capacity,
    keep_nodes,
    least_workers,
    object_stores,
    unused_gpus,
)
from tst_ray.plan import Phase, Plan, build_plan
from tst_ray.room import steadily
from tst_ray.runstore import MANIFEST, PLAN, kept_model, open_run, order_problem, read_events
from tst_ray.session import ray_session
from tst_ray.settings import Config
from tst_ray.sight import Sight, needed_everywhere
from tst_ray.stage import Stage
from tst_ray.storage import Storage, patiently
from tst_ray.tasks import Call, begin, check_model, export_model, store_problem

Say = Callable[[str], None]
Quiet = Callable[[str], contextlib.AbstractContextManager[None]]

_FINAL = ("loss", "val_loss")
_TURN_S = 10.0  # a task that has not begun by then may wait for others to end
_EXPORT_BYTES = 8  # a parameter: the model in float32, and what is read into it


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind.

    Attributes:
        records: the last line of metrics.jsonl of each phase, by its index; some may be lost.
        val_loss: the final validation loss in nats; None where no text was held out.
        samples: a few continuations by the trained model.
        log_path: where Ray's output went; None without Ray.
        account: where the time went.
        passes: over each source of text, by its name.
    """

    run: Storage
    plan: Plan
    records: dict[int, dict[str, Any]]
    val_loss: float | None
    model_folder: str
    samples: tuple[str, ...]
    log_path: str | None
    account: Account
    passes: dict[str, float]


def prepare_only(
    config: Config, say: Say, quiet: Quiet = lambda log_path: contextlib.nullcontext()
) -> Manifest:
    """Tokenize without training, on Ray or in this process as `cluster.backend` says.

    Args:
        quiet: sends what Ray prints to a file.
    """
    check_environment(config)
    check_inputs(config)
    if config.cluster.backend == "inline":
        return prepare_corpus(config, "inline", say)

    @contextlib.contextmanager
    def on_ray() -> Iterator[None]:
        cache = Storage(cache_folder(config))
        cache.make()
        log_path = cache.at("ray.log") if cache.is_local else "prepare-ray.log"
        say(f"{told_of_ray()} (what it prints is in {log_path})")
        with quiet(log_path), ray_session(config, None):
            yield

    return prepare_corpus(config, "ray", say, on_ray)


def told_of_ray() -> str:
    """What is said of the Ray that a run is about to use."""
    address = cluster_address()
    return f"joining Ray at {address}" if address else "starting Ray"


class Coordinator:
    """Drives one run from where it stands to its end.

    Args:
        config: the run's.
        terminal: what the user sees; `say` and `quiet` (see display.py).
    """

    def __init__(self, config: Config, terminal: Any) -> None:
        self.config, self.terminal, self.say = config, terminal, terminal.say
        self.plan = build_plan(config)
        self._trains = False  # whether training has begun, or what follows it
        self.log_path: str | None = None
        self.vaults: Any = None  # the memory of the cluster, where checkpoints are kept too
        self.sight = Sight()  # which nodes see what the run needs
        self._held = Hold()  # on the run directory

    def run(self) -> Outcome:
        """Train to the end.

        Raises:
            ConfigError: before anything starts.
            RunError: the run stopped; the same command resumes it.
            Interrupted: on request.
        """
        check_environment(self.config)
        with open_run(self.config) as (run, self._held):
            try:
                if (
                    patiently(lambda: run.read_json(PLAN)) is None
                ):  # else the shards that it began with may do
                    check_inputs(self.config)
                _fold_events(run)
                self._begin_account(run)
                if self.config.cluster.backend == "inline":
                    return self._drive(run, "inline", self._begin_check("inline", kept_model(run)))
                return self._with_ray(run)
            except BaseException as error:
                self._held.check()  # then what failed is of no matter, and the run not ours to mark
                self._record_failure(run, error)
                is_told = isinstance(error, BadInput)  # with the setting that is to blame
                if isinstance(error, (DataError, OSError)) and not is_told:  # text's, or storage's
                    raise RunError(f"{run.url}: {error}") from error
                raise

    def _record_failure(self, run: Storage, error: BaseException) -> None:
        """Note how the run stopped; a finished one stays it, where no more was done to it."""
        asked = isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit))
        how = "stopped" if asked else "failed"
        with contextlib.suppress(Exception):  # the error itself is what the user must see
            if self._trains or not _is_finished(run):
                update_state(run, status=how)
            if self._trains:
                add_event(run, how, error=last_line(error))

    def _begin_account(self, run: Storage) -> None:
        """Take up the run's account of time: since it was last written, nobody drove the run.

        How it stopped is no longer true: hours may pass until a worker writes that it trains.
        """
        if "time" not in patiently(lambda: read_state(run)):
            account = Account(time.time()).to_dict()
            patiently(lambda: update_state(run, status="starting", time=account))
        elif not _is_finished(run):
            self._charge(run, "down")
            patiently(lambda: update_state(run, status="starting"))

    def _charge(self, run: Storage, part: str) -> None:
        """Charge what has passed to a part; the account of a finished run is closed."""
        if not patiently(lambda: _is_finished(run)):
            charge(run, part)

    def _starting(self, run: Storage) -> str:
        """The part of the account that is charged until workers train."""
        return "restart" if newest_step(run) else "startup"

    def _begin_wait(self, run: Storage, part: str, why: str) -> None:
        """Tell why the run waits for the cluster; what passed until now is a part's."""
        self._charge(run, part)
        self.say(why)
        try_event(run, "waiting", why=why)

    def _wait_on(self, run: Storage) -> None:
        """Charge what has passed to waiting. Raises Overtaken."""
        self._held.check()
        self._charge(run, "waiting_for_nodes")

    def _with_ray(self, run: Storage) -> Outcome:
        self.log_path = run.at("ray.log") if run.is_local else f"{self.config.run.name}-ray.log"
        with self.terminal.quiet(self.log_path):
            self.say(told_of_ray())
            with ray_session(self.config, self.plan) as session:
                # For the worker groups, while the first task is waited for; Ray's start needs the
                # cores for itself.
                threading.Thread(target=importlib.import_module, args=("ray.train.torch",)).start()
                patiently(lambda: update_state(run, ray_address=session.address))
                try:
                    self._check_cluster(run, is_local=session.is_local)
                    check = self._begin_check("ray", kept_model(run))
                    with self._memory_of_the_cluster():
                        return self._drive(run, "ray", check)
                finally:
                    with contextlib.suppress(Exception):  # what ended the run is what to tell
                        self._held.check()
                        self._let_go()

    def _check_cluster(self, run: Storage, is_local: bool) -> None:
        """Refuse a cluster that the run could not use, and say what it leaves unused.

        A new run is refused on nodes that do not see what it needs: its text is prepared on all.
        One that has begun goes on without them.
        """
        step = newest_step(run)
        check_capacity(
            self.config,
            self.plan,
            step,
            say=lambda why: self._begin_wait(run, self._starting(run), why),
            wait_on=lambda: self._wait_on(run),
        )
        if not is_local:
            self.sight = Sight(needed_everywhere(run, self.config))
            self.sight.settle()
        if not step and (problems := self.sight.problems()):
            raise RunError(
                f"{next(iter(problems.values()))}; give a folder that all nodes share, and install "
                "this package, and what its storage needs, on every node"
            )
        if gpus := unused_gpus(self.config):
            self.say(f"there are {gpus} GPUs, and cluster.gpus_per_worker is 0: training on CPUs")

    @contextlib.contextmanager
    def _memory_of_the_cluster(self) -> Iterator[None]:
        """The memory of the cluster while the block runs, where checkpoints go to memory too."""
        if self.config.checkpoint.memory_every is None:
            yield
            return
        from tst_ray.memory import Vaults

        # A key of this driver's own: what another one left in memory is not to be trusted.
        self.vaults = vaults = Vaults(f"{self.config.run.name}-{uuid.uuid4().hex[:8]}")
        try:
            yield
        finally:
            vaults.close()

    def _begin(
        self, backend: str, function: Callable[..., Any], *args: Any, memory: float = 0.0
    ) -> Call:
        """Begin a task (see tasks.py), kept off the nodes that do not see the run."""
        self.sight.settle()
        return begin(backend, function, *args, memory=memory, away=self.sight.unseen())

    def _begin_check(
        self, backend: str, model: dict[str, Any] | None, manifest: Manifest | None = None
    ) -> Call:
        return self._begin(backend, check_model, self.config, self.plan, manifest, model)

    def _result(self, run: Storage, task: Call, part: str) -> Any:
        """What a task gives; where others hold every CPU, the user and the account hear of it.

        Args:
            part: of the account; what passed before it waits is charged to it.
        """
        waits = False
        while not task.has_begun(_TURN_S):
            if waits:
                self._wait_on(run)
            elif lacks := steadily(task.lacks):
                waits = True
                self._begin_wait(run, part, f"waiting for {lacks}: others use the nodes")
        if waits:
            self._wait_on(run)
        return task.result()

    def _drive(self, run: Storage, backend: str, check: Call) -> Outcome:
        starting = self._starting(run)
        remarks, shape, model = self._result(run, check, starting)
        for remark in remarks:
            self.say(remark)
        check_memory(self.config, self.plan, shape, newest_step(run))
        manifest = self._corpus_of(run, backend)
        check = self._begin_check(backend, model, manifest)
        remarks, shape, _ = self._result(run, check, starting)
        for remark in remarks:
            self.say(remark)
        check_memory(self.config, self.plan, shape, newest_step(run))  # with its vocabulary
        if self.vaults is not None:
            stores = object_stores(self.config, least_workers(self.plan))
            if problem := store_problem(shape, stores):
                self.say(problem)
                self.vaults = None
        self._charge(run, starting)
        order = build_order(self.config, self.plan, manifest)
        if len(shares := mixture(order)) > 1:
            self.say(f"mixture: {shown_mixture(shares)}")
        counts = outlook.passes(order)
        if not newest_step(run):
            for line in outlook.at_start(self.config, self.plan, shape, counts):
                self.say(line)
        feeds = build_feeds(self.plan, order, manifest, run.location(MANIFEST))
        self._record_plan(run, manifest, model)
        while True:
            for number, stage in enumerate(self.plan.stages()):
                self._train(run, feeds, stage, switched=number > 0)
            self._trains = True
            self.say("writing the model folder")
            self._let_go()  # of the workers' nodes
            self._charge(run, "closing")
            memory = _EXPORT_BYTES * shape.parameters
            key_file = self.config.checkpoint.key_file
            export = self._begin(backend, export_model, run.url, key_file, memory=memory)
            step, samples = self._result(run, export, "closing")
            self._charge(run, "closing")
            if step == self.plan.total_steps:
                return self._finish(run, samples, counts)
            if newest_step(run) >= self.plan.total_steps:
                raise RunError(
                    f"{run.url}: the last checkpoint cannot be read now; the same command tries "
                    "again"
                )
            if problem := order_problem(run):
                raise RunError(f"{run.url}: the last checkpoint is damaged, and the run {problem}")
            self.say(f"the last checkpoint is damaged; going back to step {step:,}")

    def _corpus_of(self, run: Storage, backend: str) -> Manifest:
        """The shards that the run began with; for a new run, those of its text.

        Raises:
            ConfigError: they are gone, and the text is not what it was.
        """
        before = run.read_json(PLAN)
        if before is None:
            return prepare_corpus(self.config, backend, self.say, self._nodes_for_reading)
        copy = run.location(MANIFEST)
        workplace = self._nodes_for_reading
        return corpus_begun_with(self.config, before, copy, backend, self.say, workplace)

    @contextlib.contextmanager
    def _nodes_for_reading(self) -> Iterator[None]:
        """Let text be tokenized on all nodes: those that workers asked for count as theirs.

        Ray Data keeps busy those that it needs.
        """
        keep_nodes(self.config)
        yield

    def _let_go(self) -> None:
        """Ask for no nodes from now on: the cluster would stay large."""
        if self.config.cluster.backend == "ray":
            ask_autoscaler(self.config, 0)

    def _record_plan(self, run: Storage, manifest: Manifest, model: dict[str, Any]) -> None:
        """Write plan, model and manifest before the first step; later, where they no longer hold.

        Shards that moved are one such case; others are a manifest that was damaged, and shards that
        were made again under other names.
        """
        before = run.read_json(PLAN)
        if copied_manifest(manifest.folder, run.location(MANIFEST)) != manifest:
            manifest.save(run.location(MANIFEST))
        if before is None:
            facts = {
                "order": ORDER_VERSION,
                "corpus": manifest.fingerprint,
                "shards": manifest.folder,
                "model": model,
            }
            run.write_json(PLAN, {**asdict(self.plan), **facts}, private=True)
        elif before["shards"] != manifest.folder or "model" not in before:  # an older version's
            moved = {"model": model, **before, "shards": manifest.folder}
            run.write_json(PLAN, moved, private=True)

    def _train(
        self, run: Storage, feeds: tuple[Feed, ...], phases: tuple[Phase, ...], switched: bool
    ) -> None:
        """Train what is left of a stage, from the newest committed checkpoint."""
        from tst_ray.display import watch

        step, last_step = newest_step(run), phases[-1].last_step
        if step >= last_step:
            return
        if switched and step == phases[0].first_step:
            add_event(run, "switch", step=step, workers=_workers(phases[0]))
        self._trains = True
        self._announce(phases, step)
        memory_url = self.vaults.url if self.vaults else None
        model = kept_model(run)
        job = Job(self.config, self.plan, feeds, run.url, last_step, memory_url, model)
        stage = Stage(job, phases, self.say, vaults=self.vaults, sight=self.sight, held=self._held)
        with watch(run, self.plan, self.terminal):
            stage.train()

    def _announce(self, stage: tuple[Phase, ...], step: int) -> None:
        names = " and ".join(f"phase {phase.index + 1}" for phase in stage)
        how = f"resuming at step {step:,}" if step else "from the first step"
        self.say(f"training {names} on {_workers(stage[0])}, {how}")

    def _finish(self, run: Storage, samples: list[str], passes: dict[str, float]) -> Outcome:
        records = one_line_a_step(run)
        step = self.plan.total_steps
        last = next((record for record in records.values() if record["step"] == step), {})
        # a step that was passed over has no loss, and no text may have been held out
        final = {name: last[name] for name in _FINAL if last.get(name) is not None}
        if not any(event.get("event") == "finish" for event in read_events(run)):
            write_hparams(run, self.config.dump(), final, step)
            add_event(run, "finish", step=step, **final)
        _fold_events(run)
        update_state(run, status="finished", step=step, **final)
        account = Account.from_dict(read_state(run).get("time"), time.time())
        model_folder = (run / "model").url
        return Outcome(
            run,
            self.plan,
            records,
            final.get("val_loss"),
            model_folder,
            tuple(samples),
            self.log_path,
            account,
            passes,
        )


def _is_finished(run: Storage) -> bool:
    return bool(read_state(run).get("status") == "finished")


def _fold_events(run: Storage) -> None:
    with contextlib.suppress(OSError):  # they are read where they are, too
        run.fold(EVENTS)


def _workers(phase: Phase) -> str:
    low, high = phase.min_workers, phase.max_workers
    if low != high:
        return f"{low} to {high} workers"
    return f"{low} worker{'s' if low != 1 else ''}"
