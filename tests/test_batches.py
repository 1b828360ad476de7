"""Held-out text: the same sequences at every world size, in batches no larger than a step's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.manifest import Manifest, Source, Split
from pipelines.shards import Held, ShardWriter, TokenReader
from tests.corpora import write_corpus
from tests.tiny import make_config
from tst_ray import batches
from tst_ray.batches import Validation, start_within_document
from tst_ray.corpus import _unevaluated
from tst_ray.plan import build_plan


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two sources with 400 held-out tokens each, none of which ends a text."""
    made = write_corpus(tmp_path_factory.mktemp("shards"), 3_000, 1_000)
    return replace(made, eot_token=97)


def load(tmp_path: Path, manifest: Manifest, world_size: int, **overrides: int) -> list[Validation]:
    config = make_config(tmp_path, manifest, metrics__val_sequences=24, **overrides)
    plan = build_plan(config)
    return [Validation.load(config, plan, manifest, r, world_size) for r in range(world_size)]


def real_rows(ranks: list[Validation]) -> np.ndarray:
    return np.concatenate(
        [tokens[:real].numpy() for rank in ranks for tokens, real in rank.micro_batches]
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 30])
def test_the_same_sequences_at_every_world_size(
    tmp_path: Path, manifest: Manifest, world_size: int
) -> None:
    ranks = load(tmp_path, manifest, world_size)
    assert np.array_equal(real_rows(ranks), real_rows(load(tmp_path, manifest, 1)))
    assert {rank.num_targets for rank in ranks} == {24 * 8}
    assert len({len(rank.micro_batches) for rank in ranks}) == 1


def test_sources_are_read_with_few_files_open_however_many_they_are(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Held] = []
    monkeypatch.setattr(batches, "Held", lambda: made.append(Held()) or made[-1])
    assert len(real_rows(load(tmp_path, manifest, 1))) == 24
    (held,) = made
    assert {str(key[1]).partition("/")[0] for key in held.files} == {"s0", "s1"}


def test_they_are_spread_over_each_source(tmp_path: Path, manifest: Manifest) -> None:
    rows = real_rows(load(tmp_path, manifest, 1))
    held_out = [TokenReader(manifest, name, "validation").read(0, 400) for name in ("s0", "s1")]
    expected = [source[n * 44 // 12 * 9 :][:9] for source in held_out for n in range(12)]
    assert np.array_equal(rows, np.stack(expected))


def test_an_evaluation_takes_no_more_rows_at_once_than_a_step_or_than_are_few(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without micro-batches: 5 sequences a step, of which each of two ranks has 3 at most."""
    assert len(load(tmp_path, manifest, 1)[0].micro_batches) == 1  # they are few
    monkeypatch.setattr(batches, "FEW_POSITIONS", 16)
    for world_size, most in ((1, 5), (2, 3), (5, 2)):
        for rank in load(tmp_path, manifest, world_size):
            assert max(len(tokens) for tokens, _ in rank.micro_batches) <= most
    (alone,) = load(tmp_path, manifest, 1, train__micro_batch_size=2)
    assert max(len(tokens) for tokens, _ in alone.micro_batches) == 2


def test_held_out_text_that_is_no_sequence_is_told(tmp_path: Path, manifest: Manifest) -> None:
    """There would be no validation loss, and nobody knew why."""

    def told(length: int, manifest: Manifest = manifest) -> str | None:
        config = make_config(tmp_path, manifest, train__sequence_length=length)
        return _unevaluated(config, manifest)

    assert told(399) is None
    assert (told(400) or "").startswith("there is no validation loss: fewer than 401 tokens")
    first, second = manifest.sources
    one = replace(manifest, sources=(first, replace(second, validation=Split.of(()))))
    assert (told(399, one) or "").startswith("the validation loss leaves out s1: fewer than 400")


def test_a_held_out_sequence_stays_in_its_document_if_that_is_long_enough(tmp_path: Path) -> None:
    """Documents of 30, 10 and 30 tokens; sequences of 12."""
    writer = ShardWriter(str(tmp_path), "s/validation", dtype="uint16", row_tokens=16)
    writer.add(np.array([*range(1, 30), 0, *range(1, 10), 0, *range(1, 30), 0]))
    split = Split.of(writer.close())
    source = Source("s", "made", 3, 70, 0, (), split, split)
    reader = TokenReader(Manifest(str(tmp_path), "uint16", 16, 97, 0, "", (source,)), "s")
    starts = {place: start_within_document(reader, place, 12, 0) for place in range(59)}
    assert all(starts[place] == place for place in (0, 18, 40, 58))
    assert [starts[place] for place in (19, 25, 29)] == [18, 18, 18]  # back from the first's end
    assert all(starts[place] == place for place in range(30, 40))  # the second is too short
