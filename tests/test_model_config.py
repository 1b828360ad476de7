"""A model section as transformers reads it."""

from pathlib import Path
from typing import Any

import pytest

from tests.models import VOCAB, section, tiny
from tests.test_bad_input import arguments
from tests.test_runs import write_text
from tests.tiny import make_config, make_corpus
from tst_ray.architecture import check_supported
from tst_ray.cli import main
from tst_ray.config import load_config
from tst_ray.corpus import _ignored
from tst_ray.errors import ConfigError
from tst_ray.model import build_model
from tst_ray.model_config import hf_config, ignored_fields, ignored_vocabulary

L = 6


@pytest.mark.parametrize("eot_token", [3, None])
def test_a_class_that_insists_on_special_tokens_gets_the_end_of_text(eot_token: int | None) -> None:
    """cwm on one that begins a text, modernbert-decoder on one to pad with."""
    cwm = section(config={"model_type": "cwm"})
    config = hf_config(cwm, vocab_size=VOCAB, eot_token=eot_token)
    first = eot_token or 0
    tokens = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert tokens == (first, eot_token, None)
    bert = section(config={"model_type": "modernbert-decoder"})
    assert hf_config(bert, vocab_size=VOCAB, eot_token=eot_token).pad_token_id == first
    check_supported(tiny("cwm"), latent_length=L)


@pytest.mark.parametrize("model_type", [["llama"], {}, 3, None])
def test_what_is_no_name_of_a_model_is_refused(model_type: Any) -> None:
    given = section(config={"model_type": model_type})
    with pytest.raises(ConfigError, match=r"model_type = .*: transformers does not know it$"):
        hf_config(given, vocab_size=None, eot_token=None)


def test_a_model_whose_own_defaults_are_refused_is_refused_in_a_line() -> None:
    given = section(config={"model_type": "gemma4_assistant"})
    with pytest.raises(ConfigError, match=r"^model\.config: .*must be 0"):
        hf_config(given, vocab_size=None, eot_token=None)


# -- what is not taken as given ----------------------------------------------------------------


def test_no_router_loss_where_the_user_says_so(tmp_path: Path) -> None:
    """In a source it is transformers' own default, and says nothing."""
    no = {"output_router_logits": False}
    assert not build_model(tiny("mixtral", **no), seed=0).has_router
    config = tiny("mixtral")
    assert build_model(config, seed=0).has_router
    assert config.output_router_logits is False
    config.save_pretrained(tmp_path)
    again = hf_config(section(source=str(tmp_path)), vocab_size=VOCAB, eot_token=0)
    assert again.router_aux_loss_coef == 0.01
    assert ignored_fields(section(config={"model_type": "mixtral", **no})) == []
    both = {"model_type": "mixtral", "router_aux_loss_coef": 0.02, **no}
    assert ignored_fields(section(config=both)) == [
        "model.config.router_aux_loss_coef = 0.02: it is ignored; output_router_logits is false"
    ]


def test_another_vocabulary_than_the_tokenizers_is_told() -> None:
    config = {"model_type": "llama", "vocab_size": 32_000}
    assert ignored_vocabulary(section(config=config), 8_192) == [
        "model.config.vocab_size = 32000: it is ignored; the model gets the tokenizer's 8192 tokens"
    ]
    assert ignored_vocabulary(section(config=config), 32_000) == []
    assert ignored_vocabulary(section(config={}), 8_192) == []
    assert ignored_vocabulary(section(config=config, pretrained=True, source="x"), 8_192) == []


def test_what_a_shipped_model_says_is_not_the_users() -> None:
    demo = load_config(None).model
    assert ignored_vocabulary(demo, 2_000) == []
    assert ignored_vocabulary(load_config(None, ["--model=paper-270m"]).model, 2_000) == []
    changed = load_config(None, ["--model.config.hidden_size=64"]).model
    assert ignored_vocabulary(changed, 2_000) == []
    own = load_config(None, ["--model.config.vocab_size=512"]).model
    assert "vocab_size = 512: it is ignored" in ignored_vocabulary(own, 2_000)[0]
    no_loss = ["--model=paper-10b-a1b", "--model.config.output_router_logits=false"]
    assert ignored_fields(load_config(None, no_loss).model) == []


def test_what_a_shipped_configuration_says_of_prepared_text_is_not_the_users(
    tmp_path: Path,
) -> None:
    manifest = make_corpus(tmp_path / "shards")
    shares = {"0.0001": 0, "0.3": 1}  # the papers' configurations have the first
    for share, told in shares.items():
        config = make_config(tmp_path, manifest, data__validation_share=share)
        assert len(_ignored(config, manifest)) == told


def test_a_run_tells_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    args = arguments(tmp_path, write_text(tmp_path / "text"))
    assert main(["run", *args, "--model.config.vocab_size=32000"]) == 0
    assert "vocab_size = 32000: it is ignored" in " ".join(capfd.readouterr().out.split())
