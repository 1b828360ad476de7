"""A model section as transformers reads it."""

from typing import Any

import pytest

from tests.models import VOCAB, section, tiny
from tst_ray.architecture import check_supported
from tst_ray.errors import ConfigError
from tst_ray.model_config import hf_config

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
