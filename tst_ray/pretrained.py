"""The weights of a Hugging Face folder or id, to go on training from: read, and refused by name."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.errors import one_line
from tst_ray.architecture import anatomy
from tst_ray.errors import ConfigError

_WRAPPERS = {
    r"_orig_mod\.": "",
    r"_orig_mod[.]": "",  # a compiled block of a compiled model: one is removed at a time
    r"_checkpoint_wrapped_module\.": "",
    r"_fsdp_wrapped_module\.": "",
    r"^module\.": "",
}
"""What torch's wrappers (compile, checkpointing, FSDP, DDP) put into the names of weights."""


def load_pretrained(config: Any, source: str) -> Any:
    """The whole model on the CPU, float32, with the source's weights.

    Raises:
        ConfigError: they do not load, are not all there, or are no numbers.
    """
    from transformers import AutoModelForCausalLM

    where = f"model.source = {source!r}"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            key_mapping=_WRAPPERS,
        )
    except Exception as error:  # safetensors' own is none of Python's
        raise ConfigError(f"{where}: its weights do not load: {one_line(error)}") from error
    parts = anatomy(model)
    if config.tie_word_embeddings and parts.head.weight is not parts.embedding.weight:
        # transformers lets the file win, and a resume, which has none, the configuration
        raise ConfigError(
            f"{where}: its input and output embeddings differ, but the configuration ties them; "
            "set model.config.tie_word_embeddings=false"
        )
    absent = sorted(info["missing_keys"]) + [str(key[0]) for key in info["mismatched_keys"]]
    if absent:
        raise ConfigError(
            f"{where}: {len(absent)} of the model's weights are missing or of another shape there, "
            f"{absent[0]} the first; remove the changes in model.config"
        )
    if broken := not_finite(model):
        raise ConfigError(
            f"{where}: {len(broken)} of its weights are not finite (NaN or infinite), "
            f"{broken[0]} the first; give a folder whose weights are whole"
        )
    return model


def not_finite(model: Any) -> list[str]:
    """Names of the parameters that hold a value that is no finite number."""
    return [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
