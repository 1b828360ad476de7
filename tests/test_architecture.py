"""What is refused of a model before anything is tokenized, and what is not."""

import pytest

from tests.models import tiny
from tst_ray.architecture import check_supported
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
