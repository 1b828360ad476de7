"""The plan as people and programs read it: the paper's figures, without Ray or weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_config, make_corpus
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.preview import plan_facts, print_plan

# preset: parameters and active ones in billions, data tokens of phase one and of the run, as the
# paper has them (arXiv 2605.06546)
PAPER = {
    "paper-270m": (0.254, 0.254, 75e9, 105e9),
    "paper-600m": (0.561, 0.561, 75e9, 105e9),
    "paper-3b": (3.34, 3.34, 75e9, 105e9),
    "paper-10b-a1b": (9.60, 1.11, 1.68e12, 2.0e12),
}


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_runs(preset: str) -> None:
    parameters, active, phase_one, total = PAPER[preset]
    facts = plan_facts(load_config(preset, []))
    assert facts["parameters"] == pytest.approx(parameters * 1e9, rel=0.01)
    assert facts["active_parameters"] == pytest.approx(active * 1e9, rel=0.01)
    assert facts["phases"][0]["data_tokens"] == pytest.approx(phase_one, rel=0.01)
    assert facts["total_data_tokens"] == pytest.approx(total, rel=0.01)
    assert len({phase["flops_per_step"] for phase in facts["phases"]}) == 1
    assert facts["total_steps"] == sum(phase["steps"] for phase in facts["phases"])


def test_json_is_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", "--train.steps=100"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"parameters", "active_parameters", "total_data_tokens", "total_steps"} <= set(facts)
    for phase in facts["phases"]:
        assert {"bag_size", "steps", "data_tokens", "latent_tokens", "flops_per_step"} <= set(phase)


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--cluster.workers=[1,3]", "--train.steps=100"]) == 0
    said = capsys.readouterr().out
    for line in ("1 x 6 + 2 x 5 sequences", "418,272 parameters", "memory a worker"):
        assert line in said, line


def test_a_plan_tells_the_tokens_that_are_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A phase of next tokens, whose sequences are a quarter of those of the bags behind it."""
    phases = "[{bag_size: 1, steps: 3}, {bag_size: 4, steps: 5}]"
    config = make_config(tmp_path, make_corpus(tmp_path / "shards"), tst__bag_size=None,
                         tst__ratio=None, phases=phases)  # fmt: skip
    facts = plan_facts(config)
    assert [phase["dropped_tokens"]["s0"] for phase in facts["phases"]] == [8, 0]
    print_plan(facts)
    said = capsys.readouterr().out
    assert "dropped (incomplete last sequence), 8 when the phase ends" in said


def test_a_plan_needs_no_ray() -> None:
    code = (
        "import sys\nfrom tst_ray.cli import main\n"
        "main(['plan', '--json', '--train.steps=100'])\n"
        "assert 'ray' not in sys.modules, 'ray was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
