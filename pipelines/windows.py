"""How the phases of a run share the windows of one source.

    stream     an epoch of the source: its tokens with their blocks permuted
    window     a stretch of about `shuffle_tokens` of the stream; the windows of an epoch are equal
    grain      the shortest stretch that holds whole sequences of a phase and of all phases after it
    sequence   data_length tokens of one grain, and the look-ahead behind them

The grains of a window come in an order of which any stretch is spread evenly over the window: a
Kronecker sequence, steps of M / golden ratio around a circle of M grains, in which each thousand of
neighbours is shuffled. A phase takes grains in that order, so what it takes and what it leaves are
both fair samples of the window. The next phase cuts what is left into smaller grains, for its grain
divides the one before. It takes one part of each larger grain, then another of each, and so on.

Where bags only get smaller, as they do in superposition training, a grain is one sequence and
nothing is dropped; otherwise a phase that ends inside a grain drops the rest of it.

Every answer is arithmetic on a few integers: O(phases) a position, O(phases²) memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from pipelines.permute import Int64, UInt64, combine, permute

_GRAINS = 2  # the domain of the keys: no other permutation shares a key with one of these
_NEIGHBOURS = 1024  # grains that are shuffled together: an even power of two costs least
_GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


@dataclass(frozen=True)
class PhaseLayout:
    """The steps of one phase, and how it cuts the stream. Lengths are in tokens."""

    first_step: int
    steps: int
    num_sequences: int
    data_length: int
    lookahead: int


@dataclass(frozen=True)
class _Share:
    """What one phase takes of one window: `taken` of the `grains` that it found there."""

    phase: int
    grains: int
    taken: int


@dataclass(frozen=True)
class _Cursor:
    """Where a phase starts: a window of an epoch, and what earlier phases took of that window."""

    epoch: int = 0
    window: int = 0
    shares: tuple[_Share, ...] = ()


@dataclass(frozen=True)
class SourceWindows:
    """The order of one source's sequences in all phases.

    Args:
        number: the source's, which is part of each key.
        num_tokens: training tokens of an epoch.
        layouts: the phases, in order.
        drawn: how many sequences each phase takes from this source.
        shuffle_tokens: about how long a window is.
        seed: another seed is another order.

    Raises:
        ValueError: the source is shorter than the first phase's grain and its look-ahead.
    """

    number: int
    num_tokens: int
    layouts: tuple[PhaseLayout, ...]
    drawn: tuple[int, ...]
    shuffle_tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_tokens < (need := tokens_needed(self.layouts)):
            raise ValueError(f"{self.num_tokens} tokens are too few: {need} are needed")

    def locate(self, phase: int, index: Int64) -> tuple[Int64, Int64]:
        """Where sequences of a phase start.

        Args:
            index: [n], below `drawn[phase]`: 0 is the phase's first sequence of this source.

        Returns:
            epochs [n] and stream offsets [n].
        """
        start, grain = self._cursors[phase], self._grains[phase]
        length = self.layouts[phase].data_length
        per_grain, per_epoch = grain // length, self._usable // grain
        left = self._grains_left(phase, start)
        shares = index < left * per_grain  # the window where the phase starts with earlier phases

        later = (self._first_unshared(phase, start) - left) * per_grain + index
        passes, inside = np.divmod(later, per_epoch * per_grain)
        epoch = start.epoch + np.where(shares, 0, passes)
        window = np.where(shares, start.window, self._window_of(inside // per_grain * grain))
        begin = self._start(window) // grain
        size = np.where(shares, left, self._stop(window) // grain - begin)
        inside = np.where(shares, index, inside - begin * per_grain)

        # A grain gives one sequence at each turn, so that neighbours are of different grains.
        until_end = -(-(self.drawn[phase] - index + inside) // per_grain)
        turn, ordinal = np.divmod(inside, np.minimum(size, until_end))
        offset = self._start(window) + turn * length
        for some, before in ((shares, start.shares), (~shares, ())):
            offset[some] += self._in_window(
                phase, before, ordinal[some], size[some], epoch[some], window[some]
            )
        return epoch, offset

    def passes_after(self, phase: int) -> float:
        """Passes over the source once phases 0 … `phase` are done."""
        end = self._cursors[phase + 1]
        used = sum(share.taken * self._grains[share.phase] for share in end.shares)
        return end.epoch + float(self._start(end.window) + used) / self.num_tokens

    def tail_tokens(self, phase: int) -> int:
        """Tokens that a whole epoch of this phase leaves at its end: they fill no grain."""
        return self.num_tokens - self._usable // self._grains[phase] * self._grains[phase]

    def dropped_tokens(self, phase: int) -> int:
        """Tokens that the phase leaves of the last grains it takes, where it ends."""
        return -self.drawn[phase] * self.layouts[phase].data_length % self._grains[phase]

    # -- windows ----------------------------------------------------------------------------------

    @cached_property
    def _grains(self) -> tuple[int, ...]:
        return grain_lengths(self.layouts)

    @cached_property
    def _usable(self) -> int:
        """Tokens of an epoch behind which every look-ahead still fits."""
        return self.num_tokens - max(layout.lookahead for layout in self.layouts)

    @cached_property
    def _num_windows(self) -> int:
        longest = min(self.shuffle_tokens, self._grains[-1] << 31)  # so that no product overflows
        return min(-(-self._usable // longest), self._usable // self._grains[0])

    def _start(self, window: Any) -> Any:
        """Stream offsets where windows start: whole numbers of the first phase's grain."""
        each, larger = divmod(self._usable // self._grains[0], self._num_windows)
        return (window * each + np.minimum(window, larger)) * self._grains[0]

    def _stop(self, window: Any) -> Any:
        """Stream offsets where windows stop; an epoch's last one holds the rest of it."""
        return np.where(window + 1 == self._num_windows, self._usable, self._start(window + 1))

    def _window_of(self, offset: Any) -> Any:
        """The windows that hold these stream offsets."""
        each, larger = divmod(self._usable // self._grains[0], self._num_windows)
        number = offset // self._grains[0]
        rest = (number - larger * (each + 1)) // each + larger
        of_rest = np.minimum(rest, self._num_windows - 1)  # the last one holds an epoch's rest
        return np.where(number < larger * (each + 1), number // (each + 1), of_rest)

    # -- what the phases take of them -------------------------------------------------------------

    @cached_property
    def _cursors(self) -> tuple[_Cursor, ...]:
        """[phases + 1]: where each phase starts, and where the last one ends."""
        cursors = [_Cursor()]
        for phase in range(len(self.layouts)):
            cursors.append(self._advanced(phase, cursors[-1]))
        return tuple(cursors)

    def _advanced(self, phase: int, start: _Cursor) -> _Cursor:
        """The cursor once a phase that starts at `start` is done."""
        grain, per_epoch = self._grains[phase], self._usable // self._grains[phase]
        taken = -(-self.drawn[phase] * self.layouts[phase].data_length // grain)
        left = self._grains_left(phase, start)
        if taken <= left:
            return replace(start, shares=(*start.shares, _Share(phase, left, taken)))
        passes, last = divmod(self._first_unshared(phase, start) + taken - left - 1, per_epoch)
        window = int(self._window_of(np.int64(last * grain)))
        begin, end = int(self._start(window)) // grain, int(self._stop(window)) // grain
        share = _Share(phase, end - begin, last - begin + 1)
        return _Cursor(start.epoch + passes, window, (share,))

    def _grains_left(self, phase: int, start: _Cursor) -> int:
        """Grains of the phase that are left of the window where it starts."""
        if start.shares:
            last = start.shares[-1]
            return (last.grains - last.taken) * (self._grains[last.phase] // self._grains[phase])
        tokens = int(self._stop(start.window) - self._start(start.window))
        return tokens // self._grains[phase]

    def _first_unshared(self, phase: int, start: _Cursor) -> int:
        """The place in its epoch of the phase's first grain behind the window where it starts."""
        return int(self._stop(start.window)) // self._grains[phase]

    def _in_window(
        self,
        phase: int,
        before: tuple[_Share, ...],
        ordinal: Int64,
        size: Int64,
        epoch: Int64,
        window: Int64,
    ) -> Int64:
        """Offsets in their windows of grains that a phase takes; all arrays are [n].

        Args:
            before: what earlier phases took of these windows.
            ordinal: which of the grains that they left, in the order of taking.
            size: how many they left.
        """
        grain, offset = self._grains[phase], np.zeros_like(ordinal)
        key = self._key(phase, epoch, window)
        for share in reversed(before):
            larger, left = self._grains[share.phase], share.grains - share.taken
            turn, whole = np.divmod(ordinal, left)
            whole = _shuffled(whole, left, combine(key, turn))
            # Each large grain starts at another of its parts.
            part = (turn + combine(key, whole).astype(np.int64)) % (larger // grain)
            offset += part * grain
            ordinal, size, grain = share.taken + whole, np.full_like(size, share.grains), larger
            key = self._key(share.phase, epoch, window)
        return offset + grain * _spread(ordinal, size, key)

    def _key(self, phase: int, epoch: Int64, window: Int64) -> UInt64:
        return combine(_GRAINS, self.seed, self.number, phase, epoch, window)


def _spread(ordinal: Int64, size: Int64, key: UInt64) -> Int64:
    """Which of `size` grains comes at a place in the order; any stretch of it is spread evenly."""
    sizes, which = np.unique(size, return_inverse=True)
    step = np.array([_step(int(number)) for number in sizes], np.int64)[which]
    first = (key % size.astype(np.uint64)).astype(np.int64)
    return (_shuffled(ordinal, size, key) * step + first) % size


@lru_cache(maxsize=256)
def _step(size: int) -> int:
    """A step around a circle of so many grains that meets each one, about golden."""
    step = max(round(size / _GOLDEN_RATIO), 1)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _shuffled(ordinal: Int64, size: Int64 | int, key: UInt64) -> Int64:
    """Where a permutation of [0, size) that moves nothing far sends each ordinal."""
    group, inside = np.divmod(ordinal, _NEIGHBOURS)
    begin = group * _NEIGHBOURS
    return begin + permute(inside, np.minimum(_NEIGHBOURS, size - begin), combine(key, group))


def grain_lengths(layouts: Sequence[Any]) -> tuple[int, ...]:
    """Tokens of each phase's grain: the least common multiple of its and later data lengths."""
    lengths = [layout.data_length for layout in layouts]
    return tuple(math.lcm(*lengths[phase:]) for phase in range(len(lengths)))


def tokens_needed(layouts: Sequence[PhaseLayout]) -> int:
    """Tokens of the shortest source that all phases can read."""
    return grain_lengths(layouts)[0] + max(layout.lookahead for layout in layouts)
