"""The run as arithmetic: phases, steps, tokens, learning rate, floating-point work, memory.

    Config → build_plan → Plan → phases → steps
                                     └──→ batch_split, flops_per_step, memory_per_worker

Everything here is exact integer arithmetic in O(phases) time and O(1) memory, whatever the number
of steps, except the estimates of work and memory, which say how they are made. A step is named by
the number of steps finished before it: 0 is the first.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

from pipelines.order import rank_slots
from tst_ray.settings import Config, PhaseConfig, TrainConfig

WHOLE_LOGITS_BYTES = 2**30  # larger logits never exist whole, but in chunks of this
TOKEN_BYTES = 8  # batches are int64 on the device


@dataclass(frozen=True)
class Phase:
    """A stretch of steps of one kind.

    Attributes:
        index: 0 is the first phase.
        bag_size: s, tokens in a bag; 1 is ordinary next-token training.
        steps: how many there are.
        first_step: steps of all phases before.
        min_workers, max_workers: the allowed world sizes.
        num_sequences: sequences of a step over all workers.
        latent_length: positions of a sequence that the model sees.
        input_bag: tokens averaged into one input position.
        target_bag: tokens that one position predicts.
    """

    index: int
    name: str
    bag_size: int
    steps: int
    first_step: int
    min_workers: int
    max_workers: int
    weighting: str
    loss: Literal["mce", "mce_alt"]
    mode: str
    fold: str
    num_sequences: int
    latent_length: int
    input_bag: int
    target_bag: int

    @property
    def last_step(self) -> int:
        """Steps finished when the phase is."""
        return self.first_step + self.steps

    @property
    def data_length(self) -> int:
        """Tokens of a sequence that are trained on."""
        return self.latent_length * self.input_bag

    @property
    def lookahead(self) -> int:
        """Tokens read past `data_length`, so that the last position has all its targets."""
        return self.target_bag

    @property
    def data_tokens_per_step(self) -> int:
        """Tokens of text that a step trains on."""
        return self.num_sequences * self.data_length

    @property
    def latent_tokens_per_step(self) -> int:
        """Positions that the model computes in a step."""
        return self.num_sequences * self.latent_length

    @property
    def data_tokens(self) -> int:
        """Tokens of text that the phase trains on."""
        return self.steps * self.data_tokens_per_step

    @property
    def latent_tokens(self) -> int:
        """Positions that the model computes in the phase."""
        return self.steps * self.latent_tokens_per_step


@dataclass(frozen=True)
class Plan:
    """What a run does, from the first step to the last.

    Attributes:
        sequence_length: L, latent positions of a sequence of ordinary training.
        warmup_steps: the learning rate rises over the first steps …
        decay_steps: … and falls over the last, to `final_lr_ratio` of the peak.
    """

    phases: tuple[Phase, ...]
    sequence_length: int
    seed: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    final_lr_ratio: float

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.phases[-1].last_step

    @property
    def total_data_tokens(self) -> int:
        """Tokens of text that the run trains on.

        N·B·L·(r·s + 1 − r), for N steps of B sequences of L positions, a share r in bags of s.
        """
        return sum(phase.data_tokens for phase in self.phases)

    @property
    def total_latent_tokens(self) -> int:
        """Positions that the model computes in the run."""
        return sum(phase.latent_tokens for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase of the step after `step` finished ones.

        Raises:
            IndexError: no such step.
        """
        for phase in self.phases:
            if phase.first_step <= step < phase.last_step:
                return phase
        raise IndexError(f"step {step} lies outside the plan's {self.total_steps} steps")

    def tokens_after(self, step: int) -> tuple[int, int]:
        """(data tokens, latent tokens) trained on once `step` steps are finished."""
        data = latent = 0
        for phase in self.phases:
            done = min(max(step - phase.first_step, 0), phase.steps)
            data += done * phase.data_tokens_per_step
            latent += done * phase.latent_tokens_per_step
        return data, latent

    def lr_multiplier(self, step: int) -> float:
        """The learning rate of the step after `step` finished ones, relative to the peak.

        Warmup-Stable-Decay over the whole run (arXiv 2404.06395), linear at both ends, blind to
        phases. No step is wasted on a rate of 0: the first has 1/warmup_steps, and the last is
        1/decay_steps of the way above the end, which is reached when the run is.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = self.total_steps - step
        if left < self.decay_steps:
            return self.final_lr_ratio + (1 - self.final_lr_ratio) * max(left, 0) / self.decay_steps
        return 1.0

    def stages(self) -> tuple[tuple[Phase, ...], ...]:
        """Consecutive phases with the same allowed world sizes; each stage is one worker group."""
        groups = groupby(self.phases, lambda phase: (phase.min_workers, phase.max_workers))
        return tuple(tuple(phases) for _, phases in groups)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, with the tokens of each phase and of the run."""
        facts = asdict(self) | {
            name: getattr(self, name)
            for name in ("total_steps", "total_data_tokens", "total_latent_tokens")
        }
        for phase, phase_facts in zip(self.phases, facts["phases"], strict=True):
            phase_facts.update(data_tokens=phase.data_tokens, latent_tokens=phase.latent_tokens)
        return facts


def build_plan(config: Config) -> Plan:
    """The plan of a checked configuration."""
    phases: list[Phase] = []
    for settings in config.phase_settings():
        phases.append(_phase(config, settings, phases))
    train = config.train
    return Plan(
        phases=tuple(phases),
        sequence_length=train.sequence_length,
        seed=config.run.seed,
        learning_rate=train.learning_rate,
        warmup_steps=train.steps_of(train.warmup),
        decay_steps=train.steps_of(train.decay),
        final_lr_ratio=train.final_lr_ratio,
    )


def _phase(config: Config, settings: PhaseConfig, before: list[Phase]) -> Phase:
    num_sequences, latent_length = settings.folded(
        config.train.batch_size, config.train.sequence_length
    )
    bags_before = any(phase.bag_size > 1 for phase in before)
    plain = "recovery" if bags_before else "plain"
    min_workers, max_workers = config.workers_of(settings)
    return Phase(
        index=len(before),
        name=settings.name or ("superposition" if settings.bag_size > 1 else plain),
        bag_size=settings.bag_size,
        steps=settings.steps,
        first_step=before[-1].last_step if before else 0,
        min_workers=min_workers,
        max_workers=max_workers,
        weighting=settings.weighting,
        loss=settings.loss,
        mode=settings.mode,
        fold=settings.fold,
        num_sequences=num_sequences,
        latent_length=latent_length,
        input_bag=1 if settings.mode == "output_only" else settings.bag_size,
        target_bag=settings.bag_size,
    )


def batch_split(num_sequences: int, world_size: int) -> tuple[int, ...]:
    """Sequences of each rank: contiguous shares of the batch, larger ones first, within one."""
    slots = (rank_slots(num_sequences, world_size, rank) for rank in range(world_size))
    return tuple(share.stop - share.start for share in slots)


# ---- work and memory ---------------------------------------------------------------------------


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
