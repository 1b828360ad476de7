"""The models: phase two against plain transformers, phase one against its arithmetic, refusals.

Shape suffixes: n sequences, L latent positions, s places of a bag.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.models import FAMILIES, OPTIMIZER, VOCAB, a_phase, section, tiny
from tst_ray import chunked_loss
from tst_ray import model as model_module
from tst_ray.architecture import (
    check_supported,
    describe,
    experts,
    logit_scale,
    make_model,
)
from tst_ray.errors import ConfigError
from tst_ray.model import SuperpositionLM, build_model
from tst_ray.model_config import hf_config, ignored_fields
from tst_ray.optim import build_optimizer, clip_grad_norm, set_lr
from tst_ray.settings import read_shipped_model, shipped_models
from tst_ray.superposition import bag_weights, multi_hot_cross_entropy, multi_hot_cross_entropy_alt

B, L, S = 4, 6, 3


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def tokens_for(phase: Any, seed: int = 0) -> Tensor:
    n, length, s = phase.num_sequences, phase.latent_length, phase.bag_size
    if phase.mode == "output_only":
        return tokens(n, length + s, seed=seed)
    return tokens(n, length + 1, s, seed=seed) if s > 1 else tokens(n, length + 1, seed=seed)


def plain_hf(config: Any, seed: int) -> Any:
    """The model as anyone builds it with transformers."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- phase two is the plain path ---------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_phase_two_is_bit_equal_to_a_plain_loop(family: str, tied: bool) -> None:
    config = tiny(family, tie_word_embeddings=tied)
    phase = a_phase(bag_size=1, num_sequences=B, latent_length=L)
    ours = build_model(config, seed=7)
    optimizer = build_optimizer(ours, OPTIMIZER)

    theirs = plain_hf(config, seed=7)
    plain_optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(3):
        batch = tokens_for(phase, seed=step)
        set_lr(optimizer, 1e-2)
        out = ours(batch, phase)
        out.objective.backward()
        norm = clip_grad_norm(ours, 1.0)
        optimizer.step()
        optimizer.zero_grad()

        options = {"output_router_logits": True} if family == "qwen3_moe" else {}
        plain = theirs(
            input_ids=batch[:, :-1],
            labels=batch[:, :-1],
            shift_labels=batch[:, 1:].contiguous(),
            use_cache=False,
            **options,
        )
        plain.loss.backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain_optimizer.step()
        plain_optimizer.zero_grad()

        assert torch.equal(out.objective, plain.loss)
        assert torch.equal(norm, plain_norm)
        if family == "qwen3_moe":
            assert ours.has_router
            assert torch.equal(out.router_loss, plain.aux_loss)
            assert out.objective.item() > out.loss.item()
        else:
            assert torch.equal(out.loss, plain.loss)
            assert out.router_loss.item() == 0
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.hf_model.get_parameter(name), parameter), name


@pytest.mark.parametrize("logits_bytes", [10**9, 10], ids=["whole", "in chunks"])
def test_phase_two_runs_no_superposition_code(
    logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("superposition code ran")

    for name in ("embed_bags", "bag_weights", "linear_multi_hot_cross_entropy"):
        monkeypatch.setattr(model_module, name, forbidden)
    monkeypatch.setattr(model_module, "WHOLE_LOGITS_BYTES", logits_bytes)
    phase = a_phase(bag_size=1, num_sequences=B, latent_length=L)
    model = build_model(tiny("llama"), seed=0)
    model(tokens_for(phase), phase).objective.backward()
    with pytest.raises(AssertionError, match="superposition code ran"):
        bags = a_phase(bag_size=S, num_sequences=B, latent_length=L)
        model(tokens_for(bags), bags)


@pytest.mark.parametrize("bag_size", [1, S])
def test_no_forward_pass_looks_at_values(bag_size: int) -> None:
    """On a GPU each look would wait for all that is queued."""
    phase = a_phase(bag_size=bag_size, num_sequences=B, latent_length=L)
    model, looks = build_model(tiny("llama"), seed=0), []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "_local_scalar_dense" in str(op):
                looks.append(op)
            return op(*args, **kwargs or {})

    with Looks():
        model(tokens_for(phase), phase).objective.backward()
    assert looks == []


@pytest.mark.parametrize("bag_size", [1, S])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_large_logits_are_made_in_chunks(
    bag_size: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = a_phase(bag_size=bag_size, num_sequences=B, latent_length=L)
    batch = tokens_for(phase)
    model = SuperpositionLM(build_model(tiny("llama"), seed=0).hf_model, scale).double()
    sizes: list[int] = []
    softmax = chunked_loss._softmax

    def spied(logits: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(logits.numel())
        return softmax(logits, *args)

    monkeypatch.setattr(chunked_loss, "_softmax", spied)
    whole = model(batch, phase, num_real=B - 1).loss
    model(batch, phase, num_real=B - 1).objective.backward()
    expected = gradients(model)
    model.zero_grad()
    sizes.clear()
    monkeypatch.setattr(model_module, "WHOLE_LOGITS_BYTES", 10 * VOCAB * 4)
    pieces = model(batch, phase, num_real=B - 1)
    pieces.objective.backward()
    torch.testing.assert_close(pieces.loss, whole)
    torch.testing.assert_close(gradients(model), expected)
    assert sizes == [10 * VOCAB, 10 * VOCAB, 4 * VOCAB]


# -- phase one is the paper's arithmetic -------------------------------------------------------


def by_hand(model: SuperpositionLM, batch: Tensor, phase: Any) -> Tensor:
    """Phase one spelled out, in the dtype of the model: whole logits, no shortcuts."""
    hf_model, s = model.hf_model, phase.bag_size
    table = hf_model.get_input_embeddings().weight
    if phase.mode == "output_only":
        length = batch.shape[1] - s
        targets = torch.stack([batch[:, j + 1 : j + 1 + s] for j in range(length)], dim=1)
        embeds = table[batch[:, :length]]
    else:
        embeds, targets = table[batch[:, :-1]].mean(dim=2), batch[:, 1:]
        targets = targets[..., :1] if phase.mode == "input_only" else targets
    logits = hf_model(inputs_embeds=embeds, use_cache=False).logits
    labels = targets.flatten(0, 1)
    if phase.loss == "mce_alt":
        return multi_hot_cross_entropy_alt(logits.flatten(0, 1), labels)
    weights = bag_weights(phase.weighting, labels.shape[1], torch.float64)
    return multi_hot_cross_entropy(logits.flatten(0, 1), labels, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_phase_one_in_every_family(family: str) -> None:
    check_phase_one(tiny(family, router_aux_loss_coef=0.0), bag_size=S)


@pytest.mark.parametrize("mode", ["full", "input_only", "output_only"])
@pytest.mark.parametrize(
    ("loss", "weighting"), [("mce", "uniform"), ("mce", "power_law"), ("mce_alt", "uniform")]
)
def test_phase_one_in_every_mode(mode: str, loss: str, weighting: str) -> None:
    check_phase_one(tiny("llama"), bag_size=S, mode=mode, loss=loss, weighting=weighting)


def test_phase_one_with_tied_weights() -> None:
    check_phase_one(tiny("qwen3", tie_word_embeddings=True), bag_size=S)


def check_phase_one(config: Any, **settings: Any) -> None:
    phase = a_phase(num_sequences=B, latent_length=L, **settings)
    batch = tokens_for(phase)
    config._experts_implementation = "eager"  # the grouped one takes no float64
    model = build_model(config, seed=1).double()
    expected = by_hand(model, batch, phase)
    expected.backward()
    expected_grads = gradients(model)
    model.zero_grad()
    out = model(batch, phase)
    out.objective.backward()
    # rotary angles are float32 whatever the model, hence not 1e-12
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(model), expected_grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "exponential"])
def test_only_a_uniform_weighting_is_blind_to_order(weighting: str) -> None:
    phase = a_phase(bag_size=S, num_sequences=B, latent_length=L, weighting=weighting)
    model = build_model(tiny("llama"), seed=0)
    batch = tokens_for(phase)
    losses = [model(bags, phase).loss.item() for bags in (batch, batch.flip(2))]
    same = losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert same == (weighting == "uniform")


# -- shares of the global batch ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("settings", [{"bag_size": 1}, {"bag_size": S}], ids=["plain", "bags"])
def test_micro_batches_add_up_and_fillers_count_nothing(family: str, settings: Any) -> None:
    # without the router loss, which is not linear in the rows of one process's micro-batches
    config = tiny(family, router_aux_loss_coef=0.0)
    config._experts_implementation = "eager"  # the grouped one takes no float64
    phase = a_phase(num_sequences=B, latent_length=L, **settings)
    batch = tokens_for(phase)
    model = build_model(config, seed=0).double()
    whole = model(batch, phase)
    whole.objective.backward()
    expected = gradients(model)
    model.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for rows, num_real in ((slice(0, 3), 3), (slice(3, 4), None), (slice(0, 1), 0)):
        out = model(batch[rows], phase, num_real=num_real)
        out.objective.backward()
        total += out.loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-6, atol=1e-9)


def test_a_filler_next_to_real_rows_changes_no_bit() -> None:
    phase = a_phase(bag_size=S, num_sequences=B, latent_length=L)
    batch = tokens_for(phase)
    model = build_model(tiny("llama"), seed=0)
    for filler in (0, 1):
        padded = torch.cat([batch[:2], torch.full_like(batch[:1], filler)])
        out = model(padded, phase, num_real=2)
        torch.testing.assert_close(out.loss, model(batch[:2], phase).loss)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_router_loss_is_the_switch_transformers(family: str) -> None:
    """Of the routers' own logits: what transformers gives for them might be something else."""
    phase = a_phase(bag_size=1, num_sequences=B, latent_length=L)
    model = build_model(tiny(family), seed=0)
    num_experts, top_k = experts(model.hf_model.config)
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    logits: list[Tensor] = []
    for gate in gates:
        torch.nn.init.normal_(gate.weight)  # far from even
        gate.register_forward_pre_hook(
            lambda gate, args: logits.append(args[0].flatten(0, -2) @ gate.weight.T)
        )
    told = model(tokens_for(phase), phase).router_loss
    probs = torch.cat(logits).softmax(dim=-1)
    assert (len(gates), probs.shape) == (2, (2 * B * L, num_experts))
    sent = F.one_hot(probs.topk(top_k).indices, num_experts).sum(dim=1).float()
    torch.testing.assert_close(told, num_experts * torch.sum(sent.mean(dim=0) * probs.mean(dim=0)))


def test_the_router_loss_ignores_fillers() -> None:
    phase = a_phase(bag_size=1, num_sequences=B, latent_length=L)
    batch = tokens_for(phase)
    model = build_model(tiny("qwen3_moe"), seed=0)
    two = model(batch[:2], phase).router_loss
    padded = model(batch[:3], phase, num_real=2).router_loss
    torch.testing.assert_close(padded, two)
    nothing = model(batch[:1], phase, num_real=0)
    nothing.objective.backward()
    assert nothing.objective.item() == 0
    assert all(bool((g == 0).all()) for g in gradients(model).values())


def test_evaluation_is_the_plain_sum_without_dropout_or_gradient() -> None:
    config = tiny("gpt_neox", hidden_dropout=0.5)
    model = build_model(config, seed=0)
    batch = tokens(B, L + 1)
    first = model.next_token_loss(batch, num_real=3)
    assert model.training
    assert not first.requires_grad
    assert torch.equal(first, model.next_token_loss(batch, num_real=3))
    model.hf_model.eval()
    logits = model.hf_model(input_ids=batch[:3, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:3, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(first, expected.detach())


def test_a_padding_token_of_the_configuration_still_trains() -> None:
    config = tiny("llama")
    config.pad_token_id = 5
    model = build_model(config, seed=0)
    phase = a_phase(bag_size=1, num_sequences=1, latent_length=L)
    model(torch.full((1, L + 1), 5), phase).objective.backward()
    assert model.hf_model.get_input_embeddings().weight.grad[5].abs().sum() > 0


# -- building ----------------------------------------------------------------------------------


def test_weights_come_from_the_seed_alone() -> None:
    config = tiny("llama")
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (build_model(config, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), before)  # the caller's random numbers are untouched
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(*(m.hf_model.get_output_embeddings().weight for m in (first, other)))


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "falcon_h1"])
def test_a_checkpoint_loaded_over_no_weights_is_the_whole_model(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(family, tie_word_embeddings=family in ("llama", "gpt2"))
    made = build_model(config, seed=3)

    def forbidden(*args: Any) -> None:
        raise AssertionError("weights were made")

    monkeypatch.setattr(model_module, "_create", forbidden)
    bare = build_model(config, seed=3, weights=False)
    parameters, buffers = dict(made.named_parameters()), dict(made.named_buffers())
    assert [*dict(bare.named_parameters())] == [*parameters]
    for name, buffer in bare.named_buffers():
        assert torch.equal(buffer, buffers.pop(name)), name
    assert not buffers

    for parameter in bare.parameters():
        assert parameter.requires_grad
        torch.nn.init.constant_(parameter, torch.nan)
    set_model_state_dict(bare, get_model_state_dict(made))
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    for s in (S, 1) if family in FAMILIES else ():
        phase = a_phase(bag_size=s, num_sequences=B, latent_length=L)
        batch = tokens_for(phase)
        assert torch.equal(bare(batch, phase).objective, made(batch, phase).objective)


def test_what_is_tied_stays_tied_without_weights() -> None:
    model = SuperpositionLM(make_model(tiny("llama"), "cpu", weights=False))
    first, second = (layer.mlp for layer in model.hf_model.base_model.layers)
    second.up_proj.weight = first.up_proj.weight  # as Zamba shares whole blocks
    model_module._allocate(model, torch.device("cpu"))
    assert second.up_proj.weight is first.up_proj.weight
    assert second.down_proj.weight is not first.down_proj.weight
    tables = (model.hf_model.get_input_embeddings(), model.hf_model.get_output_embeddings())
    assert tables[0].weight is not tables[1].weight
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    config = tiny(family)
    results = []
    for activation_checkpointing in (False, True):
        model = build_model(config, seed=0, activation_checkpointing=activation_checkpointing)
        objectives = []
        for s in (S, 1):
            phase = a_phase(bag_size=s, num_sequences=B, latent_length=L)
            out = model(tokens_for(phase), phase)
            out.objective.backward()
            objectives.append(out.objective.detach())
        grads = [p.grad for p in model.parameters()]
        results.append((objectives, grads))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_it_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("llama")
    phases = [a_phase(bag_size=s, num_sequences=B, latent_length=L) for s in (S, 1)]
    monkeypatch.setattr(model_module, "WHOLE_LOGITS_BYTES", 10 * VOCAB * 4)
    plain, compiled = (build_model(config, seed=0, compile=compile) for compile in (False, True))
    for number, phase in enumerate(phases):
        batch = tokens_for(phase)
        losses = []
        for model in (plain, compiled):
            # the switch to the second phase compiles nothing
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                out = model(batch, phase)
                out.objective.backward()
            losses.append(out.loss)
        torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients(compiled), gradients(plain), rtol=1e-4, atol=1e-6)


def test_pretrained_weights_are_loaded(tmp_path: Path) -> None:
    config = tiny("qwen3")
    saved = build_model(config, seed=5).hf_model
    saved.save_pretrained(tmp_path)
    model_section = section(source=str(tmp_path), pretrained=True)
    loaded_config = hf_config(model_section, vocab_size=VOCAB - 3, eot_token=0)
    assert loaded_config.vocab_size == VOCAB
    loaded = build_model(loaded_config, pretrained=str(tmp_path), seed=0)
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.hf_model.state_dict()[name], value)

    tied = hf_config(
        section(source=str(tmp_path), pretrained=True, config={"tie_word_embeddings": True}),
        vocab_size=None,
        eot_token=None,
    )
    with pytest.raises(ConfigError, match="differ, but the configuration ties them"):
        build_model(tied, pretrained=str(tmp_path), seed=0)
    other = hf_config(
        section(source=str(tmp_path), pretrained=True, config={"intermediate_size": 20}),
        vocab_size=None,
        eot_token=None,
    )
    with pytest.raises(ConfigError, match="missing or of another shape"):
        build_model(other, pretrained=str(tmp_path), seed=0)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match="its weights do not load"):
        build_model(loaded_config, pretrained=str(tmp_path), seed=0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="its weights do not load"):
        build_model(loaded_config, pretrained=str(tmp_path), seed=0)


# -- configurations ----------------------------------------------------------------------------


def test_from_scratch_takes_the_tokenizers_vocabulary(tmp_path: Path) -> None:
    config = tiny("llama", vocab_size=9, eos_token_id=8, pad_token_id=8)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (VOCAB, 0, None)
    config.save_pretrained(tmp_path)
    source = section(source=str(tmp_path), config={"num_hidden_layers": 1})
    again = hf_config(source, vocab_size=None, eot_token=None)
    assert (again.vocab_size, again.num_hidden_layers, again.hidden_size) == (VOCAB, 1, 16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "model.config.model_type = 'lama': .*; did you mean llama"),
        ({"hidden_size": 16}, "model.config: has no model_type"),
        (
            {"model_type": "llama", "num_hiden_layers": 2},
            "model.config.num_hiden_layers: llama has no such field; did you mean num_hidden",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"factor": 2.0}, "rope_scaling": "linear"},
            "model.config.rope_scaling = linear: must be a mapping",
        ),
        ({"model_type": "t5"}, "model: t5 is an encoder-decoder"),
        ({"model_type": "vit"}, "model: transformers has no causal language model for vit"),
        ({"model_type": "llama", "hidden_size": "wide"}, "model.config: .*hidden_size"),
    ],
)
def test_configurations_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        hf_config(section(config=config), vocab_size=VOCAB, eot_token=0)
    assert "\n" not in str(refusal.value)


def test_a_source_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.source = '/no/such/folder': not a Hugging Face"):
        hf_config(section(source="/no/such/folder"), vocab_size=None, eot_token=None)


# -- what the losses would get wrong -----------------------------------------------------------


def test_an_older_spelling_that_is_misspelt_is_refused() -> None:
    given = section(config={"model_type": "llama", "rope_thta": 777.0})
    with pytest.raises(ConfigError, match=r"rope_thta: .*; did you mean rope_theta\?"):
        hf_config(given, vocab_size=None, eot_token=None)


def test_an_older_spelling_that_is_taken_up_is_not_called_ignored() -> None:
    taken = section(config={"model_type": "phi3", "partial_rotary_factor": 0.5, "rope_theta": 5e5})
    assert ignored_fields(taken) == []
    rope = hf_config(taken, vocab_size=None, eot_token=None).rope_parameters
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.5, 5e5)


def test_nothing_in_place_of_the_rotary_positions_takes_the_sources_away(tmp_path: Path) -> None:
    source = LlamaConfig(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}
    )
    source.save_pretrained(tmp_path)

    def rope(**changes: Any) -> Any:
        given = section(source=str(tmp_path), config=changes)
        return hf_config(given, vocab_size=None, eot_token=None).rope_parameters

    assert rope(rope_theta=None) == source.rope_parameters
    assert rope(rope_scaling=None) == {"rope_type": "default", "rope_theta": 777.0}
    assert rope(rope_parameters=None)["rope_type"] == "default"


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_models_fields_are_taken_as_given(name: str) -> None:
    changed = section(config={**read_shipped_model(name), "rope_theta": 777.0})
    config = hf_config(changed, vocab_size=None, eot_token=None)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 777.0}
    assert ignored_fields(changed) == []
    check_supported(config, latent_length=L)


@pytest.mark.parametrize(
    "family, field, value, means",
    [
        ("qwen3", "rope_theta", 777.0, "rope_theta"),
        ("gpt_neox", "rotary_emb_base", 777.0, "rope_theta"),
        ("gpt_neox", "rotary_pct", 0.5, "partial_rotary_factor"),
        ("phi", "partial_rotary_factor", 1.0, "partial_rotary_factor"),
        ("llama", "rope_scaling", {"type": "linear", "factor": 2.0}, "factor"),
        ("llama", "rope_parameters", {"factor": 2.0}, "factor"),
    ],
)
def test_older_spellings_change_a_source(
    tmp_path: Path, family: str, field: str, value: Any, means: str
) -> None:
    source = AutoConfig.for_model(family)
    source.rope_parameters["rope_theta"] = 5_000.0
    source.save_pretrained(tmp_path)
    changed = section(source=str(tmp_path), config={field: value})
    config = hf_config(changed, vocab_size=None, eot_token=None)
    value = value["factor"] if isinstance(value, dict) else value
    assert config.rope_parameters == {
        **source.rope_parameters,
        **({"rope_type": "linear", "type": "linear"} if field == "rope_scaling" else {}),
        means: value,
    }
    assert ignored_fields(changed) == []


def test_what_kinds_of_layers_have_of_their_own_is_set_for_each(tmp_path: Path) -> None:
    source = AutoConfig.for_model("gemma3_text")
    source.save_pretrained(tmp_path)

    def rope(**changes: Any) -> Any:
        given = section(source=str(tmp_path), config=changes)
        return hf_config(given, vocab_size=None, eot_token=None).rope_parameters

    with pytest.raises(ConfigError, match=r"attention each have a rope_theta .*; set 777\.0 there"):
        rope(rope_theta=777.0)
    changed = rope(rope_parameters={"full_attention": {"rope_theta": 777.0}})
    assert changed["full_attention"] == {
        **source.rope_parameters["full_attention"],
        "rope_theta": 777.0,
    }
    assert changed["sliding_attention"] == source.rope_parameters["sliding_attention"]


def test_what_a_configuration_makes_of_a_field_is_told() -> None:
    whole = {"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": False}
    assert ignored_fields(section(config=whole)) == [
        "model.config.sliding_window = 16: it is ignored; qwen3 makes it None"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bags_are_scaled_as_tokens_are(dtype: torch.dtype) -> None:
    """Gemma's factor is rounded to the weights' dtype; the root of 24 is no bfloat16."""
    model = build_model(tiny("gemma3_text", hidden_size=24), seed=0).to(dtype)
    # as under FSDP, which casts parameters alone
    model.hf_model.get_input_embeddings().embed_scale = torch.tensor(24**0.5)
    seen: list[Tensor] = []
    model.hf_model.base_model.layers[0].register_forward_pre_hook(
        lambda block, args: seen.append(args[0].detach())
    )
    batch = tokens(B, L)
    with torch.no_grad():
        model._hidden(batch, with_router=False)
        model._hidden(batch[..., None].expand(-1, -1, 4), with_router=False)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(
    ("family", "settings", "scale"),
    [
        ("llama", {}, 1.0),
        ("cohere", {"logit_scale": 0.25}, 0.25),
        ("granite", {"logits_scaling": 8.0, "embedding_multiplier": 3.0}, 0.125),
        ("gemma", {}, 1.0),
        ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.0}, 1.0),
        ("gemma2", {"final_logit_softcapping": None, "attention": "eager"}, 1.0),
    ],
)
def test_scales_are_honoured(family: str, settings: dict[str, Any], scale: float) -> None:
    config = tiny(family, **settings)
    config._experts_implementation = "eager"  # the grouped one takes no float64
    check_supported(config, latent_length=L)
    assert logit_scale(config) == scale
    phase = a_phase(bag_size=1, num_sequences=B, latent_length=L)
    batch = tokens_for(phase)
    model = build_model(config, seed=0).double()
    logits = model.hf_model(input_ids=batch[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(model(batch, phase).loss, expected.detach(), rtol=1e-6, atol=0)
    # a bag of the same token s times is that token
    bags = a_phase(bag_size=S, num_sequences=B, latent_length=L)
    repeated = batch[..., None].expand(-1, -1, S)
    torch.testing.assert_close(model(repeated, bags).loss, expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", {"final_logit_softcapping": 20.0}, "final_logit_softcapping = 20.0"),
        ("phi", {}, "PhiForCausalLM has a bias in its output layer"),
        ("falcon_h1", {"embedding_multiplier": 2.0}, "token ids and their embeddings differently"),
        ("llama", {"max_position_embeddings": L - 1}, f"max_position_embeddings = {L - 1}: short"),
        ("gpt2", {"n_positions": L - 1}, f"max_position_embeddings = {L - 1}: shorter"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    family: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        check_supported(tiny(family, **settings), latent_length=L)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_blocks_that_cannot_run_are_refused(family: str) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 3}
    with pytest.raises(
        ConfigError, match=f"^model.config: the blocks of {family} cannot run: .*key"
    ):
        check_supported(tiny(family, **sizes), latent_length=L)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no module named kernels"),
        RuntimeError("Expected x.is_cuda() to be true, but got false."),
        RuntimeError("Tensor on device meta has no size"),
    ],
    ids=["not there", "only on a GPU", "needs values"],
)
def test_a_kernel_that_only_workers_may_run_refuses_no_model(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lacks(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(LlamaMLP, "forward", lacks)
    check_supported(tiny("llama"), latent_length=L)


def test_an_attention_that_is_not_there_is_refused() -> None:
    config = hf_config(
        section(config={"model_type": "mpt", "n_layers": 2}), vocab_size=VOCAB, eot_token=0
    )
    with pytest.raises(ConfigError, match=r"model\.attention = 'sdpa': .*attention=eager"):
        describe(config)


# -- counting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_describe_counts_what_is_there(family: str, tied: bool) -> None:
    config = tiny(family, tie_word_embeddings=tied)
    shape = describe(config)
    model = plain_hf(config, seed=0)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.embedding_parameters == VOCAB * 16
    assert shape.tied_embeddings == tied
    assert (shape.num_layers, shape.num_heads, shape.head_dim) == (2, 2, 8)
    blocks = shape.parameters - shape.root_parameters
    assert 2 * shape.largest_block_parameters <= blocks < 2 * shape.largest_block_parameters + 64
    if family != "qwen3_moe":
        assert shape.active_parameters == shape.parameters
        return
    expert = 3 * 16 * config.moe_intermediate_size
    assert shape.parameters - shape.active_parameters == 2 * (4 - 2) * expert
    assert shape.intermediate_size == 2 * config.moe_intermediate_size
