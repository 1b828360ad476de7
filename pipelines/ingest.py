"""Ingest: token shards → each worker's batches, from any step, for any number of workers.

    order.spans(steps)         which tokens                              (order.py)
    read task (chunk, rank)    gathers that rank's rows of a few steps   Feed.rows
    BaggingPreprocessor        folds them into bags                      (bagging.py)
    streaming_split            block b goes to rank b mod world_size
    local_batches              cuts a rank's blocks into its batches, one a step
    check_batch                the worker compares what came with what the plan says

A block holds one rank's rows of one chunk of steps, so blocks are large (Ray Data pays 20–30 ms of
CPU a block) and all have the same number of rows: a rank whose share is one row short gets a filler
row. With equal blocks and `preserve_order`, `streaming_split(equal=True)` deals them round-robin.
That is how Ray behaves rather than what it promises, so every worker checks every batch
(`check_batch`): a block dealt to the wrong rank stops the run instead of changing the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.bags import fold_bags
from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.order import Order, Spans, rank_slots, rows_per_rank, span_hashes
from pipelines.permute import Int64
from pipelines.shards import Held, TokenReader

Columns = dict[str, Any]  # column name -> array whose first axis is the row

_BLOCK_BYTES = 16 << 20  # aim: large enough to hide Ray's cost a block, small enough to start fast
_MAX_CHUNK_STEPS = 128
# What a process holds of all sources together: decoded rows, the windows of some 60 sources as they
# are by default; and open files, a descriptor each, of which it may have but 1,024.
_CACHE_BYTES, _OPEN_SHARDS = 2 << 30, 256
# Ray Data makes all read tasks of a dataset before it starts, some 2 ms each: a dataset has about
# so many, but always a few blocks for each worker.
_TASKS, _LEAST_CHUNKS = 256, 8
_PLANNED_STEPS = 32
_LEAST_AHEAD = 8
_ID_COLUMNS = ("step", "slot", "source", "epoch", "offset")
FILLER = -1  # the slot of a row that only evens out the ranks


@dataclass(frozen=True)
class Feed:
    """Everything a reader anywhere needs to produce a phase's batches; small and picklable.

    Args:
        folder: the prepared shards.
        manifest: their manifest.json, or the run's copy of it.
        fingerprint: the manifest's, so that another corpus at the same place is noticed.
        order: the run's order, all phases.
        phase: which phase this feed is for.
        bag_size: how many tokens an input bag holds; 1 leaves the tokens unfolded.
        dtype: of the shards' tokens.
    """

    folder: str
    manifest: str
    fingerprint: str
    order: Order
    phase: int
    bag_size: int
    dtype: str

    @property
    def last_step(self) -> int:
        """The step at which the phase ends."""
        layout = self.order.layouts[self.phase]
        return layout.first_step + layout.steps

    @property
    def salt(self) -> str:
        """Tells apart digests of equal spans in another corpus or another order."""
        return f"{self.fingerprint}/{self.order.seed}/{self.order.block_tokens}"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a block: its tokens and its ids."""
        layout = self.order.layouts[self.phase]
        tokens = (layout.data_length + layout.lookahead) * np.dtype(self.dtype).itemsize
        return tokens + 8 * len(_ID_COLUMNS)

    def rows_per_rank(self, world_size: int) -> int:
        """Rows of a local batch, filler rows included; the same on every rank."""
        return rows_per_rank(self.order.layouts[self.phase].num_sequences, world_size)

    def rows_per_block(self, world_size: int) -> int:
        """Rows of a block; the last one of a dataset may have fewer."""
        return self._chunk_steps(world_size) * self.rows_per_rank(world_size)

    def parts(self, most_workers: int) -> list[tuple[int, int]]:
        """[first, last) steps of the datasets that a phase is read as, one after the other.

        A dataset's read tasks are all made before it starts, so one for a phase of months would
        take hours to begin. The bounds depend on the plan alone.
        """
        steps = max(_TASKS // most_workers, _LEAST_CHUNKS) * self._chunk_steps(most_workers)
        first = self.order.layouts[self.phase].first_step
        return list(pairwise([*range(first, self.last_step, steps), self.last_step]))

    def steps_ahead(self, world_size: int) -> int:
        """How many steps before the end of a part the next one may be opened: those of a block."""
        return max(self._chunk_steps(world_size), _LEAST_AHEAD)

    def chunks(self, start_step: int, last_step: int, world_size: int) -> list[tuple[int, int]]:
        """[first, last) steps of each block of a dataset."""
        steps = self._chunk_steps(world_size)
        return list(pairwise([*range(start_step, last_step, steps), last_step]))

    def _chunk_steps(self, world_size: int) -> int:
        steps = _BLOCK_BYTES // (self.rows_per_rank(world_size) * self.row_bytes)
        return min(max(steps, 1), _MAX_CHUNK_STEPS)

    def rows(self, first_step: int, last_step: int, rank: int, world_size: int) -> Columns:
        """One rank's rows of steps [first_step, last_step), unfolded.

        Returns:
            id columns `step`, `slot`, `source`, `epoch`, `offset`, each int64 [n], and `tokens`
            [n, data_length + lookahead]; n = steps · rows_per_rank. A filler row has slot −1.
        """
        ids, mine = self.ids(first_step, last_step, rank, world_size)
        flat = ids.reshape(-1, len(_ID_COLUMNS))
        columns: Columns = {name: flat[:, i].copy() for i, name in enumerate(_ID_COLUMNS)}
        layout = self.order.layouts[self.phase]
        tokens = np.zeros((len(flat), layout.data_length + layout.lookahead), np.dtype(self.dtype))
        self._gather(mine, np.flatnonzero(columns["slot"] != FILLER), tokens)
        return {**columns, "tokens": tokens}

    def ids(
        self, first_step: int, last_step: int, rank: int, world_size: int
    ) -> tuple[np.ndarray[Any, Any], Spans]:
        """What identifies one rank's rows of steps [first_step, last_step).

        Returns:
            the id columns, int64 [steps, rows_per_rank, 5], in each step real rows first and
            fillers last; and the spans of the real rows, in that order.
        """
        steps = np.arange(first_step, last_step)
        slots = rank_slots(self.order.layouts[self.phase].num_sequences, world_size, rank)
        real = slots.stop - slots.start
        spans = self.order.spans(first_step, last_step, slots)
        ids = np.zeros((len(steps), self.rows_per_rank(world_size), len(_ID_COLUMNS)), np.int64)
        ids[..., 0], ids[..., 1] = steps[:, np.newaxis], FILLER
        ids[:, :real, 1] = np.arange(slots.start, slots.stop)
        for column, values in enumerate((spans.source, spans.epoch, spans.offset), start=2):
            ids[:, :real, column] = values.reshape(len(steps), real)
        return ids, spans

    def _gather(self, spans: Spans, rows: Any, out: np.ndarray[Any, Any]) -> None:
        """Fill out[rows[i]] with the stream tokens from the start of span i."""
        sources = spans.source.tolist()
        pieces = self.order.linear(spans, out.shape[1])
        for span, at, start, stop in zip(*(array.tolist() for array in pieces), strict=True):
            where = (self.folder, self.manifest, self.fingerprint)
            reader = _reader(*where, sources[span], self.order.shuffle_tokens)
            out[rows[span], at : at + stop - start] = reader.read(start, stop)


class BatchMismatch(DataError):
    """A worker received another batch than the plan says."""


def check_batch(batch: Columns, feed: Feed, step: int, rank: int, world_size: int) -> Int64:
    """Compare a received local batch with the plan, row by row.

    Returns:
        what it adds to the step's `data_digest`: the sum of its `span_hashes`, [8].

    Raises:
        BatchMismatch: with the id that came and the id the plan says.
    """
    want, lanes = _planned(feed, step, rank, world_size)
    came = np.stack([batch[name] for name in _ID_COLUMNS], axis=1)
    if came.shape != want.shape or not np.array_equal(came, want):
        raise BatchMismatch(
            f"rank {rank} of {world_size} at step {step + 1} received {_describe(came)}, but the "
            f"plan says {_describe(want)}; nothing was trained on it"
        )
    return lanes


def _planned(feed: Feed, step: int, rank: int, world_size: int) -> tuple[Int64, Int64]:
    """Ids and summed hashes of a local batch; worked out for many steps, which costs as much.

    Raises:
        IndexError: the step is not of the feed's phase.
    """
    layout = feed.order.layouts[feed.phase]
    if not layout.first_step <= step < feed.last_step:
        raise IndexError(f"step {step} is not of phase {feed.phase + 1}")
    first = step - (step - layout.first_step) % _PLANNED_STEPS
    last = min(first + _PLANNED_STEPS, feed.last_step)
    ids, lanes = _planned_ahead(feed, first, last, rank, world_size)
    return ids[step - first], lanes[step - first]


@lru_cache(maxsize=2)
def _planned_ahead(
    feed: Feed, first: int, last: int, rank: int, world_size: int
) -> tuple[Int64, Int64]:
    ids, spans = feed.ids(first, last, rank, world_size)
    hashes = span_hashes(spans, feed.salt)
    num_steps = last - first
    lanes = hashes.reshape(num_steps, len(spans) // num_steps, hashes.shape[1]).sum(axis=1)
    for array in (ids, lanes):
        array.setflags(write=False)  # it is handed out again
    return ids, lanes


def _describe(ids: np.ndarray[Any, Any]) -> str:
    """The first and last row of a batch, as one readable id."""
    if not len(ids):
        return "no rows"
    rows = [
        "/".join(f"{name} {value}" for name, value in zip(_ID_COLUMNS, row, strict=True))
        for row in (ids[0].tolist(), ids[-1].tolist())
    ]
    return f"[{len(ids)} rows: {rows[0]} … {rows[1]}]"


def read_inline(
    feed: Feed, start_step: int, rank: int = 0, world_size: int = 1
) -> Iterator[Columns]:
    """The same batches as through Ray, made in this process: one local batch a step."""
    for step in range(start_step, feed.last_step):
        batch = feed.rows(step, step + 1, rank, world_size)
        if feed.bag_size > 1:
            batch["tokens"] = fold_bags(batch["tokens"], feed.bag_size)
        yield batch


def ray_dataset(
    feed: Feed,
    start_step: int,
    last_step: int,
    world_size: int,
    readers: int = 1,
    where: Mapping[str, str] | None = None,
) -> Any:
    """A Ray dataset of steps [start_step, last_step); its block b is for rank b mod `world_size`.

    Hand it to `streaming_split(world_size, equal=True)` with `preserve_order` set, and each split
    to `local_batches`.

    Args:
        feed: of the phase that the steps are in.
        world_size: workers that share each step's sequences.
        readers: how many tasks may read at once.
        where: the label selector of the nodes that may read; None for any.
    """
    import ray.data

    from pipelines.bagging import BaggingPreprocessor

    chunks = feed.chunks(start_step, last_step, world_size)
    source = _datasource(feed, chunks, world_size)
    # Reading waits for no CPU to be free: a group whose batches do not come for a minute, because
    # others have taken all that it did not hold, would be taken for hung. Nor is an autoscaler
    # asked for any. Alike for both steps, so that Ray Data makes one task of them.
    at_once = ray.data.TaskPoolStrategy(size=readers)
    # Not among the execution options: these would have it in requests to an autoscaler, which no
    # new node could meet.
    remote: dict[str, Any] = {"label_selector": dict(where)} if where else {}
    if "label_selector" not in inspect.signature(ray.data.read_datasource).parameters:
        remote = {"ray_remote_args": remote}  # an older Ray's
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=len(chunks) * world_size,
        num_cpus=0,
        concurrency=readers,
        **remote,
    )
    if feed.bag_size > 1:
        bagging = BaggingPreprocessor(feed.bag_size, num_cpus=0, compute=at_once)
        dataset = bagging.transform(dataset)
    # A block that Ray Data cut for its size would count as two, and ranks get each other's rows.
    dataset.context.target_max_block_size = None
    return dataset


def local_batches(split: Any, feed: Feed, world_size: int) -> Iterator[Columns]:
    """One rank's local batches, one a step, from its split of a `ray_dataset`.

    They are views of a whole block, not to be written to. Were Ray Data to cut it, each step would
    pass through three threads of this process, which compete with the loop for Python's lock: a
    millisecond a step.

    Args:
        split: one of the dataset's `streaming_split`.
        feed, world_size: those the dataset was made for.

    Yields:
        the columns of `Feed.rows` of one step, `tokens` folded: [rows_per_rank, L + 1, s] for bags.
    """
    height = feed.rows_per_rank(world_size)
    blocks = split.iter_batches(
        batch_size=feed.rows_per_block(world_size), batch_format="numpy", prefetch_batches=1
    )
    for block in blocks:
        for start in range(0, len(block["slot"]), height):
            yield {name: column[start : start + height] for name, column in block.items()}


def _datasource(feed: Feed, chunks: list[tuple[int, int]], world_size: int) -> Any:
    """A Ray Data source with one read task for each (chunk, rank), in that order."""
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource.datasource import ReadTask

    height = feed.rows_per_rank(world_size)

    def read_task(first: int, last: int, rank: int) -> ReadTask:
        num_rows = (last - first) * height
        metadata = BlockMetadata(
            num_rows=num_rows,
            size_bytes=num_rows * feed.row_bytes,
            input_files=None,
            exec_stats=None,
        )
        return ReadTask(lambda: [_block(feed, first, last, rank, world_size)], metadata)

    class TokenShards(Datasource):  # type: ignore[misc,unused-ignore]
        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            return [
                read_task(first, last, rank) for first, last in chunks for rank in range(world_size)
            ]

        def estimate_inmemory_data_size(self) -> int:
            return (
                sum(last - first for first, last in chunks) * height * world_size * feed.row_bytes
            )

    return TokenShards()


def _block(feed: Feed, first: int, last: int, rank: int, world_size: int) -> Any:
    from ray.data.block import BlockAccessor

    return BlockAccessor.batch_to_arrow_block(feed.rows(first, last, rank, world_size))


def load_manifest(feed: Feed) -> Manifest:
    """The manifest of the shards that a feed reads; read once a process.

    Raises:
        DataError: the shards are not those that the feed was made for.
    """
    return _manifest(feed.folder, feed.manifest, feed.fingerprint)


@lru_cache(maxsize=4)
def _manifest(folder: str, path: str, fingerprint: str) -> Manifest:
    manifest = Manifest.load(folder, path)
    if manifest.fingerprint != fingerprint:
        raise DataError(
            f"{folder}: the shards are not those this run was planned on (fingerprint "
            f"{manifest.fingerprint[:12]}, planned {fingerprint[:12]}); restore them, or start "
            "a new run with another run.name"
        )
    return manifest


@lru_cache(maxsize=4096)
def _reader(folder: str, path: str, fingerprint: str, source: int, window: int) -> TokenReader:
    """One reader a source and process, for all tasks that run here."""
    manifest = _manifest(folder, path, fingerprint)
    held = _held(folder, path, fingerprint, window)
    return TokenReader(manifest, manifest.sources[source].name, held=held)


@lru_cache(maxsize=4)
def _held(folder: str, path: str, fingerprint: str, window: int) -> Held:
    """What all readers of a process hold together, however many sources there are.

    It should be the rows that a shuffle window of so many tokens touches in each source: about two
    for each of its blocks, which seldom begin where a row does.
    """
    manifest = _manifest(folder, path, fingerprint)
    wanted = 2 * window * np.dtype(manifest.dtype).itemsize + (16 << 20)
    return Held(min(wanted * len(manifest.sources), _CACHE_BYTES), _OPEN_SHARDS)
