"""The benches, and what must not grow: ratios and counts that no machine changes.

Times belong into `tst-ray bench`; nothing here waits for a clock.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines.ingest import Feed, _block
from pipelines.order import Order, PhaseLayout, StreamSource
from tests.tiny import make_config, make_corpus, make_job
from tst_ray.bench import BENCHES, print_bench, run_bench
from tst_ray.bench.measure import Figure, PeakBytes, medians
from tst_ray.bench.model import _even_height
from tst_ray.cli import main
from tst_ray.model import build_model
from tst_ray.model_config import hf_config
from tst_ray.plan import build_plan
from tst_ray.superposition import (
    bag_weights,
    embed_bags,
    linear_multi_hot_cross_entropy,
    multi_hot_cross_entropy,
)

N, D, V = 64, 16, 512


# -- the bench command ----------------------------------------------------------------------------


def test_a_bench_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "checkpoint", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    values = {figure["what"]: figure["value"] for figure in facts["figures"]}
    assert 0 < values["5 MB: stall, background"] < values["5 MB: stall, foreground"]
    assert facts["torch"] and facts["date"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scale", "embed", "mfu"])
def test_short_benches_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_bench(name)
    assert all(figure["value"] >= 0 for figure in facts["figures"])
    print_bench(facts)
    assert f"date {facts['date']}" in capsys.readouterr().out


def test_every_bench_is_there() -> None:
    import importlib

    for name, module in BENCHES.items():
        assert callable(getattr(importlib.import_module(f"tst_ray.bench.{module}"), name))


def test_a_figure_knows_whether_it_was_reached() -> None:
    assert Figure("a", 1.0).reached is None
    assert Figure("a", 1.0, at_most=1.0).reached and not Figure("a", 1.1, at_most=1.0).reached
    assert Figure("a", 1.0, at_least=1.0).reached and not Figure("a", 0.9, at_least=1.0).reached


def test_what_is_measured_takes_turns() -> None:
    turns: list[str] = []
    medians({name: lambda name=name: turns.append(name) for name in "ab"}, repeats=2)  # type: ignore[misc]
    assert "".join(turns) == "ababab"


def test_peak_bytes_counts_what_lives_at_once() -> None:
    with PeakBytes() as one:
        for _ in range(3):
            torch.zeros(1000)
    with PeakBytes() as three:
        kept = [torch.zeros(1000) for _ in range(3)]
    assert (one.peak, three.peak) == (4000, 12_000) and kept


# -- ratios that hold anywhere --------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def hidden_and_weight() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()


def multi_hot(s: int) -> torch.Tensor:
    hidden, weight = hidden_and_weight()
    targets = torch.randint(V, (N, s))
    return linear_multi_hot_cross_entropy(hidden, weight, targets, bag_weights("uniform", s))


def peak_of(call: Any) -> int:
    with PeakBytes() as counted:
        call().backward()
    return counted.peak


def test_the_loss_of_any_bag_takes_the_memory_of_one_target() -> None:
    def one() -> torch.Tensor:
        hidden, weight = hidden_and_weight()
        return F.cross_entropy(hidden @ weight.T, torch.randint(V, (N,)))

    def loop() -> torch.Tensor:
        hidden, weight = hidden_and_weight()
        targets = torch.randint(V, (N, 16))
        return multi_hot_cross_entropy(hidden @ weight.T, targets, bag_weights("uniform", 16))

    for s in (4, 8, 16):
        assert peak_of(lambda s=s: multi_hot(s)) <= 1.05 * peak_of(one)
    assert peak_of(loop) > 3 * peak_of(lambda: multi_hot(16))


@pytest.mark.parametrize("s", [2, 16])
def test_a_bag_takes_as_many_operators_whatever_its_size(s: int) -> None:
    with Calls() as calls:
        multi_hot(s).backward()
    with Calls() as four:
        multi_hot(4).backward()
    assert calls.of == four.of
    assert calls.of["mm"] == 3, "logits, and the two gradients"


def test_the_logits_are_never_whole() -> None:
    hidden, weight = hidden_and_weight()
    targets = torch.randint(V, (N, 4))
    with PeakBytes() as counted:
        linear_multi_hot_cross_entropy(
            hidden, weight, targets, bag_weights("uniform", 4), chunk_rows=8
        ).backward()
    assert counted.peak < N * V * 4


def test_embedding_bags_is_one_gather() -> None:
    weight, tokens = torch.randn(V, D), torch.randint(V, (2, 8, 16))
    with Calls() as calls, PeakBytes() as counted:
        embed_bags(weight, tokens)
    assert sum(n for name, n in calls.of.items() if "embedding" in name) == 1
    assert counted.peak < 2 * 8 * 16 * D * 4, "no [..., s, d] copy"


def test_its_gradient_is_one_gather_too() -> None:
    weight, tokens = torch.randn(V, D).requires_grad_(), torch.randint(V, (2, 8, 16))
    mean = embed_bags(weight, tokens)
    with Calls() as calls, PeakBytes() as counted:
        mean.backward(torch.ones_like(mean))
    gathers = [name for name in calls.of if "embedding" in name]
    assert [calls.of[name] for name in gathers] == [1]
    assert "backward" not in gathers[0], "torch's own adds to a table of zeros"
    assert counted.peak < 1.5 * V * D * 4, "the table's gradient, and no copy of it"


def test_the_gradient_of_an_embedding_is_the_same_every_time() -> None:
    weight, tokens = torch.randn(V, D).requires_grad_(), torch.randint(V, (4, 64, 16))
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(3):
            weight.grad = None
            embed_bags(weight, tokens).pow(2).sum().backward()
            assert weight.grad is not None
            gradients.append(weight.grad.clone())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradients[0], other) for other in gradients)


# -- the data path --------------------------------------------------------------------------------


def feed_of(steps: int, num_sequences: int = 16, length: int = 64, bag: int = 4) -> Feed:
    source = StreamSource("s", 10**9, 1.0)
    layout = PhaseLayout(0, steps, num_sequences, length * bag, bag)
    order = Order((source,), (layout,), 65_536, 1 << 24, 0)
    return Feed("/nowhere", "/nowhere", "", order, 0, bag, "uint16")


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_few_tasks_of_ray_a_step(world_size: int) -> None:
    feed = feed_of(6000)
    tasks = len(feed.chunks(0, 6000, world_size)) * world_size
    assert tasks / 6000 <= world_size / 64


def test_few_bytes_of_a_token_go_through_the_object_store(tmp_path: Path) -> None:
    """Two bytes a token where the vocabulary fits into 16 bits, and little for each sequence."""
    manifest = make_corpus(tmp_path / "text")
    feed = make_job(make_config(tmp_path, manifest), manifest).feeds[1]
    first = feed.order.layouts[1].first_step
    rows = feed.rows(first, feed.last_step, 0, 1)["tokens"]
    block = _block(feed, first, feed.last_step, 0, 1)
    assert block.num_rows == len(rows) and rows.size > 0
    assert block.nbytes <= 2 * rows.size + 64 * len(rows)


@pytest.mark.parametrize("step", [10**6, 10**9])
def test_a_position_costs_the_same_anywhere(step: int) -> None:
    """No loop over steps or epochs."""
    assert calls_for(step) <= calls_for(1) + 100  # a walk of the permutation may be longer


def calls_for(step: int) -> int:
    """Function calls that it takes to answer a batch."""
    import cProfile
    import pstats

    order = feed_of(2 * 10**9).order
    order.spans(0)  # what is worked out once
    profile = cProfile.Profile()
    profile.enable()
    order.linear(order.spans(step), 64)
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_a_step_in_bags_takes_the_arithmetic_of_a_step(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "text")
    config = make_config(tmp_path, manifest)
    bags, tokens = build_plan(config).phases
    model = build_model(
        hf_config(config.model, vocab_size=manifest.vocab_size, eot_token=manifest.eot_token),
        seed=0,
    )
    flops = []
    for phase in (bags, tokens):
        shape = [phase.num_sequences, phase.latent_length + 1, phase.bag_size]
        batch = torch.zeros(shape[: 2 + (phase.bag_size > 1)], dtype=torch.int64)
        with FlopCounterMode(display=False) as counted:
            model(batch, phase).objective.backward()
        flops.append(counted.get_total_flops())
    assert bags.bag_size > 1 == tokens.bag_size
    assert flops[0] == flops[1] > 0


# -- the command line -----------------------------------------------------------------------------

_HEAVY = {"torch", "ray", "transformers", "pandas", "pyarrow", "rich"}


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tst_ray.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not _HEAVY & set(json.loads(done.stderr.replace("'", '"')))


def test_the_driver_gets_to_ray_without_torch() -> None:
    code = (
        "import sys; import tst_ray.coordinator, tst_ray.report, tst_ray.display\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_micro_batches_of_one_size() -> None:
    assert [_even_height(128, most) for most in (16, 15, 1, 0, -3)] == [16, 8, 1, 0, 0]
    assert _even_height(9, 4) == 3
