"""One worker group on Ray Train, from its start to its end.

    Group ──> TorchTrainer.fit, in a thread ──> worker.train on every worker
                                                  ▲ batches: Ray Data (reading.py)
    Group.outcome ◄── Ended │ GroupFailed

Each attempt is a `fit` of its own with a fixed number of workers, and Ray Train restarts nothing by
itself: it would resize without a checkpoint, count Ray Data's CPUs as free for workers, and go back
to the checkpoint that its controller has heard of, which is older than the newest committed one.
Who decides what comes next is stage.py.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from pipelines.errors import DataError, Unreadable
from pipelines.storage import locate
from tst_ray.autoscaler import leave_to_the_run
from tst_ray.errors import RunError, UserError, last_line
from tst_ray.job import Ended, Job, Place
from tst_ray.journal import STATE
from tst_ray.network import talk_where_ray_does
from tst_ray.nodes import away_from, worker_resources
from tst_ray.reading import Reading, datasets, phase_data
from tst_ray.settings import Config
from tst_ray.storage import Storage, patiently
from tst_ray.timeouts import COLLECTIVE_S

log = logging.getLogger(__name__)

_NODE = "tst_ray_node"  # an attribute of what a worker raises: where that was


class GroupFailed(Exception):
    """A group ended without having finished or been told to; another attempt may go on.

    Attributes:
        started: whether its processes ran at all.
        no_room: whether they did not because nothing was free for them.
        ranks: those that failed in a way that may be their node's, and it, where they said so.
    """

    def __init__(
        self,
        message: str,
        started: bool,
        no_room: bool = False,
        ranks: Mapping[int, str | None] | None = None,
    ) -> None:
        super().__init__(message)
        self.started, self.no_room, self.ranks = started, no_room, dict(ranks or {})


class Group:
    """A worker group, at work in the background from the moment it is made.

    Args:
        job: what each worker is told.
        world_size: how many workers.
        without: the nodes to leave out.
        readers: the label selector of nodes that may read the shards.
    """

    def __init__(
        self,
        job: Job,
        world_size: int,
        without: Collection[str] = (),
        readers: Mapping[str, str] | None = None,
    ) -> None:
        self._start = partial(_fit, job, world_size, without, dict(readers or {}))
        self._run_url = job.run_url
        self._result: Any = None
        self._error: BaseException | None = None
        # A thread: the main one must stay free for signals, and Ray Train's own handler, which
        # would end the run at the first Ctrl-C, is only set up there.
        self._thread = threading.Thread(target=self._fit, name="worker-group", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether the group has ended, after at most so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def outcome(self) -> Ended:
        """How it ended; call once it has.

        Raises:
            GroupFailed: a worker died or failed in a way that another attempt may not meet.
            RunError: in a way that it would only meet again.
        """
        if self._error is not None:
            raise self._explained(self._error) from self._error
        ended: Ended = self._result
        return ended

    def _fit(self) -> None:
        try:
            self._result = self._start()
        except BaseException as error:
            self._error = error
            _release_places()

    def _explained(self, error: BaseException) -> Exception:
        from ray.train import ControllerError, TrainingFailedError
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        if isinstance(error, ControllerError):
            failure = error.controller_failure
            no_room = isinstance(failure, WorkerGroupStartupTimeoutError)
            return GroupFailed(last_line(failure), started=False, no_room=no_room)
        if not isinstance(error, TrainingFailedError):
            return GroupFailed(last_line(error), started=False)
        failures = {
            rank: _bare(failure)
            for rank, failure in sorted(getattr(error, "worker_failures", {}).items())
        }
        for failure in failures.values():
            if isinstance(failure, (UserError, DataError)) and not isinstance(failure, Unreadable):
                return RunError(f"{self._run_url}: {failure}")
        died = {rank: error for rank, error in failures.items() if _is_death(error)}
        failed = died or failures  # others follow suit
        ranks = {rank: getattr(failure, _NODE, None) for rank, failure in failed.items()}
        if any(isinstance(failure, (OSError, Unreadable)) for failure in failed.values()):
            ranks = {}  # storage failed, whoever else then failed too
        return GroupFailed(_told(failed, died) or last_line(error), started=True, ranks=ranks)


def _release_places() -> None:
    """Give back the places that this driver's groups held, after one has failed.

    Ray Train's controller does, unless it was killed: Ray keeps the placement group of an actor
    that died as long as its job lives, and the next group would wait for room that nobody uses.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if not ray.is_initialized():
        return
    try:
        job = ray.get_runtime_context().get_job_id()
        for raw in state._connect_and_get_accessor().get_placement_group_table():
            held = PlacementGroupTableData.FromString(raw)
            if held.creator_job_id.hex() == job and held.state != PlacementGroupTableData.REMOVED:
                group_id = ray.PlacementGroupID(held.placement_group_id)
                remove_placement_group(PlacementGroup(group_id))
    except Exception as error:  # then the next group has to wait, and says so
        log.warning("the failed group's places were not given back: %s", error)


def _bare(failure: BaseException) -> BaseException:
    """A worker's failure without Ray Train's wrapping."""
    for wrapped in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, wrapped, failure)
    return failure


def _is_death(failure: BaseException) -> bool:
    """Whether a worker's process ended, rather than what it ran."""
    from ray.exceptions import RayActorError

    return isinstance(failure, RayActorError) and not hasattr(failure, _NODE)


def _told(failed: Mapping[int, BaseException], died: Collection[int]) -> str:
    """What happened to which ranks."""
    ranks = ", ".join(map(str, failed))
    if died:
        return f"the process of rank {ranks} died"
    return f"rank {ranks}: {last_line(next(iter(failed.values())))}" if failed else ""


def _fit(job: Job, world_size: int, without: Collection[str], readers: dict[str, str]) -> Any:
    """Run `train_worker` on every worker of a new group, to its end.

    See https://docs.ray.io/en/latest/train/api/doc/ray.train.torch.TorchTrainer.html.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    config: Config = job.config
    gpus = config.cluster.gpus_per_worker

    class Trainer(TorchTrainer):  # type: ignore[misc,unused-ignore]
        """A TorchTrainer whose groups ask for no nodes (autoscaler.py), nor are cleaned up by a
        process beside them.

        That one asks a dashboard whether the controller lives. A Ray without one lets it ask any
        other cluster's on the machine, which knows of no such controller, and it then takes the
        workers' placement group away (seen with Ray 2.60). See `_release_places`.
        """

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if "PlacementGroupCleaner" not in type(c).__name__]

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            leave_to_the_run(options)
            return super()._initialize_and_run_controller(**options)

    trainer = Trainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=world_size,
            use_gpu=gpus > 0,
            resources_per_worker=worker_resources(config),
            label_selector=away_from(without) or None,
        ),
        run_config=ray.train.RunConfig(
            # Ray Train would take a known name for a run of its own to restore.
            name=f"group-{uuid.uuid4().hex[:8]}",
            **_ray_storage(Storage(job.run_url)),
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
        torch_config=_torch_config("nccl" if gpus else "gloo"),
        datasets=datasets(job),
        dataset_config=phase_data(job.run_url, config.cluster.cpus_per_worker, readers),
    )
    return trainer.fit().return_value


def _torch_config(backend: str) -> Any:
    """How Ray Train connects the workers, over Ray's own network."""
    from ray.train.torch import TorchConfig

    class OnRaysNetwork(TorchConfig().backend_cls):  # type: ignore[misc,unused-ignore]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(talk_where_ray_does)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc,unused-ignore]
        @property
        def backend_cls(self) -> Any:
            return OnRaysNetwork

    return Config(backend=backend, timeout_s=int(COLLECTIVE_S))


def _ray_storage(run: Storage) -> dict[str, Any]:
    """Where Ray Train keeps its own state: beside the run's, opened as the shards are."""
    if run.is_local:
        return {"storage_path": run.at("ray")}
    filesystem, path = locate(run.location("ray"))
    return {"storage_path": path, "storage_filesystem": filesystem}


def train_worker(loop_config: dict[str, Any]) -> Ended:
    """What each Ray Train worker runs: `worker.train`, fed by Ray Data."""
    import ray
    import ray.train
    import ray.train.torch

    import tst_ray.memory  # noqa: F401  its addresses are known from then on
    from tst_ray.worker import train

    job: Job = loop_config["job"]
    context = ray.train.get_context()
    node = ray.get_runtime_context().get_node_id()
    try:
        place = Place(
            context.get_world_rank(),
            context.get_world_size(),
            str(ray.train.torch.get_device()),
            node,
            # What Ray has torch take where it is imported late. Said, so that a process which
            # imported it early computes the same to the last bit.
            threads=max(int(job.config.cluster.cpus_per_worker), 1),
        )
        _check_seen(Storage(job.run_url))
        return train(job, place, Reading(job, place).batches)
    except Exception as error:  # a GPU that is broken fails before anybody was told who is where
        setattr(error, _NODE, node)
        raise


def _check_seen(run: Storage) -> None:
    """Fail on a node that does not see the run; one that came later may lack the mount.

    It would take every checkpoint for damaged, and save its own share where no other finds it.
    """
    import ray.util

    if not patiently(lambda: run.exists(STATE)):
        address = ray.util.get_node_ip_address()
        # No OSError: this is the node's fault, and storage's none.
        raise RuntimeError(
            f"node {address} does not see {run.url}; run.storage is not mounted there"
        )
