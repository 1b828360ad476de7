"""What a run is expected to do: time, passes over its text, and hints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus import Corpus, TextFile
from tests.tiny import make_config, make_corpus
from tst_ray.architecture import describe
from tst_ray.config import load_config
from tst_ray.corpus import build_order
from tst_ray.model_config import hf_config
from tst_ray.outlook import (
    at_start,
    core_flops_per_s,
    estimated_passes,
    hints,
    is_timed,
    overfit,
    passes,
    phase_seconds,
    rough_duration,
    shown_passes,
    text_bytes,
)
from tst_ray.plan import build_plan

README = [
    "--data.vocab_size=8000", "--train.steps=20000", "--train.sequence_length=256",
    "--model.config.hidden_size=384", "--model.config.intermediate_size=1024",
    "--model.config.num_hidden_layers=8", "--model.config.num_attention_heads=12",
    "--model.config.num_key_value_heads=4",
]  # fmt: skip


def shape_of(config: Any) -> Any:
    return describe(hf_config(config.model, vocab_size=config.data.vocab_size, eot_token=0))


def seconds(*overrides: str, cores: int = 2) -> float:
    """The training time of a config with cores of 100 GFLOP/s."""
    config = load_config(None, list(overrides))
    plan, shape = build_plan(config), shape_of(config)
    return sum(phase_seconds(config, shape, phase, cores, 1e11) for phase in plan.phases)


def test_times_are_within_a_factor_of_two_of_those_that_were_measured() -> None:
    """On two such cores: 20 hours for the first, 35 ms a step on one core for the second."""
    assert 10 < seconds(*README) / 3600 < 40
    demo = ["--cluster.backend=inline", "--train.threads=1", "--tst.ratio=0"]
    assert 0.5 < seconds(*demo) / (6000 * 0.035) < 2


def test_cores_that_train_are_those_of_the_workers() -> None:
    one, two = seconds("--cluster.workers=1"), seconds("--cluster.workers=2", "--tst.workers=2")
    overhead = 6000 * 0.003
    assert one - overhead == pytest.approx(2 * (two - overhead))
    assert seconds("--cluster.workers=[1,8]", "--tst.workers=[1,8]") == pytest.approx(two)
    inline = seconds("--cluster.backend=inline", cores=4)
    assert inline - overhead == pytest.approx((two - overhead) / 2)


def test_only_cpus_of_this_machine_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_timed(load_config(None))
    assert not is_timed(load_config(None, ["--cluster.gpus_per_worker=1"]))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert not is_timed(load_config(None))
    assert is_timed(load_config(None, ["--cluster.backend=inline"]))
    config = load_config(None)
    lines = at_start(config, build_plan(config), shape_of(config), {"text": 0.5})
    assert lines == ["passes over the text: 0.5"]


def test_a_core_is_measured() -> None:
    assert 1e8 < core_flops_per_s() < 1e13


def test_passes_are_those_of_the_order(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "corpus")
    config = make_config(tmp_path, manifest, train__steps=800)
    plan = build_plan(config)
    (count,) = passes(build_order(config, plan, manifest)).values()
    tokens = sum(source.train.tokens for source in manifest.sources)
    assert count == pytest.approx(plan.total_data_tokens / tokens, rel=0.1)


def test_before_there_are_tokens_passes_are_estimated_from_bytes() -> None:
    """The demo's text is 31.5 MB and 12.2M tokens, 2.58 bytes a token."""
    config = load_config(None)
    plan = build_plan(config)
    counts = estimated_passes(config, plan, 1024, {"python-stdlib": 31_512_079})
    assert counts["python-stdlib"] == pytest.approx(
        plan.total_data_tokens / (0.98 * 12_213_791), rel=0.05
    )
    sources = "--data.sources=[{path: a, weight: 3}, {path: b, weight: 1}]"
    counts = estimated_passes(load_config(None, [sources]), plan, 1024, {"a": 10**6, "b": 10**6})
    assert counts["a"] == pytest.approx(3 * counts["b"])
    both = estimated_passes(
        load_config(None, ["--data.sources=[a, b]"]), plan, 1024, {"a": 10**6, "b": 10**5}
    )
    assert both["a"] == pytest.approx(both["b"])


def test_a_compressed_file_holds_more_text_than_bytes() -> None:
    files = tuple(TextFile(name, 100, None) for name in ("a.txt", "b.jsonl.gz", "c.Parquet"))
    assert text_bytes(Corpus("web", "/", "text", files)) == 700


@pytest.mark.parametrize(
    "overrides, counts, hint",
    [
        (["--train.steps=1500"], {"web": 0.2}, "1,050 plain steps follow the bags"),
        (["--train.steps=6000"], {"web": 0.2}, None),
        (["--train.steps=1500", "--tst.ratio=0"], {"web": 0.2}, None),
        (["--phases=[{bag_size: 4, steps: 5000}]"], {"web": 0.2}, "0 plain steps follow"),
        ([], {"web": 4.0}, None),
        ([], {"web": 0.5, "notes": 57.1}, "57 passes over notes: more than 4 .*steps=420$"),
        (["--cluster.backend=inline", "--cluster.workers=2"], {}, "trains with one worker"),
        (["--cluster.backend=inline"], {}, None),
    ],
)
def test_hints(overrides: list[str], counts: dict[str, float], hint: str | None) -> None:
    import re

    config = load_config(None, overrides)
    found = hints(config, build_plan(config), counts)
    assert len(found) == (0 if hint is None else 1)
    if hint:
        assert re.search(hint, found[0]) and found[0].startswith("hint: ")


def test_a_run_is_told_to_overfit_only_where_it_read_its_text_often() -> None:
    assert overfit([2.5, 2.6], 6.51, {"a": 0.5, "b": 57.0})
    assert overfit([2.5, 2.6], 6.51, {"a": 3.9}) is None
    assert overfit([2.5, 2.6], 2.9, {"a": 57.0}) is None
    assert overfit([], 6.51, {"a": 57.0}) is None
    assert overfit([2.5], None, {"a": 57.0}) is None


def test_numbers_are_for_people() -> None:
    assert [rough_duration(s) for s in (0.2, 90, 250, 72_000, 400_000)] == [
        "1 seconds", "90 seconds", "4 minutes", "20 hours", "5 days",
    ]  # fmt: skip
    assert shown_passes({"a": 0.512, "b": 0.5123}) == "0.512"
    assert shown_passes({"a": 0.5, "b": 57.123}) == "a 0.5, b 57.1"


def test_more_experts_a_token_take_longer() -> None:
    config = load_config(None)
    plan, shape = build_plan(config), shape_of(config)
    double = replace(shape, active_parameters=2 * shape.active_parameters)
    phase = plan.phases[-1]
    assert phase_seconds(config, double, phase, 1, 1e11) > phase_seconds(
        config, shape, phase, 1, 1e11
    )


def test_bags_that_do_not_divide_each_other_are_told() -> None:
    counts = {"text": 1.0}

    def told(bags: list[int]) -> bool:
        phases = ", ".join(f"{{bag_size: {bag}, steps: 3000}}" for bag in bags)
        config = load_config(None, [f"--phases=[{phases}]", "--train.sequence_length=2048"])
        return any(
            "divide each other" in hint for hint in hints(config, build_plan(config), counts)
        )

    assert told([9, 7, 5, 4, 1])
    assert not told([8, 4, 2, 1]) and not told([6, 1]) and not told([1, 4])
