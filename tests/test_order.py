"""Order: which tokens at which step. Everything here is arithmetic; no text is read."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from pipelines.errors import DataError
from pipelines.order import (
    Order,
    PhaseLayout,
    Spans,
    StreamSource,
    digest,
    rank_slots,
    rows_per_rank,
    span_hashes,
)
from pipelines.permute import combine, permute


def make_layouts(*phases: tuple[int, int, int, int]) -> tuple[PhaseLayout, ...]:
    """(steps, num_sequences, data_length, lookahead) per phase."""
    layouts, first = [], 0
    for steps, num_sequences, data_length, lookahead in phases:
        layouts.append(PhaseLayout(first, steps, num_sequences, data_length, lookahead))
        first += steps
    return tuple(layouts)


def make_order(
    *phases: tuple[int, int, int, int],
    tokens: tuple[int, ...] = (10_000,),
    weights: tuple[float, ...] = (1.0,),
    block_tokens: int = 96,
    shuffle_tokens: int = 500,
    seed: int = 0,
) -> Order:
    sources = tuple(
        StreamSource(f"s{i}", n, w) for i, (n, w) in enumerate(zip(tokens, weights, strict=True))
    )
    return Order(sources, make_layouts(*phases), block_tokens, shuffle_tokens, seed)


def tokens_of(order: Order, step: int) -> list[tuple[int, int, int]]:
    """Every (source, epoch, linear position) trained on in a step."""
    spans, out = order.spans(step), []
    for span, _, start, stop in zip(*order.linear(spans, spans.length), strict=True):
        source, epoch = int(spans.source[span]), int(spans.epoch[span])
        out += [(source, epoch, position) for position in range(start, stop)]
    return out


def test_many_steps_at_once_are_the_steps_one_after_the_other() -> None:
    order = make_order((9, 5, 64, 4), (7, 5, 64, 1))
    at_once = order.spans(1, 8)
    for step in range(1, 8):
        alone, rows = order.spans(step), slice((step - 1) * 5, step * 5)
        assert at_once.select(rows).offset.tolist() == alone.offset.tolist()
        assert at_once.select(rows).epoch.tolist() == alone.epoch.tolist()
    some = order.spans(1, 8, slice(2, 4))
    assert some.offset.tolist() == at_once.offset.reshape(7, 5)[:, 2:4].ravel().tolist()
    assert len(order.spans(1, 8, slice(2, 2))) == 0
    with pytest.raises(IndexError):
        order.spans(8, 10)  # of two phases


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    out = permute(np.arange(size), size, combine(3, size))
    assert sorted(out.tolist()) == list(range(size))


def test_permute_depends_on_its_key_and_is_not_the_identity() -> None:
    index = np.arange(1000)
    one, two = permute(index, 1000, combine(1)), permute(index, 1000, combine(2))
    assert (one != two).mean() > 0.9
    assert (one != index).mean() > 0.9


def test_permute_is_frozen() -> None:
    """A changed value here breaks the order of every run in existence."""
    assert permute(np.arange(10), 10, combine(1, 2, 3)).tolist() == GOLDEN_PERMUTATION
    big = permute(np.array([0, 1, 10**13]), 10**13 + 7, combine(9))
    assert big.tolist() == GOLDEN_BIG


SCHEDULES = {
    "one phase": [(40, 5, 64, 4)],
    "a bag of 4, then plain": [(12, 3, 64, 4), (60, 3, 16, 1)],
    "bags get smaller": [(4, 3, 128, 8), (6, 3, 64, 4), (9, 3, 32, 2), (60, 3, 16, 1)],
    "lengths that divide nothing": [(7, 3, 60, 6), (9, 5, 28, 4), (50, 3, 10, 1)],
    "bags grow again": [(11, 3, 10, 1), (5, 3, 60, 6), (20, 3, 10, 1)],
    "three phases within a window": [(2, 2, 64, 4), (3, 2, 16, 1), (90, 2, 16, 1)],
}


@pytest.mark.parametrize("shuffle_tokens", [1, 500, 1_200, 10_000])
@pytest.mark.parametrize("phases", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_exactly_once_within_an_epoch(
    phases: list[tuple[int, int, int, int]], shuffle_tokens: int
) -> None:
    """No token comes twice; what is skipped is the tails and drops that the plan prints."""
    order = make_order(*phases, tokens=(2_000,), shuffle_tokens=shuffle_tokens)
    seen: dict[int, list[int]] = {}
    for step in range(sum(phase[0] for phase in phases)):
        for _, epoch, position in tokens_of(order, step):
            seen.setdefault(epoch, []).append(position)
    every = range(len(phases))
    tail = max(order.tail_tokens(phase)[0] for phase in every)
    dropped = sum(order.dropped_tokens(phase)[0] for phase in every)
    for epoch, positions in seen.items():
        assert len(positions) == len(set(positions)), f"a token came twice in epoch {epoch}"
        if epoch < max(seen):
            assert len(positions) >= 2_000 - tail - dropped, "more was skipped than is told"
    assert sorted(seen) == list(range(max(seen) + 1))


@pytest.mark.parametrize("phases", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_what_a_phase_drops_is_less_than_a_grain(phases: list[tuple[int, int, int, int]]) -> None:
    order = make_order(*phases, tokens=(2_000,))
    lengths = [phase[2] for phase in phases]
    for phase in range(len(phases)):
        grain = math.lcm(*lengths[phase:])
        assert order.dropped_tokens(phase)[0] < grain
        if lengths == sorted(lengths, reverse=True) and grain == lengths[phase]:
            assert order.dropped_tokens(phase) == (0,)


def test_a_phase_trains_on_what_the_ones_before_it_left() -> None:
    """An epoch in one window that two phases share: together they cover all of it but a tail."""
    order = make_order((3, 5, 64, 4), (24, 5, 16, 1), tokens=(15 * 64 + 120 * 16 + 4,))
    taken = [pos for step in range(27) for _, epoch, pos in tokens_of(order, step) if epoch == 0]
    assert len(taken) == len(set(taken)) == 15 * 64 + 120 * 16
    assert order.epochs_after(1)[0] == pytest.approx(1, abs=4 / 2_880)


def test_tail_is_what_is_left_out() -> None:
    order = make_order((200, 1, 64, 4), tokens=(1_000,))
    trained = {pos for step in range(200) for _, e, pos in tokens_of(order, step) if e == 1}
    assert order.tail_tokens(0) == (1_000 - len(trained),)
    assert 0 < order.tail_tokens(0)[0] < 64 + 4


# ── fairness ─────────────────────────────────────────────────────────────────────────────────────

DEMO_TOKENS, ROW, LATENT, BATCH = 12_000_000, 65_536, 64, 16


def demo_like(bags: tuple[int, ...], steps: int, shuffle_tokens: int = 1 << 24) -> Order:
    """The demo's corpus and batch: equal shares of 30 % of the steps in bags, the rest plain."""
    share = round(0.3 * steps) // (len(bags) - 1)
    counts = [share] * (len(bags) - 1)
    counts.append(steps - sum(counts))
    phases = [(n, BATCH, LATENT * bag, bag) for n, bag in zip(counts, bags, strict=True)]
    return make_order(
        *phases, tokens=(DEMO_TOKENS,), block_tokens=ROW, shuffle_tokens=shuffle_tokens
    )


def rows_of(order: Order, first: int, last: int) -> np.ndarray:
    """The shard row in which each sequence of steps [first, last) starts, of one phase."""
    spans = order.spans(first, last)
    _, _, start, _ = order.linear(spans, 1)
    return start // ROW


def fairness(rows: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """(rows touched, against what a fair draw touches; chi-square per degree of freedom).

    Args:
        rows: of each sequence drawn.
        sizes: [rows] tokens that could be drawn of each; rows are numbered from 0.
    """
    share = sizes / sizes.sum()
    counts = np.bincount(rows, minlength=len(sizes))
    expected = len(rows) * share
    touched = (counts > 0).sum() / (1 - (1 - share) ** len(rows)).sum()
    return touched, ((counts - expected) ** 2 / expected).sum() / (len(sizes) - 1)


def row_sizes(num_tokens: int = DEMO_TOKENS) -> np.ndarray:
    return np.minimum(ROW, num_tokens - np.arange(0, num_tokens, ROW))


@pytest.mark.parametrize("steps", [3_000, 6_000])
@pytest.mark.parametrize("bags", [(4, 1), (8, 4, 2, 1), (6, 1)])
def test_any_thousand_steps_of_a_phase_are_a_fair_sample(bags: tuple[int, ...], steps: int) -> None:
    """Of a corpus that fits a window; of a shorter phase, all its steps."""
    order = demo_like(bags, steps)
    for layout in order.layouts:
        last = layout.first_step + layout.steps
        stretch = min(1_000, layout.steps)
        for first in {layout.first_step, layout.first_step + 137, last - stretch}:
            rows = rows_of(order, first, min(first + stretch, last))
            touched, chi_square = fairness(rows, row_sizes())
            assert touched >= 0.97, (layout, first)
            assert chi_square <= 1.5, (layout, first)


def test_a_longer_corpus_is_sampled_fairly_inside_each_window() -> None:
    order = demo_like((4, 1), 6_000, shuffle_tokens=1 << 21)
    spans = order.spans(order.layouts[1].first_step, 6_000)
    windows = spans.offset * 6 // DEMO_TOKENS  # 12 M tokens in windows of 2 Mi are six
    assert len(np.unique(windows)) > 1
    for window in np.unique(windows):
        offsets = spans.offset[windows == window]
        if len(offsets) < 8_000:  # the phase takes only a part of it
            continue
        begin = DEMO_TOKENS // 6 * window
        parts = (offsets - begin) * 30 // (DEMO_TOKENS // 6)
        touched, chi_square = fairness(parts, np.ones(30))
        assert touched == pytest.approx(1, abs=0.03)
        assert chi_square <= 1.5


@pytest.mark.parametrize("bags", [(4, 1), (8, 4, 2, 1), (1, 6, 1)])
def test_neighbours_in_a_batch_come_from_different_documents(bags: tuple[int, ...]) -> None:
    """Documents of 6,000 tokens: two thousand, of which a fair draw seldom takes one twice."""
    order = demo_like(bags, 3_000)
    for layout in order.layouts:
        spans = order.spans(layout.first_step, layout.first_step + min(1_000, layout.steps))
        _, _, start, _ = order.linear(spans, 1)
        documents = (start // 6_000).reshape(-1, BATCH)
        same = (documents[:, 1:] == documents[:, :-1]).mean()
        assert same < 0.002  # a fair draw: 0.0005


def test_epochs_differ_and_steps_are_shuffled() -> None:
    order = make_order((300, 2, 16, 1), tokens=(2_000,))
    first = [order.spans(step).offset.tolist() for step in range(20)]
    per_epoch = (2_000 - 1) // 16
    second = [order.spans(step + per_epoch // 2).offset.tolist() for step in range(20)]
    assert first != second
    flat = [offset for step in first for offset in step]
    assert flat != sorted(flat)


def test_another_seed_is_another_order() -> None:
    one, two = make_order((9, 4, 64, 4)), make_order((9, 4, 64, 4), seed=1)
    assert tokens_of(one, 0) != tokens_of(two, 0)


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("num_sequences", [1, 5, 16])
def test_ranks_share_each_batch_without_gap_or_overlap(world_size: int, num_sequences: int) -> None:
    slots = [
        slot
        for rank in range(world_size)
        for slot in range(num_sequences)[rank_slots(num_sequences, world_size, rank)]
    ]
    assert slots == list(range(num_sequences))
    sizes = [
        len(range(num_sequences)[rank_slots(num_sequences, world_size, rank)])
        for rank in range(world_size)
    ]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == rows_per_rank(num_sequences, world_size)


@pytest.mark.parametrize("world_size", range(1, 9))
def test_any_resume_position_and_world_size_gives_the_same_tail(world_size: int) -> None:
    """Restore at every step: a fresh Order asked from step k on answers what the first did."""
    phases = [(6, 5, 64, 4), (9, 5, 16, 1)]
    whole = [tokens_of(make_order(*phases, tokens=(1_500,)), step) for step in range(15)]
    for start in range(15):
        order = make_order(*phases, tokens=(1_500,))
        for step in range(start, 15):
            spans = order.spans(step)
            parts = [spans.select(rank_slots(5, world_size, rank)) for rank in range(world_size)]
            assert np.concatenate([part.offset for part in parts]).tolist() == spans.offset.tolist()
            assert tokens_of(order, step) == whole[step]


@pytest.mark.parametrize("world_size", range(1, 9))
def test_digest_is_the_same_however_many_workers_sum_it(world_size: int) -> None:
    spans = make_order((9, 5, 64, 4)).spans(3)
    whole = digest(span_hashes(spans, "corpus").sum(axis=0))
    lanes = np.zeros(8)
    for rank in range(world_size):
        mine = spans.select(rank_slots(5, world_size, rank))
        lanes += span_hashes(mine, "corpus").sum(axis=0).astype(np.float64)
    assert digest(lanes) == whole
    assert len(whole) == 32


def test_digest_tells_steps_corpora_and_lengths_apart() -> None:
    order = make_order((9, 5, 64, 4))
    spans = order.spans(3)
    longer = Spans(spans.source, spans.epoch, spans.offset, spans.length + 1)
    digests = {
        digest(span_hashes(spans, "corpus").sum(axis=0)),
        digest(span_hashes(order.spans(4), "corpus").sum(axis=0)),
        digest(span_hashes(spans, "another").sum(axis=0)),
        digest(span_hashes(longer, "corpus").sum(axis=0)),
    }
    assert len(digests) == 4


def test_mixture_keeps_its_weights_everywhere() -> None:
    order = make_order((500, 10, 16, 1), tokens=(3_000, 900, 5_000), weights=(5.0, 3.0, 2.0))
    counts = np.zeros(3)
    for step in range(500):
        counts += np.bincount(order.spans(step).source, minlength=3)
        ideal = np.array([0.5, 0.3, 0.2]) * (step + 1) * 10
        assert np.abs(counts - ideal).max() < 2


def test_mixture_is_exactly_once_in_each_source() -> None:
    order = make_order((30, 4, 64, 4), (90, 4, 16, 1), tokens=(3_000, 900), weights=(1.0, 1.0))
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(120):
        for source, epoch, position in tokens_of(order, step):
            seen.setdefault((source, epoch), []).append(position)
    assert {source for source, _ in seen} == {0, 1}
    for key, positions in seen.items():
        assert len(positions) == len(set(positions)), key


def test_a_source_without_weight_is_not_read() -> None:
    order = make_order((30, 4, 64, 4), tokens=(3_000, 10), weights=(1.0, 0.0))
    assert {int(s) for step in range(30) for s in order.spans(step).source} == {0}


def test_epochs_after_counts_passes() -> None:
    order = make_order((10, 4, 64, 4), tokens=(2_560 + 4,))
    assert order.epochs_after(0)[0] == pytest.approx(2_560 / 2_564)


def test_too_short_a_corpus_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"s0 has 60 training tokens.*68"):
        make_order((1, 1, 64, 4), tokens=(60,))
    with pytest.raises(DataError, match=r"s0 has 300 training tokens.*4,744"):
        make_order((1, 1, 60, 4), (1, 1, 316, 4), (1, 1, 79, 1), tokens=(300,))
    make_order((1, 1, 64, 4), tokens=(60, 68), weights=(0.0, 1.0))


def test_ten_trillion_tokens_cost_what_ten_thousand_do() -> None:
    """16,384 sequences a step, 10 T tokens, 10 million blocks: milliseconds, no arrays of rows."""
    order = make_order(
        (1_000_000, 2048, 65_536, 16),
        tokens=(10**13,),
        block_tokens=1_000_000,
        shuffle_tokens=1 << 28,
    )
    order.spans(0)
    start = time.perf_counter()
    spans = order.spans(70_000)
    order.linear(spans, spans.length)
    assert time.perf_counter() - start < 0.5
    assert len(set(spans.offset.tolist())) == 2048


def test_billions_of_short_windows_overflow_nothing() -> None:
    order = make_order(
        (2**40, 64, 64, 1), tokens=(2 * 10**12,), block_tokens=65_536, shuffle_tokens=4_096
    )
    for first in (0, 2**28, 488_000_000):
        offsets = order.spans(first, first + 60).offset
        assert offsets.min() >= 0 and len(np.unique(offsets)) == len(offsets)


def test_a_source_of_any_weight_is_read() -> None:
    tokens, weights = (10**9, 100), (float(10**9), 1.0)
    order = make_order((10**6, 16, 64, 4), tokens=tokens, weights=weights)
    assert 1 in order.spans(0, 10**6).source


GOLDEN_PERMUTATION = [2, 1, 9, 3, 8, 5, 6, 0, 4, 7]
GOLDEN_BIG = [2683656085552, 5810214385543, 9893776016464]
