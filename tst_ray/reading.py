"""How the workers of a group get their batches: Ray datasets, one after the other.

Reading (each worker) ── get_dataset_shard ──> PhaseData (in an actor of Ray Train's)
                                                 ▼
                                               ingest.ray_dataset, for a part of a phase
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from typing import Any

from pipelines.ingest import Feed, local_batches
from tst_ray.job import Job, Place
from tst_ray.journal import read_state
from tst_ray.nodes import cpus_within
from tst_ray.plan import Phase
from tst_ray.storage import Storage


class Reading:
    """A worker's batches through Ray Data: the datasets of a stage, one after the other.

    A dataset takes a second or two to start. So each is opened, in a thread, while the last batches
    of the one before are trained on; the pause between two of them is then that of a step.

    Args:
        job, place: the worker's.
    """

    def __init__(self, job: Job, place: Place) -> None:
        self._world_size = place.world_size
        self._parts = [part for part in _parts(job) if part.first < job.last_step]
        self._next = dict(pairwise(self._parts))
        self._opened: dict[_Part, Future[Iterator[Any]]] = {}

    def batches(self, phase: Phase, step: int) -> Iterator[Any]:
        """Local batches, one a step, from after `step` finished ones to the end of the phase."""
        for part in self._parts:
            if part.feed.phase != phase.index or part.last <= step:
                continue
            opened = self._opened.pop(part, None)
            batches = opened.result() if opened else self._open(part)
            ahead_at = part.last - part.feed.steps_ahead(self._world_size)
            for batch in batches:
                if step >= ahead_at:
                    self._open_ahead(part)
                yield batch
                step += 1

    def _open_ahead(self, part: _Part) -> None:
        following = self._next.get(part)
        if following is None or following in self._opened:
            return
        opened = self._opened[following] = Future()

        def open_it() -> None:
            try:
                opened.set_result(self._open(following))
            except BaseException as error:
                opened.set_exception(error)

        # No executor: its threads would be waited for where a worker is told to end.
        threading.Thread(target=open_it, name="next-dataset", daemon=True).start()

    def _open(self, part: _Part) -> Iterator[Any]:
        """The batches of a dataset; its first one is here when this returns."""
        import ray.train

        shard = ray.train.get_dataset_shard(_dataset_name(part.feed, part.first))
        batches = local_batches(shard, part.feed, self._world_size)
        return chain(list(islice(batches, 1)), batches)


@dataclass(frozen=True)
class _Part:
    """The steps [first, last) of a phase, read as one Ray dataset."""

    feed: Feed
    first: int
    last: int


def _dataset_name(feed: Feed, first: int) -> str:
    return f"phase-{feed.phase}-from-{first}"


def _parts(job: Job) -> list[_Part]:
    """All datasets of a run, in order."""
    return [
        _Part(feed, first, last)
        for feed, phase in zip(job.feeds, job.plan.phases, strict=True)
        for first, last in feed.parts(phase.max_workers)
    ]


def datasets(job: Job) -> dict[str, Callable[[], Any]]:
    """What Ray Train calls at each group start; `phase_data` makes datasets of what it gets."""
    return {_dataset_name(part.feed, part.first): partial(_itself, part) for part in _parts(job)}


def _itself(part: _Part) -> Any:
    return part


def phase_data(run_url: str, cpus_per_worker: float, where: Mapping[str, str]) -> Any:
    """What makes a group's datasets, for Ray Train.

    Args:
        run_url: the run directory.
        cpus_per_worker: CPUs that are not for reading.
        where: the label selector of the nodes that may read; empty for any.
    """
    import ray
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
            step = int(read_state(Storage(run_url))["step"])
            # As many at once as there are CPUs for it, and not more than a group has use for: none
            # of them holds a CPU that would limit how many a node runs.
            cpus = cpus_within(where) - world_size * cpus_per_worker
            readers = max(min(int(cpus), 4 * world_size), 1)
            output: list[dict[str, Any]] = [{} for _ in range(world_size)]
            for name, part in datasets.items():
                first = max(step, part.first)
                dataset = ray_dataset(part.feed, first, part.last, world_size, readers, where)
                dataset.set_name(name)
                dataset.context.execution_options.preserve_order = True
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
