"""The weights of a source: read whatever wrapped them, refused by name if they are not finite."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import DataError
from pipelines.tokenizer import load_tokenizer, text_vocabulary_size, train_tokenizer
from tests.models import VOCAB, section, tiny
from tst_ray.errors import ConfigError
from tst_ray.model import build_model
from tst_ray.model_config import (
    GENERATION,
    check_tokenizer_fits,
    generation_config,
    hf_config,
    model_fields,
)
from tst_ray.pretrained import load_pretrained

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def saved(folder: Path, family: str = "llama", **settings: Any) -> Any:
    """A tiny model in a folder, and the configuration to go on with it."""
    model = build_model(tiny(family, **settings), seed=3).hf_model
    model.save_pretrained(folder)
    return hf_config(section(source=str(folder), pretrained=True), vocab_size=None, eot_token=None)


def rewrite(folder: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    weights = dict(change(name, tensor.clone()) for name, tensor in load_file(path).items())
    save_file(weights, path, metadata={"format": "pt"})


def edit(path: Path, **fields: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.{name.replace('.0.', '.0._orig_mod.', 1)}",
        lambda name: name.replace(".1.", ".1._checkpoint_wrapped_module.", 1),
    ],
    ids=["compiled", "ddp", "both", "blocks", "checkpointed"],
)
def test_the_names_that_wrappers_give_are_read_through(
    tmp_path: Path, family: str, wrapped: Callable[[str], str]
) -> None:
    config = saved(tmp_path, family)
    plain = load_pretrained(config, str(tmp_path)).state_dict()
    rewrite(tmp_path, lambda name, tensor: (wrapped(name), tensor))
    again = load_pretrained(config, str(tmp_path)).state_dict()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], tensor) for name, tensor in again.items())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    config = saved(tmp_path)

    def spoilt(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name == "model.norm.weight":
            tensor[3] = value
        return name, tensor

    rewrite(tmp_path, spoilt)
    with pytest.raises(ConfigError, match=r"1 of its weights are not finite .*model\.norm\.weight"):
        build_model(config, pretrained=str(tmp_path))


# -- what a source says of its files -------------------------------------------------------------


def test_from_scratch_nothing_is_quantized_and_no_code_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", quantization_config=FP8, auto_map={"AutoConfig": "mine.C"})
    config = hf_config(section(source=str(tmp_path)), vocab_size=VOCAB, eot_token=0)
    assert not {"quantization_config", "auto_map"} & config.to_dict().keys()
    # nor in a run that was begun by an older version, which kept it
    kept = {**config.to_dict(), "dtype": "float32", "quantization_config": FP8}
    config = hf_config(section(source=str(tmp_path)), vocab_size=VOCAB, eot_token=0, kept=kept)
    assert "quantization_config" not in config.to_dict()


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", quantization_config=FP8)
    with pytest.raises(ConfigError, match=r"weights are quantized \(fp8\).*set model.pretrained=f"):
        model_fields(section(source=str(tmp_path), pretrained=True))


def test_the_sources_generation_config_is_kept_from_the_start(tmp_path: Path) -> None:
    saved(tmp_path)
    given = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    from_weights = section(source=str(tmp_path), pretrained=True)
    kept = model_fields(from_weights)
    assert kept[GENERATION] == given
    config = hf_config(from_weights, vocab_size=None, eot_token=None, kept=kept)
    assert GENERATION not in config.to_dict()
    (tmp_path / "generation_config.json").unlink()
    assert generation_config(from_weights, kept) == given
    assert generation_config(from_weights, None) is None
    from_scratch = section(source=str(tmp_path))
    assert generation_config(from_scratch, model_fields(from_scratch)) is None


# -- vocabulary --------------------------------------------------------------------------------


def test_a_special_token_beyond_the_table_is_in_no_text(tmp_path: Path) -> None:
    """As Gemma 3's <image_soft_token>."""
    tokenizer = train_tokenizer(["some words of text"], 260)
    size = len(tokenizer)
    saved(tmp_path, vocab_size=size)
    from_weights = section(source=str(tmp_path), pretrained=True)
    edit(tmp_path / "config.json", vocab_size=size)
    config = hf_config(from_weights, vocab_size=None, eot_token=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert (len(tokenizer), text_vocabulary_size(tokenizer)) == (size + 1, size)
    check_tokenizer_fits(from_weights, config, tokenizer)
    tokenizer.add_tokens(["a whole phrase"])
    told = rf"data\.tokenizer: .* {size + 2} different tokens, .* table of {size};"
    with pytest.raises(ConfigError, match=told):
        check_tokenizer_fits(from_weights, config, tokenizer)
    check_tokenizer_fits(section(source=str(tmp_path)), config, tokenizer)  # from scratch it grows


# -- code that comes with a model ----------------------------------------------------------------


def on_a_terminal(*command: str) -> tuple[int, str]:
    """The exit status and output of a command whose every stream is a terminal that says "y"."""
    own, its = pty.openpty()
    os.write(own, b"y\n")
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, close_fds=True)
    os.close(its)
    said = b""
    while True:
        try:
            piece = os.read(own, 4096)
        except OSError:  # all its ends are closed
            break
        if not piece:
            break
        said += piece
    os.close(own)
    return process.wait(), said.decode()


def test_no_question_is_asked_on_a_terminal_and_no_code_is_run(tmp_path: Path) -> None:
    mine = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit(tmp_path / "config.json", model_type="mine", auto_map=mine)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    command = "from tst_ray.cli import main; raise SystemExit(main())"
    status, said = on_a_terminal(
        sys.executable, "-c", command, "plan", f"--model={tmp_path}", "--data.sources=[x]"
    )
    assert status == 2, said
    told = " ".join(said.split())
    assert "needs code of its own (auto_map in config.json), which is not run here" in told
    assert "[y/N]" not in told
    assert not (tmp_path / "ran").exists()


def test_a_type_that_transformers_knows_is_read_without_the_code(tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path / "config.json", auto_map={"AutoConfig": "gone.C", "AutoModelForCausalLM": "g.M"})
    config = hf_config(section(source=str(tmp_path)), vocab_size=VOCAB, eot_token=0)
    assert config.model_type == "llama"
    build_model(config)


def test_a_tokenizer_that_needs_code_is_refused_in_a_line(tmp_path: Path) -> None:
    edit(
        tmp_path / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["code.T", None]},
    )
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(
        DataError, match=r"cannot be loaded \(it needs code of its own \(auto_map\)"
    ):
        load_tokenizer(str(tmp_path))
