"""A model folder's JSON files, as transformers 4 reads them: written, and read by one if there is.

TST_TRANSFORMERS_4 names a folder that `pip install --target` put transformers 4 into.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from pipelines.tokenizer import train_tokenizer
from tests.kinds import build_kind, tiny_kind
from tst_ray.export import _let_others_read
from tst_ray.exported import older_tokenizer, with_older_spellings, write_for_both

OLDER = os.environ.get("TST_TRANSFORMERS_4")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PROBES = ["hello world", "  a </s> b\n", "Ünïcode <|endoftext|> <extra>"]


def fields_of(kind: str, **changes: Any) -> dict[str, Any]:
    config = tiny_kind(kind, **changes)
    config.dtype = "float32"
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return fields


def test_rotary_positions_are_written_in_both_forms() -> None:
    plain = fields_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    both = with_older_spellings(plain)
    assert both["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert {name: both[name] for name in both.keys() - plain.keys()} == {
        "rope_theta": 5e5,
        "torch_dtype": "float32",
    }


def test_their_scaling_too() -> None:
    both = with_older_spellings(fields_of("llama", rope_parameters={**YARN, "rope_theta": 7e3}))
    assert both["rope_theta"] == 7e3
    assert both["rope_scaling"] == {**YARN, "type": "yarn"}


def test_kinds_of_layers_have_the_fields_that_their_class_had() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    both = with_older_spellings(fields_of("gemma3_text", rope_parameters=rope))
    assert (both["rope_theta"], both["rope_local_base_freq"]) == (3e6, 2e4)
    assert both["rope_scaling"] == {"rope_type": "linear", "factor": 8.0, "type": "linear"}
    assert "global_rope_theta" not in both  # another class's


@pytest.mark.parametrize(
    ("kind", "older"),
    [
        ("gpt_neox", {"rotary_emb_base": 1e4, "rotary_pct": 0.25}),
        ("phi3", {"rope_theta": 1e4, "partial_rotary_factor": 1.0}),
        ("modernbert-decoder", {"global_rope_theta": 16e4, "local_rope_theta": 1e4}),
        ("qwen3_moe", {"num_experts": 4, "rope_theta": 1e4}),
        ("granitemoehybrid", {"layer_types": ["mamba"] * 3 + ["attention"]}),
        ("gpt2", {}),
    ],
)
def test_each_class_has_spellings_of_its_own(kind: str, older: dict[str, Any]) -> None:
    layers = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    both = with_older_spellings(fields_of(kind, **(layers if "layer_types" in older else {})))
    assert {name: both.get(name) for name in older} == older


def test_an_infinity_that_is_a_default_is_not_written_as_only_version_5_reads_it() -> None:
    plain = fields_of("mamba2")
    assert {"__float__": "Infinity"} in plain["time_step_limit"]
    assert "time_step_limit" not in with_older_spellings(plain)
    own = fields_of("mamba2", time_step_limit=[0.5, float("inf")])
    assert with_older_spellings(own)["time_step_limit"] == own["time_step_limit"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "phi3", "mamba2", "gpt_oss"])
def test_version_5_reads_the_same(kind: str, tmp_path: Path) -> None:
    config = tiny_kind(kind)
    config.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path).to_dict()
    write_for_both(tmp_path, None)
    after = AutoConfig.from_pretrained(tmp_path).to_dict()
    if "type" in (after.get("rope_parameters") or {}):  # beside `rope_type`, as it was before
        assert after["rope_parameters"].pop("type") == after["rope_parameters"]["rope_type"]
    assert {name: after[name] for name in before} == before


def test_a_tokenizer_is_of_a_class_that_both_have() -> None:
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "auto_map": {}}
    assert older_tokenizer(new) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }
    known = {"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": {"image": "<a>"}}
    assert older_tokenizer(known) == known


def test_the_sources_generation_config_is_kept(tmp_path: Path) -> None:
    given = {"eos_token_id": [0, 7], "temperature": 0.6}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    tiny_kind("llama").save_pretrained(tmp_path)
    write_for_both(tmp_path, None)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 0}
    write_for_both(tmp_path, given)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == given


def test_others_may_read_a_folder_if_the_umask_lets_them(tmp_path: Path) -> None:
    """safetensors keeps the weights to their owner."""
    before = os.umask(0o022)
    try:
        (tmp_path / "config.json").write_text("{}")
    finally:
        os.umask(before)
    (tmp_path / "model.safetensors").touch(mode=0o600)
    _let_others_read(tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


# -- read by transformers 4 ----------------------------------------------------------------------

_READ = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in Path(sys.argv[1]).iterdir():
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(torch.arange(1, 21).reshape(1, 20), use_cache=False).logits
    torch.save(logits, folder / "older.pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found[folder.name] = [tokenizer(text)["input_ids"] for text in json.loads(sys.argv[2])]
print(json.dumps(found))
"""
READ_BY_BOTH = {
    "llama": {"rope_parameters": {**YARN, "rope_theta": 7e3}},
    "gemma3_text": {},
    "gpt_neox": {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.5}},
    "phi3": {"rope_parameters": {"rope_theta": 3e4}},
    "qwen3_moe": {"rope_parameters": {"rope_theta": 1e6}},
    "olmo3": {},
    "mamba2": {},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


@pytest.mark.skipif(not OLDER, reason="TST_TRANSFORMERS_4 names no transformers 4")
def test_transformers_4_computes_the_same(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(PROBES * 3, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    expected = {}
    for kind, changes in READ_BY_BOTH.items():
        torch.manual_seed(0)
        model = build_kind(kind, "cpu", **changes).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            expected[kind] = model(torch.arange(1, 21).reshape(1, 20), use_cache=False).logits
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        write_for_both(tmp_path / kind, None)
    older = subprocess.run(
        [sys.executable, "-c", _READ, str(tmp_path), json.dumps(PROBES)],
        env={**os.environ, "PYTHONPATH": str(OLDER)},
        capture_output=True,
        text=True,
    )
    assert older.returncode == 0, older.stderr
    ids = json.loads(older.stdout.splitlines()[-1])
    for kind, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / kind / "older.pt"), logits)
        now = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert ids[kind] == [now(text)["input_ids"] for text in PROBES]
