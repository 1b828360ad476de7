"""Ingest: what a worker receives, in process and through Ray Data, against what order says."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from pipelines import ingest
from pipelines.bagging import BaggingPreprocessor
from pipelines.bags import fold_bags
from pipelines.errors import DataError
from pipelines.ingest import (
    _BLOCK_BYTES,
    FILLER,
    BatchMismatch,
    Columns,
    Feed,
    check_batch,
    local_batches,
    ray_dataset,
    read_inline,
)
from pipelines.manifest import Manifest
from pipelines.order import Order, PhaseLayout, StreamSource
from tests.corpora import position_tokens, write_corpus

STEPS, SEQUENCES, BAG = 9, 5, 4
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_corpus(tmp_path_factory.mktemp("corpus"), 2_000, 1_500)


def make_feed(manifest: Manifest, phase: int = 0, seed: int = 0) -> Feed:
    """Two phases over a 2:1 mixture: bags of 4 over 8 latent positions, then plain."""
    layouts = (
        PhaseLayout(0, STEPS, SEQUENCES, 32, BAG),
        PhaseLayout(STEPS, STEPS, SEQUENCES, 8, 1),
    )
    sources = tuple(
        StreamSource(source.name, source.train.tokens, weight)
        for source, weight in zip(manifest.sources, (2.0, 1.0), strict=True)
    )
    order = Order(sources, layouts, block_tokens=64, shuffle_tokens=256, seed=seed)
    path = f"{manifest.folder}/manifest.json"
    bag = BAG if phase == 0 else 1
    return Feed(manifest.folder, path, manifest.fingerprint, order, phase, bag, manifest.dtype)


def expected_tokens(feed: Feed, step: int) -> list[list[int]]:
    """The step's sequences straight from the sources, without shards."""
    layout, spans = feed.order.layouts[feed.phase], feed.order.spans(step)
    rows: list[list[int]] = [[] for _ in range(len(spans))]
    pieces = feed.order.linear(spans, layout.data_length + layout.lookahead)
    for span, at, start, stop in zip(*pieces, strict=True):
        assert at == len(rows[span])
        source = int(spans.source[span])
        text = position_tokens(source, feed.order.sources[source].num_tokens)
        rows[span] += text[start:stop].tolist()
    return rows


def real_rows(batch: dict[str, Any]) -> list[list[int]]:
    rows = batch["tokens"][batch["slot"] != FILLER]
    return [row.ravel().tolist() for row in rows]


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_workers_together_read_what_order_says(
    manifest: Manifest, phase: int, world_size: int
) -> None:
    feed = make_feed(manifest, phase)
    first = phase * STEPS
    workers = [read_inline(feed, first, rank, world_size) for rank in range(world_size)]
    for step, batches in enumerate(zip(*workers, strict=True), start=first):
        assert len({len(batch["slot"]) for batch in batches}) == 1
        for rank, batch in enumerate(batches):
            check_batch(batch, feed, step, rank, world_size)
        rows = [row for batch in batches for row in real_rows(batch)]
        assert rows == expected_tokens(feed, step)
    assert step == first + STEPS - 1


@pytest.mark.parametrize("start", range(STEPS))
def test_a_reader_started_anywhere_gives_the_same_tail(manifest: Manifest, start: int) -> None:
    feed = make_feed(manifest)
    whole = [batch["tokens"] for batch in read_inline(feed, 0)]
    tail = [batch["tokens"] for batch in read_inline(feed, start)]
    assert np.array_equal(np.stack(whole[start:]), np.stack(tail))


def test_bags_are_a_view_of_the_sequence() -> None:
    tokens = np.arange(24).reshape(2, 12)
    bags = fold_bags(tokens, 4)
    assert bags.shape == (2, 3, 4)
    assert bags[1, 2].tolist() == [20, 21, 22, 23]
    assert np.shares_memory(bags, tokens)
    with pytest.raises(ValueError, match="12 tokens do not fold into bags of 5"):
        fold_bags(tokens, 5)


def test_the_bag_after_each_input_is_its_target(manifest: Manifest) -> None:
    feed = make_feed(manifest)
    batch = next(read_inline(feed, 0))
    assert batch["tokens"].shape == (SEQUENCES, 9, BAG)
    flat = np.asarray(expected_tokens(feed, 0))
    assert batch["tokens"][:, 1:].reshape(SEQUENCES, -1).tolist() == flat[:, BAG:].tolist()


@pytest.mark.parametrize("column", ["step", "slot", "source", "epoch", "offset"])
def test_a_batch_with_one_id_changed_is_refused(manifest: Manifest, column: str) -> None:
    feed = make_feed(manifest)
    batch = next(read_inline(feed, 3))
    batch[column] = batch[column].copy()
    batch[column][2] += 1
    with pytest.raises(BatchMismatch, match=r"rank 0 of 1 at step 4 received .* plan says"):
        check_batch(batch, feed, 3, 0, 1)


def test_a_short_batch_and_another_ranks_batch_are_refused(manifest: Manifest) -> None:
    feed = make_feed(manifest)
    batch = next(read_inline(feed, 0, rank=1, world_size=2))
    with pytest.raises(BatchMismatch):
        check_batch(batch, feed, 0, 0, 2)
    with pytest.raises(BatchMismatch, match="2 rows"):
        check_batch({name: column[:2] for name, column in batch.items()}, feed, 0, 1, 2)


def test_shards_of_another_corpus_are_refused(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, 2_000, 1_500)
    feed = make_feed(manifest)
    write_corpus(tmp_path, 1_900, 1_500)
    with pytest.raises(DataError, match="not those this run was planned on"):
        next(read_inline(feed, 0))


def test_a_feed_is_small_however_large_the_corpus() -> None:
    order = Order((StreamSource("web", 10**13, 1.0),), (PhaseLayout(0, 10**6, 16_384, 65_536, 16),),
                  1 << 20, 1 << 28, 0)  # fmt: skip
    feed = Feed("/shards", "/run/manifest.json", "0" * 64, order, 0, 16, "uint16")
    assert len(pickle.dumps(feed)) < 1_000


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def in_threads(readers: list[Callable[[], Iterator[Columns]]]) -> list[list[Columns]]:
    """All batches of each reader; ranks read at the same time, as Ray Data expects of them."""
    came: list[list[Columns]] = [[] for _ in readers]
    threads = [
        threading.Thread(target=lambda i=i: came[i].extend(readers[i]()), daemon=True)
        for i in range(len(readers))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    return came


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "start", "phase"), [(1, 0, 0), (2, 4, 0), (3, 11, 1)])
def test_ray_data_deals_each_rank_its_batches(
    ray_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    manifest: Manifest,
    world_size: int,
    start: int,
    phase: int,
) -> None:
    """Chunks of 2 steps, so that several blocks go to each rank; ranks read out of step.

    Blocks are larger than what Ray Data cuts blocks into by itself.
    """
    import ray.data

    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 64)
    feed = make_feed(manifest, phase)
    feed_small = ChunksOfTwo(**{name: getattr(feed, name) for name in feed.__dataclass_fields__})
    dataset = ray_dataset(feed_small, start, feed.last_step, world_size)
    options = dataset.context.execution_options
    options.preserve_order = True
    splits = dataset.streaming_split(world_size, equal=True)
    came = in_threads([partial(local_batches, split, feed_small, world_size) for split in splits])
    for rank in range(world_size):
        expected = list(read_inline(feed, start, rank, world_size))
        assert len(came[rank]) == len(expected)
        for step, (got, want) in enumerate(zip(came[rank], expected, strict=True), start=start):
            check_batch(got, feed, step, rank, world_size)
            assert np.array_equal(got["tokens"], want["tokens"])


class ChunksOfTwo(Feed):
    def _chunk_steps(self, world_size: int) -> int:
        return 2


def test_a_long_phase_is_read_in_parts_of_few_tasks() -> None:
    """10B on 512 workers: months of steps, and never more than a few thousand tasks at once."""
    layout = PhaseLayout(12_483, 37_500, 2_048, 4_096, 1)
    layouts = (PhaseLayout(0, 12_483, 2_048, 65_536, 16), layout)
    order = Order((StreamSource("web", 10**13, 1.0),), layouts, 1 << 20, 1 << 28, 0)
    for phase in (0, 1):
        feed = Feed("/shards", "/run/manifest.json", "0" * 64, order, phase, 16, "uint32")
        parts = feed.parts(512)
        first = order.layouts[phase].first_step
        assert parts[0][0] == first
        assert parts[-1][1] == feed.last_step
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        for workers in (1, 8, 512):
            tasks = [len(feed.chunks(*part, workers)) * workers for part in parts]
            assert max(tasks) <= 8_192
        assert len(parts) < 2_000


def test_a_block_is_as_large_as_its_tokens_take() -> None:
    """A vocabulary that fits into 16 bits gets twice the steps into a block."""
    order = Order((StreamSource("web", 10**13, 1.0),), (PhaseLayout(0, 10_000, 16, 32_768, 16),),
                  1 << 20, 1 << 28, 0)  # fmt: skip
    steps = {}
    for dtype in ("uint16", "uint32"):
        feed = Feed("/shards", "/run/manifest.json", "0" * 64, order, 0, 16, dtype)
        (first, last), *_ = feed.chunks(0, 10_000, 1)
        steps[dtype] = last - first
        one_more = (last - first + 1) * feed.rows_per_rank(1) * feed.row_bytes
        assert one_more > _BLOCK_BYTES >= one_more - feed.rows_per_rank(1) * feed.row_bytes
    assert steps["uint16"] == pytest.approx(2 * steps["uint32"], abs=1)


@pytest.mark.parametrize("num_sources", [1, 30])
def test_readers_of_a_process_hold_no_more_together_for_many_sources(
    tmp_path: Path, num_sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a process's 1,024 files, and of its memory, not all are for reading."""
    row_bytes = 64 * 2
    monkeypatch.setattr(ingest, "_CACHE_BYTES", 20 * row_bytes)
    monkeypatch.setattr(ingest, "_OPEN_SHARDS", 8)
    manifest = write_corpus(tmp_path, *[640] * num_sources, validation=1)
    where = (manifest.folder, f"{manifest.folder}/manifest.json", manifest.fingerprint)
    readers = [ingest._reader(*where, source, 1 << 24) for source in range(num_sources)]
    for _ in range(2):
        for source, reader in enumerate(readers):
            np.testing.assert_array_equal(reader.read(0, 640), position_tokens(source, 640))
    (held,) = {id(reader.held): reader.held for reader in readers}.values()
    assert sum(row.nbytes for row in held.rows.values()) == min(10 * num_sources, 20) * row_bytes
    assert len(held.files) == min(num_sources, 8)


def test_readers_hold_a_window_of_each_source(manifest: Manifest) -> None:
    window, path = 1 << 20, f"{manifest.folder}/manifest.json"
    held = ingest._held(manifest.folder, path, manifest.fingerprint, window)
    num_sources = len(manifest.sources)
    assert 2 * window * 2 * num_sources < held.rows_bytes < 100 << 20  # uint16
    large = ingest._held(manifest.folder, path, manifest.fingerprint, 1 << 28)
    assert (large.rows_bytes, large.num_files) == (2 << 30, 256)


def test_bagging_is_a_ray_data_preprocessor() -> None:
    from ray.data.preprocessor import Preprocessor

    bagging = BaggingPreprocessor(4)
    assert isinstance(bagging, Preprocessor)
    folded = bagging.transform_batch({"tokens": np.arange(24).reshape(2, 12)})
    assert folded["tokens"].shape == (2, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [0, 1])
def test_reading_waits_for_no_cpu_and_keeps_to_its_nodes(
    ray_cluster: None,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: int,
) -> None:
    """Others may have taken all that a group does not hold; that must not look like a hang."""
    import ray
    from ray.util import placement_group, remove_placement_group

    from tst_ray.nodes import only_on
    from tst_ray.reading import _Part, phase_data

    made: list[Any] = []
    make = ingest.ray_dataset
    monkeypatch.setattr(ingest, "ray_dataset", lambda *args: made.append(make(*args)) or made[-1])
    feed, there = make_feed(manifest, phase), int(ray.cluster_resources()["CPU"])
    first = feed.order.layouts[phase].first_step
    (tmp_path / "run.json").write_text(json.dumps({"step": first + 1}))
    where = only_on([ray.get_runtime_context().get_node_id()])
    others = placement_group([{"CPU": 1.0}] * there)
    try:
        assert others.wait(PATIENCE_S)
        data = phase_data(str(tmp_path), 0.5, where)
        splits = data.configure({"part": _Part(feed, first, first + 4)}, 2)
        came = in_threads([partial(local_batches, split["part"], feed, 2) for split in splits])
        assert [len(batches) for batches in came] == [3, 3]
    finally:
        remove_placement_group(others)
    op = made[0]._logical_plan.dag
    assert op.compute.size == there - 1, "no more at once than there are CPUs beside the workers'"
    while op.input_dependencies:
        (op,) = op.input_dependencies
    assert op.ray_remote_args["label_selector"] == where
    assert made[0].context.target_max_block_size is None
    one_task = "ReadTokenShards" + "->BaggingPreprocessor" * (phase == 0) + ": 2 tasks"
    assert one_task in splits[0]["part"].stats()


@pytest.mark.parametrize(
    ("cpus", "world_size", "readers"), [(2.5, 2, 1), (6.0, 2, 5), (900.0, 2, 8), (0.5, 2, 1)]
)
def test_readers_are_as_many_as_have_cpus_and_a_group_has_use_for(
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cpus: float,
    world_size: int,
    readers: int,
) -> None:
    from tst_ray import reading

    asked: list[Any] = []

    def ray_dataset(*args: Any) -> Any:
        asked.append(args[4:])
        return MagicMock()

    (tmp_path / "run.json").write_text('{"step": 0}')
    where = {"ray.io/node-id": "in(a)"}
    monkeypatch.setattr(ingest, "ray_dataset", ray_dataset)
    monkeypatch.setattr(reading, "cpus_within", lambda there: cpus if there == where else 0.0)
    part = reading._Part(make_feed(manifest), 0, 2)
    reading.phase_data(str(tmp_path), 0.5, where).configure({"part": part}, world_size)
    assert asked == [(readers, where)]


def test_an_older_ray_is_told_who_may_read_in_its_own_way(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `read_datasource` would take a parameter it does not know for the source's."""
    import ray.data

    told: list[Any] = []

    def read_datasource(
        source: Any,
        *,
        override_num_blocks: int,
        num_cpus: float,
        concurrency: int,
        ray_remote_args: Any = None,
        **read_args: Any,
    ) -> Any:
        told.append((ray_remote_args, read_args))
        return SimpleNamespace(context=SimpleNamespace())

    monkeypatch.setattr(ray.data, "read_datasource", read_datasource)
    feed = make_feed(manifest, phase=1)
    ingest.ray_dataset(feed, STEPS, STEPS + 2, 1, 1, {"ray.io/node-id": "in(a)"})
    ingest.ray_dataset(feed, STEPS, STEPS + 2, 1)
    assert told == [({"label_selector": {"ray.io/node-id": "in(a)"}}, {}), ({}, {})]


@pytest.mark.slow
def test_datasets_follow_each_other_and_the_old_ones_end(
    ray_cluster: None, manifest: Manifest, tmp_path: Path
) -> None:
    """What Ray Train does part by part: configure, hand out, read; from the step in run.json."""
    import ray

    from tst_ray.reading import _Part, phase_data

    feed = make_feed(manifest)
    (tmp_path / "run.json").write_text('{"step": 1}')
    data = phase_data(str(tmp_path), 1.0, {})
    actors: list[Any] = []
    came = []
    for first, last in [(0, 2), (2, 4), (4, 6), (6, 9)]:
        (shards,) = data.configure({"part": _Part(feed, first, last)}, 1)
        actors.append(shards["part"]._coord_actor)
        came += local_batches(shards["part"], feed, 1)
    for step, batch in enumerate(came, start=1):
        check_batch(batch, feed, step, 0, 1)
    assert len(came) == STEPS - 1
    for actor in actors[:2]:
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.stats.remote(), timeout=60)
