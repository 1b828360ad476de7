"""A Hugging Face causal language model that trains on bags of tokens or on tokens.

    build_model        the same weights at every world size, sharded with FSDP2
    SuperpositionLM    tokens → loss, in either phase

`build_model` is collective: every rank calls it.

`SuperpositionLM.forward(tokens, phase, *, num_real)` returns StepLoss(objective, loss,
router_loss), three float32 scalars. `tokens` is int64
    [n, L + 1, s]   bags in: bag j is the input of position j, bag j + 1 its target
    [n, L + s]      tokens in, bags out (`output_only`): position j predicts the s tokens after it
    [n, L + 1]      bag_size 1: plain next-token prediction; no superposition code runs
and rows from `num_real` on are fillers: the passes happen, and they count exactly 0. `loss` is the
sum over this micro-batch's targets divided by the targets of the *global* batch, so that summing it
over micro-batches and ranks gives the mean, and summing gradients likewise. Call `.backward()` on
`objective`, which is `loss` with a mixture's router loss; the other two are detached.

Everything goes through `forward`, where FSDP gathers the root's parameters: the embedding, the
final norm and the output layer are one group, which tied weights need.

Shape suffixes: n sequences, L latent positions, s places of a bag, V vocabulary, d width,
N = n·L, E experts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from tst_ray.architecture import (
    anatomy,
    embedding_scale,
    experts,
    logit_scale,
    make_model,
    seeded,
)
from tst_ray.chunked_loss import chunked_cross_entropy, rows_within
from tst_ray.errors import ConfigError
from tst_ray.estimates import WHOLE_LOGITS_BYTES
from tst_ray.plan import Phase
from tst_ray.pretrained import load_pretrained
from tst_ray.router import balance_weight
from tst_ray.superposition import bag_weights, embed_bags, linear_multi_hot_cross_entropy
from tst_ray.trial import one_text_a_row

IGNORE = -100  # the label of what does not count

# Below this, one FSDP group holds the whole model: gathering it costs less than a group's latency.
# 0.4M parameters, 2 CPU ranks over gloo: 29 ms a step in one group, 42 ms in a group a block.
_ONE_GROUP_BYTES = 32 << 20


class StepLoss(NamedTuple):
    """What a forward pass gives; a tuple, so that FSDP finds the tensor that starts backward."""

    objective: Tensor
    loss: Tensor
    router_loss: Tensor


class SuperpositionLM(nn.Module):
    """A causal language model with the losses of both phases; see the module's docstring.

    Args:
        hf_model: the transformers model.
        scale: what its logits are multiplied with (`architecture.logit_scale`).
        compile: whether the softmax of a chunked loss is compiled.
        reshard: whether FSDP gives gathered weights back between a step's micro-batches.

    Attributes:
        hf_model: the same; `hf_model.save_pretrained` writes it for anyone.
        has_router: whether it is a mixture whose router loss is trained on.
    """

    def __init__(
        self, hf_model: Any, scale: float = 1.0, compile: bool = False, reshard: bool = True
    ) -> None:
        super().__init__()
        self.hf_model = hf_model
        self._scale, self._compile, self._reshard = scale, compile, reshard
        self._num_experts, self._top_k = experts(hf_model.config)
        self._router_weight = balance_weight(hf_model)
        self.has_router = self._num_experts > 0 and self._router_weight > 0
        # every token of a batch is text: none is padding, whose embedding would not train
        anatomy(hf_model).embedding.padding_idx = None

    # -- forward ---------------------------------------------------------------------------------

    def forward(
        self, tokens: Tensor, phase: Phase | None, *, num_real: int | None = None
    ) -> StepLoss:
        """The loss of one micro-batch.

        Args:
            tokens: see the module's docstring.
            phase: the phase it belongs to; None for evaluation, which takes [n, L + 1] and gives
                the sum, not the mean, of the next-token losses.
            num_real: rows that count; None for all.
        """
        num_real = len(tokens) if num_real is None else num_real
        denominator = phase.num_sequences * phase.latent_length if phase else 1
        with_router = self.has_router and phase is not None
        if phase is None or phase.bag_size == 1:
            hidden, routing = self._hidden(tokens[:, :-1], with_router)
            labels = _ignore_fillers(tokens[:, 1:], num_real)
            loss = self._next_token_loss(hidden, labels, denominator)
        else:
            inputs, targets = _inputs_and_targets(tokens, phase)
            hidden, routing = self._hidden(inputs, with_router)
            loss = self._bag_loss(hidden, _ignore_fillers(targets, num_real), phase, denominator)
        if not routing:
            return StepLoss(loss, loss.detach(), torch.zeros_like(loss))
        router_loss = self._router_loss(routing, num_real * hidden.shape[1], denominator)
        return StepLoss(
            loss + self._router_weight * router_loss, loss.detach(), router_loss.detach()
        )

    @torch.no_grad()
    def next_token_loss(self, tokens: Tensor, *, num_real: int | None = None) -> Tensor:
        """The sum of the next-token losses of [n, L + 1] tokens, for evaluation; collective."""
        training = self.training
        self.eval()
        loss: Tensor = self(tokens, None, num_real=num_real).loss
        self.train(training)
        return loss

    def _hidden(self, inputs: Tensor, with_router: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states [n, L, d] of token ids [n, L] or bags [n, L, s], and router logits."""
        options: dict[str, Any] = {"output_router_logits": True} if with_router else {}
        if inputs.dim() == 2:
            options["input_ids"] = inputs
        else:
            embedding = self.hf_model.get_input_embeddings()
            bags_nLd = embed_bags(embedding.weight, inputs)
            scale = embedding_scale(embedding)
            if isinstance(scale, Tensor):  # rounded as for tokens (Gemma), not float32's
                bags_nLd = bags_nLd * scale.to(bags_nLd.dtype)
            elif scale != 1:
                bags_nLd = bags_nLd * scale
            options["inputs_embeds"] = bags_nLd
        with one_text_a_row():
            out = self.hf_model.base_model(use_cache=False, **options)
        return out.last_hidden_state, out.router_logits if with_router else ()

    # -- losses, each summed over its targets ------------------------------------------------------

    def _next_token_loss(self, hidden_nLd: Tensor, labels_nL: Tensor, denominator: int) -> Tensor:
        """Σ cross-entropy divided by the denominator, exactly as transformers computes it; where
        its logits would be too big, in chunks."""
        head = self.hf_model.get_output_embeddings()
        if 4 * labels_nL.numel() * head.weight.shape[0] <= WHOLE_LOGITS_BYTES:
            logits = head(hidden_nLd)
            if self._scale != 1:
                logits = logits * self._scale
            logits_NV = logits.view(-1, logits.shape[-1])
            logits_NV = logits_NV.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(
                logits_NV, labels_nL.reshape(-1), ignore_index=IGNORE, reduction="sum"
            )
            return loss / denominator
        labels_N1 = labels_nL.reshape(-1, 1)
        counts_N1 = labels_N1 != IGNORE
        dtype = torch.promote_types(hidden_nLd.dtype, torch.float32)
        return chunked_cross_entropy(
            self._scaled(hidden_nLd),
            head.weight,
            labels_N1.masked_fill(~counts_N1, 0),
            counts_N1.to(dtype) / denominator,
            chunk_rows=rows_within(WHOLE_LOGITS_BYTES, head.weight),
            compile=self._compile,
        )

    def _bag_loss(
        self, hidden_nLd: Tensor, targets_nLs: Tensor, phase: Phase, denominator: int
    ) -> Tensor:
        """Σ over positions of the multi-hot cross-entropy, divided by the denominator."""
        head = self.hf_model.get_output_embeddings()
        targets_Ns = targets_nLs.flatten(0, 1)
        return linear_multi_hot_cross_entropy(
            self._scaled(hidden_nLd),
            head.weight,
            targets_Ns,
            _place_weights(phase.weighting, targets_Ns.shape[1], targets_Ns.device),
            IGNORE,
            loss=phase.loss,
            divisor=denominator,
            chunk_rows=rows_within(WHOLE_LOGITS_BYTES, head.weight),
            compile=self._compile,
        )

    def _scaled(self, hidden_nLd: Tensor) -> Tensor:
        """Hidden states [N, d] whose logits are scaled."""
        hidden_Nd = hidden_nLd.flatten(0, 1)
        return hidden_Nd if self._scale == 1 else hidden_Nd * self._scale

    def _router_loss(self, routing: tuple[Tensor, ...], num_real: int, denominator: int) -> Tensor:
        """The load-balancing loss (Switch Transformer, equations 4–6), over all ranks.

        E·Σ_e f_e·P_e, with f_e the tokens sent to expert e and P_e its mean probability, over all
        layers. f has no gradient, so it is summed over the ranks, and each rank's share of the loss
        is then linear in its own rows. f is that of one micro-batch on all ranks: without
        accumulation that is the global batch, at any world size; with it, the size of the
        micro-batches shows, as it does wherever this loss is accumulated.

        Args:
            routing: each layer's router logits [N, E]; its first `num_real` rows count.
            denominator: positions of the global batch.
        """
        probs = [logits[:num_real].softmax(dim=-1) for logits in routing]
        prob_sum_E = torch.zeros(self._num_experts, device=probs[0].device)
        for probs_NE in probs:
            prob_sum_E = prob_sum_E + probs_NE.float().sum(dim=0)
        with torch.no_grad():
            chosen = torch.cat([p.topk(self._top_k, dim=-1).indices.flatten() for p in probs])
            ones = torch.ones_like(chosen, dtype=torch.float32)
            counts_E = torch.zeros_like(prob_sum_E).scatter_add_(0, chosen, ones)
            if isinstance(self, FSDPModule):
                dist.all_reduce(counts_E)
            sent_E = counts_E / (counts_E.sum() / self._top_k).clamp(min=1)
        return torch.sum(sent_E * (prob_sum_E / (len(routing) * denominator))) * self._num_experts

    # -- gradient accumulation -------------------------------------------------------------------

    def set_last_micro_batch(self, is_last: bool) -> None:
        """Say, before its forward, whether a micro-batch is the step's last: only then gradients
        are reduced over the ranks."""
        if isinstance(self, FSDPModule):
            self.set_requires_gradient_sync(is_last)
            self.set_is_last_backward(is_last)
            self.set_reshard_after_backward(is_last or self._reshard)


def _inputs_and_targets(tokens: Tensor, phase: Phase) -> tuple[Tensor, Tensor]:
    """What goes in, [n, L] or [n, L, s], and the labels [n, L, places] of each position."""
    if phase.mode == "output_only":
        windows = tokens[:, 1:].unfold(1, phase.bag_size, 1)
        return tokens[:, : windows.shape[1]], windows
    targets = tokens[:, 1:]
    return tokens[:, :-1], targets[..., :1] if phase.mode == "input_only" else targets


def _ignore_fillers(labels: Tensor, num_real: int) -> Tensor:
    if num_real == len(labels):
        return labels
    labels = labels.clone()
    labels[num_real:] = IGNORE
    return labels


@lru_cache(maxsize=64)
def _place_weights(weighting: str, s: int, device: torch.device) -> Tensor:
    return bag_weights(weighting, s).to(device)


# -- building ------------------------------------------------------------------------------------


def build_model(
    hf_config: Any,
    *,
    pretrained: str | None = None,
    seed: int = 0,
    weights: bool = True,
    device: torch.device | str = "cpu",
    precision: str = "float32",
    compile: bool = False,
    activation_checkpointing: bool = False,
    reshard: bool = True,
    sharded: bool = True,
) -> SuperpositionLM:
    """Build a model, ready to train, with the same weights at every world size.

    Rank 0 makes the weights on its CPU, float32; the others receive their shards of them. One
    process in float32 trains a plain module, without FSDP.

    Args:
        hf_config: from `model_config.hf_config`.
        pretrained: a Hugging Face folder or id whose weights to start from; None starts from seed.
        seed: of the weights; of no meaning without `weights`, or with `pretrained`.
        weights: False leaves them undefined, for a checkpoint to be loaded over them: a large model
            takes minutes to make and to send around, and rank 0 its whole size of memory.
        device: where to train.
        precision: `float32`, or `bfloat16` for forward and backward with float32 weights,
            reductions and optimizer.
        compile: torch.compile each block, and the softmax of a chunked loss.
        activation_checkpointing: recompute each block's activations in the backward pass.
        reshard: give a block's gathered weights back after each use; else they stay until the
            step's last backward pass, and are gathered once for all its micro-batches.
        sharded: False builds a plain float32 module in this process alone, whatever the group.

    Raises:
        ConfigError: the model cannot be trained this way; on every rank alike.
    """
    device = torch.device(device)
    group = sharded and join_group(precision, device)
    leads = not group or dist.get_rank() == 0
    scale = logit_scale(hf_config)
    hf_model, problem = None, None
    try:
        if leads and weights:
            hf_model = _create(hf_config, pretrained, seed)
        else:
            hf_model = make_model(hf_config, "cpu" if leads else "meta", weights=False)
    except ConfigError as error:
        problem = str(error)
    if group:
        problem = _first_problem(problem)
    if problem:
        raise ConfigError(problem)
    model = SuperpositionLM(hf_model, scale, compile=compile, reshard=reshard).train()
    whole = model.state_dict() if leads and weights else {}
    _prepare_blocks(model, activation_checkpointing, compile)
    if group:
        _shard(model, device, precision, reshard)
    if whole:
        model.to(device)
    else:
        _allocate(model, device)
    if group:
        _distribute(model, whole if weights else None)
    return model


def join_group(precision: str, device: torch.device) -> bool:
    """Whether FSDP wraps the model: over several ranks, or for its mixed precision over one.

    That one then becomes a group, of which others may be made.
    """
    if dist.is_initialized():
        return dist.get_world_size() > 1 or precision != "float32"
    if precision != "float32":
        store = dist.HashStore()  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return True
    return False


def _create(config: Any, pretrained: str | None, seed: int) -> Any:
    """The whole model on the CPU, float32."""
    if pretrained is None:
        with seeded(seed):
            return make_model(config, "cpu")
    return load_pretrained(config, pretrained)


def _first_problem(mine: str | None) -> str | None:
    """The first rank's problem, on every rank, so that none waits for one that has failed."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, mine)
    return next((problem for problem in problems if problem), None)


def _prepare_blocks(model: SuperpositionLM, activation_checkpointing: bool, compile: bool) -> None:
    """Checkpoint, then compile, each block, in the order that FSDP then wraps."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = anatomy(model.hf_model).blocks
    for index in range(len(blocks)):
        if activation_checkpointing:
            blocks[index] = checkpoint_wrapper(blocks[index])
        if compile:
            blocks[index].compile()


def _shard(model: SuperpositionLM, device: torch.device, precision: str, reshard: bool) -> None:
    """Shard each block, then the rest, over all ranks; a small model all at once.

    Gradients are summed, not averaged: the loss is already divided by the global number of targets.
    """
    # Not `init_device_mesh`: on CPUs it makes a group of its own where it sees a GPU, and ranks on
    # nodes without one would not join in.
    world = dist.group.WORLD
    assert world is not None
    mesh = dist.device_mesh.DeviceMesh.from_group(world, device.type)
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    blocks = anatomy(model.hf_model).blocks if num_bytes > _ONE_GROUP_BYTES else ()
    for module in [*blocks, model]:
        # None: all but the root's, which backward needs first
        keep = None if reshard else False
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=keep)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def _allocate(model: SuperpositionLM, device: torch.device) -> None:
    """Give what is on the meta device storage, of any content; buffers that were computed stay."""
    first: dict[nn.Parameter, str] = {}
    tied = {
        name: first.setdefault(parameter, name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    buffers = model.named_buffers(remove_duplicate=False)
    computed = {name: buffer for name, buffer in buffers if not buffer.is_meta}
    model.to_empty(device=device)  # unties what was tied
    for name, other in tied.items():
        folder, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(folder), attribute, model.get_parameter(other))
    for name, buffer in computed.items():
        model.get_buffer(name).copy_(buffer)


def _distribute(model: SuperpositionLM, weights: dict[str, Any] | None) -> None:
    """Give every rank its shards of rank 0's weights, if there are any, and rank 0's buffers."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if weights is not None:
        set_model_state_dict(
            model,
            weights,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
    for buffer in model.buffers():  # those that no state dict holds too: rotary frequencies
        dist.broadcast(buffer, src=0)
