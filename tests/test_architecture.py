"""What is refused of a model before anything is tokenized, and what is not."""

import pytest

from tests.models import tiny
from tst_ray.architecture import check_supported, describe
from tst_ray.errors import ConfigError

L = 6


# -- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flash_atention_2", "spda", "paged|eager"])
def test_an_attention_that_transformers_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.attention = .*: .* give one of eager, flash"):
        check_supported(tiny("llama", attention=name), latent_length=L)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2", "kernels-community/flash-attn2"])
def test_an_attention_that_workers_may_have_is_not(name: str) -> None:
    check_supported(tiny("llama", attention=name), latent_length=L)


# -- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "num_attention_heads"])
def test_there_is_one_of_each_at_least(name: str) -> None:
    config = tiny("qwen3", **{name: 0})
    with pytest.raises(ConfigError, match=rf"^model\.config\.{name} = 0: must be at least 1$"):
        check_supported(config, latent_length=L)


def test_of_what_layers_have_of_their_own_the_largest_is_told() -> None:
    config = tiny("gemma4_unified_text", global_head_dim=32)
    check_supported(config, latent_length=L)
    assert describe(config).head_dim == 32
