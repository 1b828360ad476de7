"""What a run costs, estimated before it runs: floating-point work, and memory.

    ModelShape, Plan ──> flops_per_step │ memory_per_worker │ memory_checkpoint_bytes

Estimates say how they are made, and what they were measured against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tst_ray.plan import Phase, Plan, batch_split
from tst_ray.settings import TrainConfig

WHOLE_LOGITS_BYTES = 2**30  # larger logits never exist whole, but in chunks of this
TOKEN_BYTES = 8  # batches are int64 on the device


@dataclass(frozen=True)
class ModelShape:
    """Plain facts about a model, counted without weights.

    Attributes:
        parameters: all of them; a tied table counts once.
        active_parameters: those that one token passes through: of the experts of a mixture, the
            share that its router picks. Both tables count.
        embedding_parameters: the input embedding table.
        tied_embeddings: whether that table is the output head too.
        intermediate_size: width of the feed-forward layer that a token passes through; of all its
            experts together in a mixture.
        experts_per_token: how many routed experts a token visits; 0 without a mixture.
        has_head_norms: whether queries and keys are normed head by head.
        largest_block_parameters: of the largest transformer block, the unit that FSDP gathers.
    """

    parameters: int
    active_parameters: int
    embedding_parameters: int
    tied_embeddings: bool
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    experts_per_token: int
    has_head_norms: bool
    largest_block_parameters: int

    @property
    def matmul_parameters(self) -> int:
        """Those that a token is multiplied with: an untied input table is only looked up."""
        looked_up = 0 if self.tied_embeddings else self.embedding_parameters
        return self.active_parameters - looked_up

    @property
    def root_parameters(self) -> int:
        """The tables that FSDP gathers as one group with the final norm: embedding and head."""
        return self.embedding_parameters * (1 if self.tied_embeddings else 2)


def flops_per_step(shape: ModelShape, phase: Phase) -> int:
    """Floating-point operations of a step, forward and backward, over all workers.

    6 per matmul parameter and position, and 12 · layers · heads · head width · length for
    attention (PaLM, arXiv 2204.02311, appendix B), which counts the masked half too.
    Recomputation under activation checkpointing is not counted, as is usual for utilisation.
    """
    width = shape.num_heads * shape.head_dim
    attention = 12 * shape.num_layers * width * phase.latent_length
    return (6 * shape.matmul_parameters + attention) * phase.latent_tokens_per_step


def memory_per_worker(
    shape: ModelShape, plan: Plan, phase: Phase, world_size: int, train: TrainConfig
) -> dict[str, int]:
    """An estimate of the bytes that the fullest worker holds at its peak, by what holds them.

    parameters, gradients, optimizer: float32, a worker's shard of them.
    unsharded: what FSDP has gathered at once: the tables and two blocks (one at work, the next on
        its way), or all without `train.reshard`, in the compute precision; the gradients of those
        tables and blocks; the gradient of the tables once more in float32, as it is summed and
        sent; while micro-batches accumulate, every gradient in float32, which become the shards
        block by block. Nothing for one float32 worker, which is not sharded.
    activations: what backward keeps of one micro-batch (see `_activations`).
    logits: see `_logits`. Evaluation runs as many rows, at the full sequence length (or 16,384
        positions, which without a backward pass need less than a step does).
    tokens: the local batch, look-ahead included: all that bags add to memory.
    """
    rows = batch_split(phase.num_sequences, world_size)[0]
    height = min(train.micro_batch_size or rows, rows)
    compute_bytes = 2 if train.precision == "bfloat16" else 4
    sharded = world_size > 1 or compute_bytes == 2
    shard = math.ceil(shape.parameters / world_size)
    at_work = shape.root_parameters + 2 * shape.largest_block_parameters
    gathered = at_work if train.reshard else shape.parameters
    accumulated = shape.parameters - shard if rows > height else 0
    positions = height * phase.latent_length
    unsharded = compute_bytes * (gathered + at_work) + 4 * (shape.root_parameters + accumulated)
    memory = {
        "parameters": 4 * shard,
        "gradients": 4 * shard,
        "optimizer": 8 * shard,
        "unsharded": unsharded if sharded else 0,
        "activations": _activations(shape, positions, compute_bytes, train),
        "logits": _logits(shape, max(positions, height * plan.sequence_length), train),
        "tokens": TOKEN_BYTES * rows * (phase.data_length + phase.lookahead),
    }
    return memory | {"total": sum(memory.values())}


@dataclass(frozen=True)
class Host:
    """A machine for workers: bytes of memory that they may use, and room for how many."""

    memory_bytes: float
    places: int


def memory_problem(
    shape: ModelShape,
    plan: Plan,
    phase: Phase,
    train: TrainConfig,
    hosts: Sequence[Host],
    *,
    on_gpus: bool = False,
) -> str | None:
    """Why no allowed number of workers has the memory to train a phase; None if one has.

    Rank 0 makes the whole model, before it is shared out, in the memory of one of the hosts.

    Args:
        on_gpus: whether workers train in the memory of GPUs (`gpu_problem`), not in the hosts'.

    Returns:
        a line with what is needed, what there is and the remedy.
    """
    places = sum(host.places for host in hosts)
    most = max(min(phase.max_workers, places), phase.min_workers)
    largest = max(host.memory_bytes for host in hosts)
    for size in range(phase.min_workers, most + 1):
        need = 0 if on_gpus else memory_per_worker(shape, plan, phase, size, train)["total"]
        fitting = sum(int(min(h.places, h.memory_bytes / max(need, 1))) for h in hosts)
        whole = whole_model_bytes(shape, 1 if on_gpus else size)
        if fitting >= size and whole <= largest:
            return None
    if whole > largest:
        needs = f"making the whole model takes {_gib(whole)} GiB on one machine"
    elif len(hosts) == 1:
        needs = f"{_workers(most)} about {_gib(need * most)} GiB"
    else:
        needs = f"{_workers(most)} about {_gib(need)} GiB each"
    where = "this machine has" if len(hosts) == 1 else "the largest node has"
    return (
        f"model: phase {phase.index + 1} does not fit into memory: {needs}, and {where} "
        f"{_gib(largest)} GiB; {_SMALLER}, or train on more or larger machines"
    )


def gpu_problem(
    shape: ModelShape, plan: Plan, phase: Phase, size: int, train: TrainConfig, gpu_bytes: int
) -> str | None:
    """Why a phase does not fit into the memory of a worker's GPU, as `memory_problem` says it."""
    need = memory_per_worker(shape, plan, phase, size, train)["total"]
    if need <= gpu_bytes:
        return None
    return (
        f"model: phase {phase.index + 1} does not fit into memory: each of {size} worker(s) needs "
        f"about {_gib(need)} GiB, and its GPU has {_gib(gpu_bytes)} GiB; {_SMALLER}, or train on "
        "more or larger GPUs"
    )


_SMALLER = (
    "give a smaller model, set train.micro_batch_size=1 and train.activation_checkpointing=true"
)


def _workers(count: int) -> str:
    return "one worker needs" if count == 1 else f"{count} workers need"


def whole_model_bytes(shape: ModelShape, world_size: int) -> int:
    """Bytes that rank 0 holds once while it shares out the model that it has made, float32."""
    return 4 * shape.parameters + (4 * shape.parameters // world_size if world_size > 1 else 0)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f}"


MEMORY_KEEP = 2
"""Checkpoints that are kept in the memory of nodes, beside one on its way."""


def memory_checkpoint_bytes(shape: ModelShape, num_nodes: int) -> int:
    """Bytes that checkpoints in memory take in the object stores of all nodes together.

    Each is the weights and AdamW's two moments in float32, on two nodes where there are two.
    """
    return 12 * shape.parameters * (MEMORY_KEEP + 1) * min(num_nodes, 2)


_COMPILED = 0.7
"""What a compiled block keeps of that: 0.64 of it in steps of paper-270m and paper-600m on an H200
(torch 2.11), 0.7 of it on a CPU (torch 2.13)."""


def _logits(shape: ModelShape, positions: int, train: TrainConfig) -> int:
    """Bytes of logits, their logarithms and their gradient, float32; at most a chunk of each.

    In chunks, compiled and in bfloat16, no logarithms, and the others in half the bytes.
    """
    whole = 4 * positions * shape.vocab_size
    if whole > WHOLE_LOGITS_BYTES and train.compile and train.precision == "bfloat16":
        return WHOLE_LOGITS_BYTES
    return 3 * min(whole, WHOLE_LOGITS_BYTES)


def _activations(shape: ModelShape, positions: int, compute_bytes: int, train: TrainConfig) -> int:
    """Bytes kept for backward, counting tensors of a pre-norm block with fused attention.

    A block keeps: its two norms' inputs in float32 and outputs; queries and keys before and after
    rotation, values, the attention output; and four tensors of the feed-forward width (gate, its
    activation, up, product). Norms of heads keep queries and keys in float32 and once more; the
    experts of a mixture their own copy of each token, and what comes out. Under checkpointing every
    block keeps its input, and one block at a time the rest. Within 6 % of what autograd saves for
    Llamas on CPU (torch 2.13, two shapes, both precisions, no checkpointing), within 4 % for
    Qwen3's. The compiler computes some of it again (`_COMPILED`).
    """
    d, heads = shape.hidden_size, (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    routed = 2 * shape.experts_per_token * d
    block = 2 * 4 * d + compute_bytes * (2 * d + 3 * heads + 4 * shape.intermediate_size + routed)
    if shape.has_head_norms:
        block += (4 + compute_bytes) * heads
    if train.compile:
        block = math.ceil(_COMPILED * block)
    entry = compute_bytes * d
    if train.activation_checkpointing:
        per_position = shape.num_layers * entry + block
    else:
        per_position = shape.num_layers * block
    return positions * (per_position + 2 * entry)  # and the embeddings, and what the head reads
