"""Hugging Face models by their configuration: made, checked and counted, without weights.

    check_supported   refuses, by name, what the two losses would compute wrongly
    describe          parameters and shapes, for the plan
    anatomy           where a model keeps its embedding, blocks and output layer

Training reaches into a model: it hands bags to the blocks in place of token embeddings, and takes
the hidden states before the output layer so that logits need not exist whole. Whether that gives
what the model itself computes is not taken on trust: `logit_scale` runs the model, with its blocks
taken out and a small vocabulary, both ways.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pipelines.errors import one_line
from tst_ray.errors import ConfigError
from tst_ray.estimates import ModelShape
from tst_ray.model_config import set_special_tokens
from tst_ray.settings import Config
from tst_ray.superposition import embed_bags
from tst_ray.trial import try_out

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_top_k")
_SOFT_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_CHECK_VOCABULARY = 64
_OF_SIZES = re.compile(r"\b(shapes?|sizes?|dimensions?|divi\w+|heads|mat1)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal language model.

    Attributes:
        base: token ids or input embeddings → hidden states after the final norm.
        embedding: the input table.
        blocks: the transformer blocks; assigning an item replaces a block.
        head: the output layer.
    """

    base: nn.Module
    embedding: nn.Embedding
    blocks: nn.ModuleList
    head: nn.Linear


# -- parts -------------------------------------------------------------------------------------


def make_model(config: Any, device: str, weights: bool = True) -> Any:
    """The model that a configuration describes, float32, with random weights.

    Args:
        device: `cpu`, or `meta` for shapes without storage.
        weights: False leaves the parameters on `meta`, whatever the device: what is left are the
            buffers, such as rotary frequencies, which are computed and in no checkpoint.

    Raises:
        ConfigError: the model's class refuses the configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device(device), nullcontext() if weights else _parameters_on_meta():
            return AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever a model class raises about its configuration
        if "attention implementation" in str(error) or isinstance(error, ImportError):
            raise ConfigError(
                f"model.attention = {config._attn_implementation!r}: not to be had for "
                f"{config.model_type} on this machine; set model.attention=eager"
            ) from error
        raise ConfigError(f"model.config: {one_line(error)}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let every parameter that a module takes lose its storage, before anything writes to it."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is may be tied: it stays one
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield


def outline(config: Any) -> Any:
    """The model on the meta device, whether or not this machine has its attention's kernels."""
    if config._attn_implementation not in ("eager", "sdpa"):
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # which every class has
    return make_model(config, "meta")


def anatomy(model: Any) -> Anatomy:
    """Find the parts of a causal language model.

    Raises:
        ConfigError: a part is missing or of a kind that training would compute wrongly.
    """
    name = type(model).__name__
    base, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if base is model or not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ConfigError(
            f"model: {name} has no plain embedding and output layer; give another model"
        )
    if type(embedding) is not nn.Embedding and not hasattr(embedding, "embed_scale"):
        raise ConfigError(
            f"model: {name} computes its embeddings in its own way ({type(embedding).__name__}), "
            "which bags of tokens would miss; give another model"
        )
    if head.bias is not None:
        raise ConfigError(
            f"model: {name} has a bias in its output layer, which the chunked loss does not "
            "compute; give another model"
        )
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return Anatomy(base, embedding, module, head)
    raise ConfigError(f"model: {name} keeps its blocks in no list; give another model")


def embedding_scale(embedding: nn.Module) -> Tensor | float:
    """What the embedding multiplies its table's rows with (Gemma: the root of the width)."""
    scale: Tensor | float = getattr(embedding, "embed_scale", 1.0)
    return scale


# -- counting ----------------------------------------------------------------------------------


def describe(config: Any) -> ModelShape:
    """The plain facts about a model, counted on the meta device.

    Of a mixture's experts, a token's share is `num_experts_per_tok` of `num_experts`.

    Raises:
        ConfigError: the model's class refuses the configuration.
    """
    model = outline(config)
    parts = anatomy(model)
    total = sum(p.numel() for p in model.parameters())
    num_experts, top_k = experts(config)
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = in_experts - in_experts * top_k // num_experts if num_experts else 0
    num_heads = int(_field(config, "num_attention_heads") or 0)
    head_dim = _field(config, "head_dim") or config.hidden_size // max(num_heads, 1)
    return ModelShape(
        parameters=total,
        active_parameters=total - idle,
        embedding_parameters=parts.embedding.weight.numel(),
        tied_embeddings=parts.embedding.weight is parts.head.weight,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=len(parts.blocks),
        num_heads=num_heads,
        num_kv_heads=int(_field(config, "num_key_value_heads") or num_heads),
        head_dim=int(head_dim) if num_heads else 0,
        intermediate_size=_intermediate_size(config, top_k),
        experts_per_token=top_k,
        has_head_norms=any("q_norm" in name for name, _ in model.named_parameters()),
        largest_block_parameters=max(
            sum(p.numel() for p in block.parameters()) for block in parts.blocks
        ),
    )


def experts(config: Any) -> tuple[int, int]:
    """(experts of a mixture, how many of them a token visits); (0, 0) where it is none."""
    return _first(config, _NUM_EXPERTS), _first(config, _TOP_K)


def _intermediate_size(config: Any, top_k: int) -> int:
    narrow = _field(config, "moe_intermediate_size")
    if narrow and top_k:
        shared = _field(config, "shared_expert_intermediate_size")
        shared = shared or narrow * int(_field(config, "n_shared_experts") or 0)
        return int(narrow) * top_k + int(shared)
    size = _field(config, "intermediate_size") or _field(config, "n_inner")
    return int(size or 4 * config.hidden_size) * max(top_k, 1)


def _first(config: Any, names: tuple[str, ...]) -> int:
    values = (_field(config, name) for name in names)
    return next((value for value in values if isinstance(value, int)), 0)


def _field(config: Any, name: str) -> Any:
    """A field of a configuration, None where it has none.

    Where layers have their own, which is refused as a whole, the largest; that is for estimates.
    """
    if not getattr(config, "is_heterogeneous", False):
        return getattr(config, name, None)
    values = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max((value for value in values if value is not None), default=None)


# -- checking ----------------------------------------------------------------------------------


def precision_to_try(config: Config) -> str:
    """The precision that a run's model is tried in, without a GPU.

    For workers with GPUs it is float32: a model's own kernels for them may do in bfloat16 what
    torch's do not, and none is where it is tried.
    """
    return "float32" if config.cluster.gpus_per_worker else config.train.precision


def check_supported(config: Any, *, latent_length: int, precision: str = "float32") -> None:
    """Refuse, by name, a model that training would compute wrongly or not at all.

    Args:
        latent_length: positions of the longest sequence that the model sees: that of evaluation,
            which no phase's are longer than.
        precision: `float32` or `bfloat16`, as it trains.

    Raises:
        ConfigError: with the field, its value and what would do.
    """
    for name in _SIZES:
        size = _field(config, name)
        if isinstance(size, int) and size < 1:
            raise ConfigError(f"model.config.{name} = {size}: must be at least 1")
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit < latent_length:
        raise ConfigError(
            f"model.config.max_position_embeddings = {limit}: shorter than "
            f"train.sequence_length = {latent_length}; raise the one or lower the other"
        )
    _check_attention(config)
    logit_scale(config)
    _check_blocks(config, precision)


def _check_attention(config: Any) -> None:
    """Refuse an attention that transformers does not know, which else only the workers would."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS if "|" not in key)]
    if name not in known and "/" not in name:
        raise ConfigError(
            f"model.attention = {name!r}: transformers does not know it; give one of "
            f"{', '.join(sorted(known))}, or a kernel of the Hub as owner/name"
        )


def _check_blocks(config: Any, precision: str) -> None:
    """Refuse a model that cannot run, or not as it is trained, found without storage.

    What else keeps it from running so may not keep it from training: values, of which there are
    none; a kernel that this machine lacks, or one that takes only what is on a GPU.

    Raises:
        ConfigError: sizes do not go together, or it needs token ids, or cannot run in the
            precision; with what torch says of it.
    """
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"  # the grouped one refuses float32 without storage
    parts, kind = anatomy(outline(config)), config.model_type

    def problem(dtype: torch.dtype, by_ids: bool) -> str | None:
        error = try_out(
            parts.base, parts.embedding, parts.blocks, parts.head, dtype=dtype, by_ids=by_ids
        )
        return None if error is None else one_line(error)

    if why := problem(torch.float32, by_ids=True):
        if "meta" in why.lower() or not _OF_SIZES.search(why):
            return
        raise ConfigError(
            f"model.config: the blocks of {kind} cannot run: {why}; give sizes that go together"
        )
    # what went through once, goes through but for the one thing that is another
    why = problem(torch.float32, by_ids=False)
    if why and "meta" not in why.lower():
        raise ConfigError(
            f"model: {kind} needs token ids, which bags of tokens have none of ({why}); give "
            "another model"
        )
    why = problem(torch.bfloat16, by_ids=False) if precision == "bfloat16" else None
    if why and "meta" not in why.lower():
        raise ConfigError(
            f"train.precision = bfloat16: {kind} cannot run in it ({why}); set "
            "train.precision=float32, or give another model"
        )


@torch.no_grad()
def logit_scale(config: Any) -> float:
    """What the model multiplies `head(hidden states)` with to get its logits; mostly 1.

    Found by running the model itself, without its blocks, against the paths that training takes.

    Raises:
        ConfigError: the model gets its logits or embeddings in a way that no factor explains.
    """
    model, parts = _blockless(config)
    tokens = torch.arange(1, 9).reshape(2, 4)
    table, factor = parts.embedding.weight, embedding_scale(parts.embedding)
    bags = embed_bags(table, tokens[..., None]) * factor
    # of two tokens, the embedding of none: some models look for the token that one belongs to
    mixed = embed_bags(table, torch.stack([tokens, tokens.flip(1)], dim=-1)) * factor
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
        from_tokens = _stations(parts.base, input_ids=tokens)
        from_bags = _stations(parts.base, inputs_embeds=bags)
        parts.base(inputs_embeds=mixed, use_cache=False)
    except Exception as error:  # whatever a model class raises about what it is called with
        reason = "takes no inputs_embeds" if "inputs_embeds" in str(error) else one_line(error)
        raise ConfigError(
            f"model: {type(model).__name__} cannot be trained here ({reason}); give another model"
        ) from error
    if len(from_bags) != len(from_tokens) or not all(map(_close, from_bags, from_tokens)):
        raise ConfigError(
            f"model: {type(model).__name__} treats token ids and their embeddings differently (it "
            "scales or adds to them), which bags of tokens would miss; give another model"
        )
    for scale in _scales(model, config):
        if _close(parts.head(from_tokens[-1]) * scale, logits):
            return scale
    for name in _SOFT_CAPS:
        if getattr(config, name, None):
            raise ConfigError(
                f"model.config.{name} = {getattr(config, name)}: the chunked loss does not cap "
                "logits; set it to null, or give another model"
            )
    raise ConfigError(
        f"model: {type(model).__name__} computes its logits from the hidden states in its own way, "
        "which the chunked loss would miss; give another model"
    )


def _blockless(config: Any) -> tuple[Any, Anatomy]:
    """A real, small model: the configuration's without blocks, with a few tokens and big weights.

    Big weights, so that a soft cap or a scale shows.
    """
    config = copy.deepcopy(config)
    config.vocab_size = _CHECK_VOCABULARY
    if hasattr(config, "vocab_size_per_layer_input"):  # of another table, as large
        config.vocab_size_per_layer_input = _CHECK_VOCABULARY
    set_special_tokens(config, None)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # without blocks there are none
    config._attn_implementation = "eager"  # there is no attention left, and this one always exists
    model = make_model(config, "meta")
    parts = anatomy(model)
    del parts.blocks[:]
    with seeded(0):
        model = model.to_empty(device="cpu")
        model.init_weights()
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -3, 3)
    return model.eval(), parts


def _stations(base: nn.Module, **inputs: Tensor) -> list[Tensor]:
    """What each module of `base` is given, in order, and the last hidden states.

    The last alone would not do: a norm before them hides a factor.
    """
    stations: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            stations.append(args[0])

    hooks = [m.register_forward_pre_hook(note) for m in base.modules() if m is not base]
    stations.append(base(**inputs, use_cache=False).last_hidden_state)
    for hook in hooks:
        hook.remove()
    return stations


def _scales(model: Any, config: Any) -> Iterator[float]:
    """The factors that models are known to put on their logits (Cohere, Granite, Falcon-H1, …)."""
    yield 1.0
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, name, None) or getattr(model, name, None)
        if isinstance(value, int | float) and value:
            yield float(value)
            yield 1 / float(value)


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, and the caller's own untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
