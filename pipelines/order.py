"""Which tokens train at which step: a pure function of (corpus, seed, plan).

    source     its training tokens, end to end: linear positions 0 … N−1
    epoch      the same tokens with their blocks permuted            (stream offsets 0 … N−1)
    sequence   data_length stream tokens + lookahead, in an order that is fair (windows.py)
    step       the next num_sequences sequences, drawn from the sources by weight

A run has one cursor, the number of finished steps. It runs through all phases: each one takes a
fair sample of what the phases before it left of a window of the stream. Every answer is arithmetic
on a few integers, so resuming at step 10,000,000 costs what step 0 costs, and no process has to be
told anything but the step. Neither the number of workers nor time appears anywhere.

Exactly once: within an epoch of a source, sequences are disjoint. They cover the stream up to a
tail (`Order.tail_tokens`) and what a phase drops where it ends (`Order.dropped_tokens`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from pipelines.errors import DataError
from pipelines.permute import Int64, combine, permute
from pipelines.windows import PhaseLayout, SourceWindows, tokens_needed

ORDER_VERSION = 2  # of another version, the same steps read other tokens
_BLOCKS = 1  # the domain of the keys: no other permutation shares a key with one of these
_WEIGHT_UNIT = 1 << 22  # weights are rounded to this; 2^63 / 2^22 sequences fit in an int64

T = TypeVar("T")


@dataclass(frozen=True)
class StreamSource:
    """One source of text as order sees it: how many training tokens, and its share."""

    name: str
    num_tokens: int
    weight: float


@dataclass(frozen=True)
class Spans:
    """The sequences of one step's global batch, in slot order; each array is [num_sequences].

    Sequence i reads `length` tokens (and the phase's look-ahead) at stream `offset` of `epoch` of
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
class Order:
    """The order of a whole run.

    Args:
        sources: what is mixed; weights need not sum to one.
        layouts: the phases, in order, back to back from step 0.
        block_tokens: the unit of the epoch permutation.
        shuffle_tokens: about how long a window is.
        seed: another seed is another order.

    Raises:
        DataError: a source in use is too short for every phase, or nothing has weight.
    """

    sources: tuple[StreamSource, ...]
    layouts: tuple[PhaseLayout, ...]
    block_tokens: int
    shuffle_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not any(source.weight > 0 for source in self.sources):
            raise DataError("data.sources: every weight is 0; give at least one a positive weight")
        need = tokens_needed(self.layouts)
        for source in self.sources:
            if source.weight > 0 and source.num_tokens < need:
                raise DataError(
                    f"data.sources: {source.name} has {source.num_tokens:,} training tokens, fewer "
                    f"than the {need:,} that hold a whole number of sequences of every phase "
                    "(sequence_length x bag_size) and the bag after them; add text or shorten "
                    "train.sequence_length"
                )

    def spans(self, first: int, last: int | None = None, slots: slice | None = None) -> Spans:
        """The global batches of steps [first, last) of one phase, one after the other.

        Args:
            first: finished steps before the first of them (0 is the run's first step).
            last: one step by default.
            slots: only these of each batch, such as a rank's; nothing is worked out for the others.
        """
        phase = self._phase_at(first)
        layout = self.layouts[phase]
        begin = first - layout.first_step
        end = (first + 1 if last is None else last) - layout.first_step
        if not begin < end <= layout.steps:
            raise IndexError(f"steps {first} to {last} are not within one phase")
        steps = np.arange(begin, end, dtype=np.int64)[:, np.newaxis]
        wanted = range(layout.num_sequences)[slots or slice(None)]
        ordinals = (steps * layout.num_sequences + np.array(wanted, np.int64)).ravel()
        source, index = self._draw(ordinals)
        epoch, offset = np.empty_like(index), np.empty_like(index)
        for number in np.unique(source):
            own = source == number
            epoch[own], offset[own] = self._windows[number].locate(phase, index[own])
        return Spans(source, epoch, offset, layout.data_length)

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
        return self._of_each(lambda windows: windows.passes_after(phase), 0.0)

    def tail_tokens(self, phase: int) -> tuple[int, ...]:
        """Tokens that each whole epoch of that phase leaves at its end, of each source."""
        return self._of_each(lambda windows: windows.tail_tokens(phase), 0)

    def dropped_tokens(self, phase: int) -> tuple[int, ...]:
        """Tokens that the phase drops where it ends, of each source."""
        return self._of_each(lambda windows: windows.dropped_tokens(phase), 0)

    def _of_each(self, of: Callable[[SourceWindows], T], unused: T) -> tuple[T, ...]:
        """What holds of each source; `unused` of those without weight."""
        windows = self._windows
        return tuple(
            of(windows[number]) if number in windows else unused
            for number in range(len(self.sources))
        )

    def _phase_at(self, step: int) -> int:
        for number, layout in enumerate(self.layouts):
            if layout.first_step <= step < layout.first_step + layout.steps:
                return number
        raise IndexError(f"step {step} lies outside the plan")

    @cached_property
    def _windows(self) -> dict[int, SourceWindows]:
        """The order inside each source that has weight, by its number."""
        drawn = [self._drawn(layout.steps * layout.num_sequences) for layout in self.layouts]
        return {
            number: SourceWindows(
                number,
                source.num_tokens,
                self.layouts,
                tuple(of_phase[number] for of_phase in drawn),
                self.shuffle_tokens,
                self.seed,
            )
            for number, source in enumerate(self.sources)
            if source.weight > 0
        }

    @cached_property
    def _shares(self) -> tuple[tuple[int, int], ...]:
        """For each source, (its weight, the weight of it and all sources after it), integers.

        One with any weight is read.
        """
        total = sum(source.weight for source in self.sources)
        weights = [source.weight for source in self.sources]
        parts = [max(round(_WEIGHT_UNIT * w / total), 1) if w > 0 else 0 for w in weights]
        return tuple((part, sum(parts[number:])) for number, part in enumerate(parts))

    def _draw(self, ordinals: Int64) -> tuple[Int64, Int64]:
        """Each sequence's source, and how many of that source came before it in its phase.

        The first source takes every (weight/total)-th sequence, evenly spread; what is left goes
        to the second in its share of the rest, and so on.
        """
        source = np.zeros_like(ordinals)
        rest = ordinals.copy()  # ordinals among the sequences that the sources so far left
        index = np.zeros_like(ordinals)
        open_ = np.ones(ordinals.shape, dtype=bool)
        for number, (part, remaining) in enumerate(self._shares):
            if remaining == 0:
                break
            before = rest * part // remaining
            takes = open_ & ((rest + 1) * part // remaining > before)
            source[takes], index[takes] = number, before[takes]
            open_ &= ~takes
            rest -= before
        return source, index

    def _drawn(self, count: int) -> tuple[int, ...]:
        """How many of the first `count` sequences of a phase come from each source."""
        drawn, rest = [], count
        for part, remaining in self._shares:
            taken = rest * part // remaining if remaining else 0
            drawn.append(taken)
            rest -= taken
        return tuple(drawn)


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
