"""Which tokens train at which step: a pure function of (corpus, seed, plan).

    source    its training tokens, end to end: linear positions 0 … N−1
    epoch     the same tokens with their blocks permuted            (stream offsets 0 … N−1)
    cell      data_length consecutive stream tokens + lookahead      one training sequence
    group     ~shuffle_tokens of neighbouring cells, permuted        so that few rows serve a step
    step      the next num_sequences cells, drawn from the sources by weight

A run has one cursor, the number of finished steps. It runs through all phases: a phase cuts the
stream from where the phase before stopped, in cells of its own length. Every answer is arithmetic
on a few integers, so resuming at step 10,000,000 costs what step 0 costs, and no process has to be
told anything but the step. Neither the number of workers nor time appears anywhere.

Exactly once: within an epoch of a source, cells are disjoint and cover the stream up to a tail
shorter than one sequence (`Order.tail_tokens`), whatever the phases' cell lengths are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipelines.errors import DataError
from pipelines.permute import Int64, combine, permute

_BLOCKS, _CELLS = 1, 2  # domains of the keys: no permutation shares its key with another's
_WEIGHT_UNIT = 1 << 22  # weights are rounded to this; 2^63 / 2^22 sequences fit in an int64


@dataclass(frozen=True)
class StreamSource:
    """One source of text as order sees it: how many training tokens, and its share."""

    name: str
    num_tokens: int
    weight: float


@dataclass(frozen=True)
class Cut:
    """How one phase cuts the stream. Lengths are in tokens."""

    first_step: int
    steps: int
    num_sequences: int
    data_length: int
    lookahead: int


@dataclass(frozen=True)
class Spans:
    """The sequences of one step's global batch, in slot order; each array is [num_sequences].

    Sequence i reads `length` tokens (and the cut's look-ahead) at stream `offset` of `epoch` of
    source number `source`.
    """

    source: Int64
    epoch: Int64
    offset: Int64
    length: int

    def __len__(self) -> int:
        return len(self.source)

    def select(self, slots: slice) -> Spans:
        """The sequences in those places."""
        return Spans(self.source[slots], self.epoch[slots], self.offset[slots], self.length)


@dataclass(frozen=True)
class _Cursor:
    """Where a phase starts in a source: the epoch, and the stream offset inside it."""

    epoch: int
    offset: int


@dataclass(frozen=True)
class Order:
    """The order of a whole run.

    Args:
        sources: what is mixed; weights need not sum to one.
        cuts: the phases, in order, back to back from step 0.
        block_tokens: the unit of the epoch permutation.
        shuffle_tokens: the size of a group of cells that is shuffled together.
        seed: another seed is another order.

    Raises:
        DataError: a source in use is too short for one sequence, or nothing has weight.
    """

    sources: tuple[StreamSource, ...]
    cuts: tuple[Cut, ...]
    block_tokens: int
    shuffle_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not any(source.weight > 0 for source in self.sources):
            raise DataError("data.sources: every weight is 0; give at least one a positive weight")
        for source, (part, _) in zip(self.sources, self._shares, strict=True):
            if source.weight > 0 and part == 0:
                raise DataError(
                    f"data.sources: {source.name} has a share of less than 1 in {_WEIGHT_UNIT:,} "
                    "of the sequences and would never be read; give it a larger weight, or 0"
                )
        for source in self.sources:
            for cut in self.cuts:
                need = cut.data_length + cut.lookahead
                if source.weight > 0 and source.num_tokens < need:
                    raise DataError(
                        f"data.sources: {source.name} has {source.num_tokens:,} training tokens, "
                        f"fewer than one sequence of {need:,} (sequence_length x bag_size, and the "
                        "bag after it); add text or shorten train.sequence_length"
                    )

    def spans(self, first: int, last: int | None = None, slots: slice | None = None) -> Spans:
        """The global batches of steps [first, last) of one phase, one after the other.

        Args:
            first: finished steps before the first of them (0 is the run's first step).
            last: one step by default.
            slots: only these of each batch, such as a rank's; nothing is worked out for the others.
        """
        phase = self._phase_at(first)
        cut = self.cuts[phase]
        begin, end = first - cut.first_step, (first + 1 if last is None else last) - cut.first_step
        if not begin < end <= cut.steps:
            raise IndexError(f"steps {first} to {last} are not within one phase")
        steps = np.arange(begin, end, dtype=np.int64)[:, np.newaxis]
        wanted = range(cut.num_sequences)[slots or slice(None)]
        ordinals = (steps * cut.num_sequences + np.array(wanted, np.int64)).ravel()
        source, cell = self._draw(ordinals)
        epoch, offset = np.empty_like(cell), np.empty_like(cell)
        for number in np.unique(source):
            mine = source == number
            epoch[mine], offset[mine] = self._cells(phase, int(number), cell[mine])
        return Spans(source, epoch, offset, cut.data_length)

    def linear(self, spans: Spans, length: int) -> tuple[Int64, Int64, Int64, Int64]:
        """Where the `length` stream tokens from the start of each span lie in their sources.

        Returns:
            pieces, in stream order: of which span, from where in it on, and the linear [start,
            stop) in its source.
        """
        unit = self.block_tokens
        blocks_of = np.array([source.num_tokens // unit for source in self.sources], np.int64)
        first, last = spans.offset // unit, (spans.offset + length - 1) // unit
        counts = last - first + 1
        span = np.repeat(np.arange(len(spans)), counts)
        block = first[span] + np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
        # The last, partial block keeps its place at the end of every epoch.
        num_blocks = blocks_of[spans.source[span]]
        inside = block < num_blocks
        key = combine(_BLOCKS, self.seed, spans.source, spans.epoch)[span]
        home = block.copy()
        home[inside] = permute(block[inside], num_blocks[inside], key[inside])
        start = np.maximum(spans.offset[span] - block * unit, 0)
        stop = np.minimum(spans.offset[span] + length - block * unit, unit)
        at = np.maximum(block * unit - spans.offset[span], 0)
        return span, at, home * unit + start, home * unit + stop

    def epochs_after(self, phase: int) -> tuple[float, ...]:
        """Passes over each source once phases 0 … `phase` are done."""
        cursors = self._cursors[phase + 1]
        return tuple(
            cursor.epoch + cursor.offset / source.num_tokens if source.num_tokens else 0.0
            for cursor, source in zip(cursors, self.sources, strict=True)
        )

    def tail_tokens(self, phase: int) -> tuple[int, ...]:
        """Tokens at the end of each whole epoch that fill no sequence of that phase's cut."""
        cut = self.cuts[phase]
        return tuple(
            source.num_tokens - _cells_in(source.num_tokens, cut) * cut.data_length
            for source in self.sources
        )

    def _phase_at(self, step: int) -> int:
        for number, cut in enumerate(self.cuts):
            if cut.first_step <= step < cut.first_step + cut.steps:
                return number
        raise IndexError(f"step {step} lies outside the plan")

    @cached_property
    def _shares(self) -> tuple[tuple[int, int], ...]:
        """For each source, (its weight, the weight of it and all sources after it), integers."""
        total = sum(source.weight for source in self.sources)
        parts = [round(_WEIGHT_UNIT * source.weight / total) for source in self.sources]
        return tuple((part, sum(parts[number:])) for number, part in enumerate(parts))

    def _draw(self, ordinals: Int64) -> tuple[Int64, Int64]:
        """Each sequence's source, and how many of that source came before it in the phase.

        The first source takes every (weight/total)-th sequence, evenly spread; what is left goes
        to the second in its share of the rest, and so on.
        """
        source = np.zeros_like(ordinals)
        rest = ordinals.copy()  # ordinals among the sequences that the sources so far left
        cell = np.zeros_like(ordinals)
        open_ = np.ones(ordinals.shape, dtype=bool)
        for number, (part, remaining) in enumerate(self._shares):
            if remaining == 0:
                break
            before = rest * part // remaining
            takes = open_ & ((rest + 1) * part // remaining > before)
            source[takes], cell[takes] = number, before[takes]
            open_ &= ~takes
            rest -= before
        return source, cell

    def _drawn(self, count: int) -> tuple[int, ...]:
        """How many of the first `count` sequences of a phase come from each source."""
        drawn, rest = [], count
        for part, remaining in self._shares:
            taken = rest * part // remaining if remaining else 0
            drawn.append(taken)
            rest -= taken
        return tuple(drawn)

    @cached_property
    def _cursors(self) -> tuple[tuple[_Cursor, ...], ...]:
        """[phases + 1][sources]: where each phase starts, and where the last one ends."""
        cursors = [tuple(_Cursor(0, 0) for _ in self.sources)]
        for cut in self.cuts:
            drawn = self._drawn(cut.steps * cut.num_sequences)
            cursors.append(
                tuple(
                    _advance(cursor, source.num_tokens, cut, cells)
                    for cursor, source, cells in zip(cursors[-1], self.sources, drawn, strict=True)
                )
            )
        return tuple(cursors)

    def _cells(self, phase: int, source: int, cell: Int64) -> tuple[Int64, Int64]:
        """(epoch, stream offset) of a phase's cells, counted from where the phase starts."""
        cut, num_tokens = self.cuts[phase], self.sources[source].num_tokens
        start = self._cursors[phase][source]
        total = self._drawn(cut.steps * cut.num_sequences)[source]
        in_first = min(_cells_in(num_tokens - start.offset, cut), total)
        per_epoch = _cells_in(num_tokens, cut)

        later = cell >= in_first
        past, index = np.divmod(np.where(later, cell - in_first, cell), max(per_epoch, 1))
        index = np.where(later, index, cell)
        epoch = np.where(later, start.epoch + 1 + past, start.epoch)
        base = np.where(later, 0, start.offset)
        # Cells that this phase takes from this epoch: the last epoch of a phase may be cut short,
        # and a group that reached past the end would mix in cells of the next phase.
        taken = np.where(
            later, np.minimum(total - in_first - past * per_epoch, per_epoch), in_first
        )

        group_cells = max(self.shuffle_tokens // cut.data_length, 1)
        group, inside = np.divmod(index, group_cells)
        size = np.minimum(group_cells, taken - group * group_cells)
        key = combine(_CELLS, self.seed, source, phase, epoch, group)
        shuffled = group * group_cells + permute(inside, size, key)
        return epoch, base + shuffled * cut.data_length


def rank_slots(num_sequences: int, world_size: int, rank: int) -> slice:
    """The slots of a global batch that `rank` trains on; sizes differ by at most one."""
    each, larger = divmod(num_sequences, world_size)
    start = rank * each + min(rank, larger)
    return slice(start, start + each + (rank < larger))


def rows_per_rank(num_sequences: int, world_size: int) -> int:
    """Rows in every rank's local batch: the largest share; shorter ranks get filler rows."""
    return -(-num_sequences // world_size)


def span_hashes(spans: Spans, salt: str) -> Int64:
    """[n, 8] lanes of 16 bits per sequence; their sum over a batch does not depend on who sums.

    A multiset hash (Bellare & Micciancio's AdHash): lane sums modulo 2^16 identify the set of
    spans. Lanes this small add exactly in float64, so they can ride along in any all-reduce.
    """
    seed = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    fields = (spans.source, spans.epoch, spans.offset, spans.length)
    words = np.stack([combine(seed, lane, *fields) for lane in range(2)], axis=1)
    return words.view(np.uint16).reshape(len(spans), 8).astype(np.int64)


def digest(lane_sums: Sequence[float] | Int64) -> str:
    """The `data_digest` of a step: 32 hex digits from the summed lanes of `span_hashes`."""
    return "".join(f"{int(lane) % 65536:04x}" for lane in lane_sums)


def named_spans(order: Order, steps: Iterable[int]) -> list[list[Any]]:
    """[step from 1, source, epoch, stream offset, tokens] of each sequence of some steps."""
    named: list[list[Any]] = []
    for step in steps:
        spans = order.spans(step)
        for source, epoch, offset in zip(
            spans.source.tolist(), spans.epoch.tolist(), spans.offset.tolist(), strict=True
        ):
            named.append([step + 1, order.sources[source].name, epoch, offset, spans.length])
    return named


def _cells_in(num_tokens: int, cut: Cut) -> int:
    return max(num_tokens - cut.lookahead, 0) // cut.data_length


def _advance(cursor: _Cursor, num_tokens: int, cut: Cut, cells: int) -> _Cursor:
    """The cursor after taking `cells` cells."""
    in_first = _cells_in(num_tokens - cursor.offset, cut)
    if cells <= in_first:
        return _Cursor(cursor.epoch, cursor.offset + cells * cut.data_length)
    per_epoch = _cells_in(num_tokens, cut)
    full, rest = divmod(cells - in_first - 1, per_epoch)
    return _Cursor(cursor.epoch + 1 + full, (rest + 1) * cut.data_length)
