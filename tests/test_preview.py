"""The plan as people and programs read it: the paper's figures, without Ray or weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.order import ORDER_VERSION
from pipelines.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_size
from tests.tiny import MODEL, make_config, make_corpus
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.origins import find_origins
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
    offline = ["--data.tokenizer=train", "--data.vocab_size=128256"]  # Llama 3's
    facts = plan_facts(load_config(preset, offline))
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


def test_a_plan_without_any_setting_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    assert "settings   all are defaults\n" in capsys.readouterr().out


def test_a_plan_needs_no_ray() -> None:
    code = (
        "import sys\nfrom tst_ray.cli import main\n"
        "main(['plan', '--json', '--train.steps=100'])\n"
        "assert 'ray' not in sys.modules, 'ray was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def planned(*overrides: str) -> dict[str, Any]:
    return plan_facts(load_config(None, list(overrides)), find_origins(None, list(overrides)))


def test_what_a_run_is_refused_for_is_told_with_all_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there.txt").write_text("some text\n" * 100)
    there, gone, away = tmp_path / "there.txt", tmp_path / "gone", tmp_path / "away/*.txt"
    assert main(["plan", f"--data.sources=[{there}, {gone}, {away}]", "--train.steps=100"]) == 2
    captured = capsys.readouterr()
    assert f"data.sources = {gone}: not found" in captured.err and str(away) in captured.err
    assert "text       there: 1 files, 0.0 MB" in captured.out and "phase 2" in captured.out
    assert main(["plan", f"--data.prepared={gone}", "--train.steps=100"]) == 2
    assert str(gone) in capsys.readouterr().err
    assert main(["plan", f"--data.tokenizer={gone}", "--train.steps=100"]) == 2
    captured = capsys.readouterr()
    assert f"data.tokenizer = {gone}: cannot be loaded (no such folder)" in captured.err
    assert "the model's own: that of the tokenizer is not known" in captured.out


def test_a_tokenizer_that_is_there_gives_its_real_vocabulary(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["a text of few words"] * 9, 300), str(tmp_path / "tokenizer"))
    facts = planned(f"--data.tokenizer={tmp_path}/tokenizer", "--data.vocab_size=5000")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert facts["vocab_size"] == vocabulary_size(tokenizer) < 300
    assert facts["vocab_size_is_the_tokenizers"]
    assert not facts["problems"]


def test_a_tokenizer_beyond_a_pretrained_models_table_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tokenizer(train_tokenizer(["a text of few words"] * 9, 300), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "vocab_size": 200}))
    weights = [f"--model.source={tmp_path}", "--model.pretrained=true"]
    tokens = [f"--data.tokenizer={tmp_path}", "--train.sequence_length=16"]
    assert main(["plan", *weights, *tokens, "--train.steps=100"]) == 2
    assert "has a table of 200" in capsys.readouterr().err


def test_the_models_shape_is_told_and_where_each_field_is_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {config: {hidden_size: 64}}\ntrain: {steps: 1000}\n")
    heads = ["--model.config.num_attention_heads=4", "--model.config.num_key_value_heads=4"]
    assert main(["plan", "--config", str(file), *heads, "--data.vocab_size=500"]) == 0
    said = capsys.readouterr().out
    assert "2 layers of width 64, 4 heads of size 16 (4 for keys and values)" in said
    assert f"from {file}: hidden_size\n" in said
    assert "from command line: num_attention_heads, num_key_value_heads\n" in said
    assert "from hidden_size and num_attention_heads: head_dim\n" in said
    assert "from demo-0.4m (default): num_hidden_layers, intermediate_size" in said
    assert f"train.steps = 1000 ({file})" in said
    assert "data.vocab_size = 500 (command line)" in said
    assert "all others are defaults" in said


@pytest.mark.parametrize(
    "overrides, path, origin",
    [
        (["--model=paper-600m"], "model.source", "command line"),
        (["--tst={bag_size: 2}", "--tst.ratio=0.5"], "tst.bag_size", "command line"),
        (["--train.steps=5"], "train.batch_size", "default"),
    ],
)
def test_who_wrote_a_setting(overrides: list[str], path: str, origin: str) -> None:
    assert find_origins(None, overrides).of(path) == origin


def test_where_a_models_field_is_from() -> None:
    shipped = find_origins(None, ["--model=paper-600m"])
    assert shipped.of_model_field("head_dim") == "paper-600m (command line)"
    whole = find_origins(None, ["--model.config={model_type: llama, hidden_size: 64}"])
    assert whole.of_model_field("hidden_size") == "command line"
    assert whole.of_model_field("head_dim") == "default"


def test_time_and_passes_are_told_and_hints_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "text.txt").write_text("a line of text\n" * 10_000)
    assert main(["plan", f"--data.sources={tmp_path}", "--train.steps=1500"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^time       about \d+ (seconds|minutes|hours) of training here$", said, re.M)
    assert re.search(r"^passes     [\d.]+ \(estimated; exact once", said, re.M)
    assert "passes over" in said.partition("hint: ")[2]
    assert "plain steps follow" not in said  # more steps would be more passes
    assert main(["plan", "--train.steps=1500"]) == 0
    assert "plain steps follow the bags" in capsys.readouterr().out


def test_a_plan_beside_a_run_or_for_a_larger_machine_is_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = tmp_path / "demo"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps({"order": ORDER_VERSION}))
    (run / "config.yaml").write_text(load_config(None).to_yaml())
    facts = planned(f"--run.storage={tmp_path}", "--train.steps=9000", "--cluster.workers=16")
    refused = [hint for hint in facts["hints"] if hint.startswith("a run would be refused here: ")]
    assert "holds a run with another config" in refused[0]
    assert "cluster.workers = 16: needs 16 CPUs" in refused[1]
    assert not facts["problems"]
