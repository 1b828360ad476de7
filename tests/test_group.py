"""How a worker reads the datasets of a stage, one after the other; without Ray's processes."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from pipelines.errors import DataError, Unreadable
from pipelines.ingest import BatchMismatch, Columns, Feed
from tests.chaos import wait_until
from tests.tiny import make_config, make_corpus, make_job
from tst_ray.errors import RunError
from tst_ray.group import Group, GroupFailed, _release_places, train_worker
from tst_ray.job import Place
from tst_ray.reading import Reading
from tst_ray.storage import Storage

PATIENCE_S = 60.0


class Shards:
    """Stands in for Ray Train's datasets, of one block each; each opening is noted."""

    def __init__(self, lengths: dict[str, int], height: int) -> None:
        self.height = height
        self.lengths, self.opened = lengths, dict.fromkeys(lengths, 0)
        self.event = {name: threading.Event() for name in lengths}

    def get(self, name: str) -> Any:
        self.opened[name] += 1
        self.event[name].set()
        shards, length = self, self.lengths[name]

        class Shard:
            def iter_batches(self, **options: Any) -> Iterator[Columns]:
                if shards.lengths[name] < 0:
                    raise OSError("no such place")
                number = np.repeat(np.arange(length), shards.height)
                yield {"slot": number, "name": np.full(len(number), name)}

        return Shard()

    def named(self, batch: Columns) -> tuple[str, int]:
        """The dataset that a batch is of, and its number there."""
        ((name, number),) = {*zip(batch["name"].tolist(), batch["slot"].tolist(), strict=True)}
        assert len(batch["slot"]) == self.height
        return name, number


@pytest.fixture
def reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Reading, Shards, Any]]:
    """Four steps in bags, then four of tokens, in parts of two steps."""
    manifest = make_corpus(tmp_path / "text")
    job = make_job(make_config(tmp_path, manifest, **{"train.steps": 8}), manifest)
    bags, tokens = job.plan.phases

    def parts(feed: Feed, most_workers: int) -> list[tuple[int, int]]:
        first = feed.order.layouts[feed.phase].first_step
        return [(step, step + 2) for step in range(first, feed.last_step, 2)]

    monkeypatch.setattr(Feed, "parts", parts)
    monkeypatch.setattr(Feed, "steps_ahead", lambda feed, world_size: 1)
    shards = Shards(
        {
            f"phase-{phase.index}-from-{step}": 2
            for phase in (bags, tokens)
            for step in range(phase.first_step, phase.last_step, 2)
        },
        job.feeds[0].rows_per_rank(1),
    )
    monkeypatch.setattr("ray.train.get_dataset_shard", shards.get)
    yield Reading(job, Place()), shards, job.plan


def test_all_parts_come_in_order_and_each_is_opened_once(
    reading: tuple[Reading, Shards, Any],
) -> None:
    reader, shards, plan = reading
    came = [
        shards.named(batch)
        for phase in plan.phases
        for batch in reader.batches(phase, phase.first_step)
    ]
    assert came == [(name, number) for name in shards.lengths for number in range(2)]
    assert set(shards.opened.values()) == {1}


def test_the_next_part_is_opened_while_this_one_is_read(
    reading: tuple[Reading, Shards, Any],
) -> None:
    """Also where it belongs to the next phase."""
    reader, shards, plan = reading
    names = list(shards.lengths)
    for phase in plan.phases:
        for step, batch in enumerate(reader.batches(phase, phase.first_step)):
            name, number = shards.named(batch)
            following = names[names.index(name) + 1 :][:1]
            for other in following:
                if number == 1:
                    assert shards.event[other].wait(PATIENCE_S), f"after step {step}"
                else:
                    assert not shards.opened[other], f"{other} is opened too early"


def test_a_part_that_cannot_be_opened_says_so_when_it_is_needed(
    reading: tuple[Reading, Shards, Any],
) -> None:
    reader, shards, plan = reading
    first = plan.phases[0]
    broken = list(shards.lengths)[1]
    shards.lengths[broken] = -1
    batches = reader.batches(first, first.first_step)
    assert [next(batches), next(batches)]
    with pytest.raises(OSError, match="no such place"):
        next(batches)


def test_a_resumed_worker_starts_with_the_part_it_is_in(
    reading: tuple[Reading, Shards, Any],
) -> None:
    reader, shards, plan = reading
    tokens = plan.phases[1]
    next(reader.batches(tokens, tokens.first_step + 2))
    assert [name for name, count in shards.opened.items() if count] == [list(shards.lengths)[-1]]


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (DataError("shard 3 was altered"), RunError),
        (BatchMismatch("the plan says otherwise"), RunError),
        (RunError("no checkpoint is intact"), RunError),
        (Unreadable("shard 3 cannot be read (503)"), GroupFailed),
        (OSError("503"), GroupFailed),
    ],
)
def test_what_another_attempt_may_not_meet_does_not_end_the_run(
    tmp_path: Path, failure: Exception, said: type[Exception]
) -> None:
    from ray.train import TrainingFailedError

    group = Group.__new__(Group)
    group._run_url = str(tmp_path)
    error = TrainingFailedError("a worker failed")
    error.worker_failures = {1: failure}
    group._error = error
    with pytest.raises(said, match=str(failure).partition("(")[0]):
        group.outcome()


@pytest.mark.parametrize("no_room", [True, False])
def test_a_group_that_did_not_start_says_whether_there_was_room(
    tmp_path: Path, no_room: bool
) -> None:
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    cause = WorkerGroupStartupTimeoutError(2) if no_room else RuntimeError("a node was lost")
    group = Group.__new__(Group)
    group._run_url = str(tmp_path)
    group._error = ControllerError(cause)
    with pytest.raises(GroupFailed) as caught:
        group.outcome()
    assert (caught.value.started, caught.value.no_room) == (False, no_room)


class Wrapped(Exception):
    """As Ray Train wraps what a worker raised."""

    def __init__(self, error: Exception) -> None:
        self._base_exc = error


def test_a_failure_names_the_ranks_and_what_their_node_may_have_done(tmp_path: Path) -> None:
    """Those that died, if any did; never those that storage failed."""
    from ray.exceptions import ActorDiedError
    from ray.train import TrainingFailedError

    def ranks(**failures: Exception) -> dict[int, str | None]:
        group = Group.__new__(Group)
        group._run_url = str(tmp_path)
        error = TrainingFailedError("a worker failed")
        error.worker_failures = {int(name[1:]): failure for name, failure in failures.items()}
        group._error = error
        with pytest.raises(GroupFailed) as caught:
            group.outcome()
        return caught.value.ranks

    assert ranks(r0=Wrapped(RuntimeError("connection closed")), r1=ActorDiedError()) == {1: None}
    broken = RuntimeError("an uncorrectable ECC error")
    assert ranks(r2=Wrapped(broken)) == {2: None}
    broken.tst_ray_node = "node b"
    assert ranks(r2=Wrapped(pickle.loads(pickle.dumps(broken)))) == {2: "node b"}
    assert ranks(r0=Wrapped(OSError("503")), r1=Wrapped(Unreadable("503"))) == {}
    followed = Wrapped(RuntimeError("connection closed"))
    assert ranks(r0=Wrapped(OSError("503")), r1=followed) == {}
    other_died = ActorDiedError()  # one of Ray Data's, say, that this worker talked to
    other_died.tst_ray_node = "node a"
    assert ranks(r0=Wrapped(other_died), r1=ActorDiedError()) == {1: None}


def test_a_worker_on_a_node_that_does_not_see_the_run_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would mark every checkpoint as damaged, for all that it can see."""

    class Here:
        def get_node_id(self) -> str:
            return "node b"

        def get_world_rank(self) -> int:
            return 0

        def get_world_size(self) -> int:
            return 1

    manifest = make_corpus(tmp_path / "text")
    job = make_job(make_config(tmp_path, manifest), manifest)
    monkeypatch.setattr("ray.train.get_context", Here)
    monkeypatch.setattr("ray.get_runtime_context", Here)
    monkeypatch.setattr("ray.train.torch.get_device", lambda: "cpu")
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setattr("tst_ray.worker.train", lambda job, place, batches: "trained")
    with pytest.raises(
        RuntimeError, match=r"node 10\.0\.0\.7 does not see .*is not mounted"
    ) as caught:
        train_worker({"job": job})
    assert caught.value.tst_ray_node == "node b"  # type: ignore[attr-defined]
    Storage(job.run_url).write("run.json", "{}")
    assert train_worker({"job": job}) == "trained"


def test_what_a_worker_raises_says_on_which_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it has told anybody: a broken GPU fails first."""

    class Here:
        def get_node_id(self) -> str:
            return "node b"

        def get_world_rank(self) -> int:
            raise RuntimeError("CUDA error: no device")

    monkeypatch.setattr("ray.train.get_context", Here)
    monkeypatch.setattr("ray.get_runtime_context", Here)
    with pytest.raises(RuntimeError) as caught:
        train_worker({"job": None})
    assert caught.value.tst_ray_node == "node b"  # type: ignore[attr-defined]


def test_a_failed_group_gives_its_places_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr("tst_ray.group._release_places", lambda: given_back.append(True))
    group = Group.__new__(Group)
    for error, times in ((None, 0), (RuntimeError("the controller died"), 1)):
        group._start = Mock(side_effect=error)
        group._fit()
        assert len(given_back) == times


@pytest.mark.slow
def test_the_places_of_a_controller_that_was_killed_are_given_back() -> None:
    """Ray keeps them for its job; the next group would wait for room that nobody uses."""
    import ray
    from ray.util import placement_group

    class Controller:
        def start(self) -> int:
            self.held = placement_group([{"CPU": 2.0}])
            assert self.held.wait(PATIENCE_S)
            return os.getpid()

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        controller = ray.remote(num_cpus=0)(Controller).remote()
        os.kill(ray.get(controller.start.remote()), signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(controller.start.remote(), timeout=PATIENCE_S)
        assert "CPU" not in ray.available_resources()
        _release_places()
        wait_until(lambda: ray.available_resources().get("CPU") == 2.0, "all CPUs")
    finally:
        ray.shutdown()
