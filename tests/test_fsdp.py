"""FSDP2 on 1, 2 and 3 ranks over gloo against one process without it.

Three processes start once; the first `world_size` of them form each group, and rank 0 writes what
the tests then compare.

Shape suffixes: n sequences, L latent positions, s places of a bag.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import OPTIMIZER, VOCAB, a_phase, tiny
from tst_ray import model as model_module
from tst_ray.errors import ConfigError
from tst_ray.model import SuperpositionLM, build_model
from tst_ray.optim import build_optimizer, clip_grad_norm, set_lr
from tst_ray.plan import batch_split

WORLD_SIZES = (1, 2, 3)
L, S = 6, 3
CONFIGS: dict[str, Any] = {
    "untied": {"family": "llama"},
    "tied": {"family": "qwen3", "tie_word_embeddings": True},
    "mixture": {"family": "qwen3_moe"},
}
# a configuration and the rows of a micro-batch; a mixture's router loss is over a micro-batch
CASES = (("untied", 9), ("untied", 1), ("tied", 9), ("tied", 1), ("mixture", 9))
# 5 sequences divide by none of the world sizes but 1; of 2, a third rank has a filler only
STEPS: tuple[dict[str, Any], ...] = (
    {"bag_size": S, "num_sequences": 5},
    {"bag_size": S, "num_sequences": 5, "mode": "output_only", "weighting": "power_law"},
    {"bag_size": 1, "num_sequences": 2},
    {"bag_size": 1, "num_sequences": 5},
)


def global_batch(phase: Any, seed: int) -> Tensor:
    shape: tuple[int, ...] = (phase.num_sequences, L + 1)
    if phase.mode == "output_only":
        shape = (phase.num_sequences, L + S)
    elif phase.bag_size > 1:
        shape = (phase.num_sequences, L + 1, S)
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def local_micro_batches(
    batch: Tensor, rank: int, world_size: int, micro: int
) -> list[tuple[Tensor, int]]:
    """A rank's rows in pieces of `micro`, as many on every rank; a piece of none is a filler."""
    counts = batch_split(len(batch), world_size)
    mine = batch[sum(counts[:rank]) : sum(counts[: rank + 1])]
    pieces = [mine[i : i + micro] for i in range(0, max(counts), micro)]
    return [(piece, len(piece)) if len(piece) else (batch[:1], 0) for piece in pieces]


def train(model: SuperpositionLM, rank: int, world_size: int, micro: int) -> dict[str, Any]:
    """Four steps of different kinds, with an evaluation in their midst; what to compare."""
    optimizer = build_optimizer(model, OPTIMIZER)
    record: dict[str, Any] = {"loss": [], "router_loss": [], "norm": [], "evaluation": []}
    for number, settings in enumerate(STEPS):
        phase = a_phase(latent_length=L, **settings)
        batch = global_batch(phase, seed=number)
        sums = torch.zeros(3)
        pieces = local_micro_batches(batch, rank, world_size, micro)
        for index, (tokens, num_real) in enumerate(pieces):
            model.set_last_micro_batch(index == len(pieces) - 1)
            out = model(tokens, phase, num_real=num_real)
            out.objective.backward()
            sums[:2] += torch.stack([out.loss, out.router_loss])
        set_lr(optimizer, 1e-2)
        record["norm"].append(clip_grad_norm(model, 0.5))
        optimizer.step()
        optimizer.zero_grad()
        for tokens, num_real in local_micro_batches(batch[..., : L + 1, 0], rank, world_size, 9):
            if tokens.dim() == 2:
                sums[2] += model.next_token_loss(tokens, num_real=num_real)
        if dist.is_initialized():
            dist.all_reduce(sums)
        for name, value in zip(("loss", "router_loss", "evaluation"), sums, strict=True):
            record[name].append(value.clone())
    return record


def full_state(model: SuperpositionLM) -> dict[str, Any]:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: value.clone() for name, value in state.items()}


def run_case(name: str, rank: int, world_size: int, micro: int, **settings: Any) -> dict[str, Any]:
    model = build_model(tiny(**CONFIGS[name]), seed=3, **settings)
    start = full_state(model)
    record = train(model, rank, world_size, micro)
    return {"start": start, "record": record, "end": full_state(model)}


# -- what every process runs -------------------------------------------------------------------


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    one_group, model_module._ONE_GROUP_BYTES = model_module._ONE_GROUP_BYTES, 0
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        store = dist.FileStore(f"{folder}/store-{world_size}", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        results = {(name, micro): run_case(name, rank, world_size, micro) for name, micro in CASES}
        if world_size == 2:
            results["checkpointing"] = run_case(
                "mixture", rank, world_size, 9, activation_checkpointing=True
            )
            results["kept"] = run_case("tied", rank, world_size, 1, reshard=False)
            results["kept bfloat16"] = run_case(
                "tied", rank, world_size, 9, reshard=False, precision="bfloat16"
            )
            results["bfloat16"] = run_case("tied", rank, world_size, 9, precision="bfloat16")
            results["facts"] = facts(rank)
            model_module._ONE_GROUP_BYTES = one_group
            results["small"] = run_case("tied", rank, world_size, 1)
            results["facts"]["reduces_small"] = count(
                build_model(tiny("llama"), seed=3), 1, "reduce_scatter"
            )
            model_module._ONE_GROUP_BYTES = 0
        if rank == 0:
            torch.save(results, f"{folder}/world-{world_size}.pt")
        dist.barrier()
        dist.destroy_process_group()


def facts(rank: int) -> dict[str, Any]:
    """What is true of a sharded model on every rank; asserted here, on each."""
    model = build_model(tiny(**CONFIGS["tied"]), seed=3)
    bare = build_model(tiny(**CONFIGS["tied"]), seed=3, weights=False)
    alone = build_model(tiny(**CONFIGS["tied"]), seed=3, sharded=False)
    assert not isinstance(alone, FSDPModule)
    for sharded in (model, bare):
        assert isinstance(sharded, FSDPModule)
        tables = (sharded.hf_model.get_input_embeddings(), sharded.hf_model.get_output_embeddings())
        assert tables[0].weight is tables[1].weight
        assert all(p.dtype == torch.float32 for p in sharded.parameters())
        for name, buffer in alone.named_buffers():
            assert torch.equal(sharded.get_buffer(name), buffer), name
    set_model_state_dict(bare, get_model_state_dict(model))
    weights, loaded = full_state(model), full_state(bare)
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    refused = ""
    try:  # only rank 0 reads the weights, and every rank hears of it
        build_model(tiny(**CONFIGS["tied"]), pretrained="/no/such/folder", seed=3)
    except ConfigError as error:
        refused = str(error)
    assert "its weights do not load" in refused
    groups = len(dist.distributed_c10d._world.pg_map)
    with mock.patch("torch.cuda.is_available", return_value=True):
        build_model(tiny(**CONFIGS["tied"]), seed=3)
    # Were one made where there is a GPU, ranks on nodes without would not join in.
    assert len(dist.distributed_c10d._world.pg_map) == groups
    kept = build_model(tiny(**CONFIGS["tied"]), seed=3, reshard=False)
    return {
        "reduces": {micro: count(model, micro, "reduce_scatter") for micro in (4, 2, 1)},
        "gathers": {micro: count(model, micro, "allgather") for micro in (4, 2)},
        "gathers_kept": {micro: count(kept, micro, "allgather") for micro in (4, 2, 1)},
    }


def count(model: SuperpositionLM, micro: int, name: str) -> int:
    """The collectives of that name in a step with 4 rows a rank in micro-batches of `micro`."""
    phase = a_phase(bag_size=1, num_sequences=8, latent_length=L)
    pieces = local_micro_batches(global_batch(phase, 0), dist.get_rank(), 2, micro)
    with Collectives(name) as collectives:
        for index, (tokens, num_real) in enumerate(pieces):
            model.set_last_micro_batch(index == len(pieces) - 1)
            model(tokens, phase, num_real=num_real).objective.backward()
    model.zero_grad()
    return collectives.count


class Collectives(TorchDispatchMode):
    """Counts those that FSDP starts."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = f"c10d::_{name}_base_", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().startswith(self.name)
        return func(*args, **(kwargs or {}))


# -- the comparisons ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What each world size came to."""
    folder: Path = tmp_path_factory.mktemp("fsdp")
    mp.spawn(process, args=(str(folder),), nprocs=max(WORLD_SIZES))
    return {n: torch.load(folder / f"world-{n}.pt", weights_only=False) for n in WORLD_SIZES}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process without FSDP came to, with each batch whole."""
    return {name: run_case(name, 0, 1, 9) for name in CONFIGS}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_at_the_start_are_the_same(
    sharded: Any, alone: Any, name: str, world_size: int
) -> None:
    start = sharded[world_size][name, 9]["start"]
    assert start.keys() == alone[name]["start"].keys()
    for key, value in alone[name]["start"].items():
        assert torch.equal(start[key], value), key


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("name", "micro"), CASES)
def test_training_is_the_same(
    sharded: Any, alone: Any, name: str, micro: int, world_size: int
) -> None:
    mine, theirs = sharded[world_size][name, micro], alone[name]
    torch.testing.assert_close(mine["record"], theirs["record"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["end"], theirs["end"], rtol=1e-4, atol=1e-5)
    if name == "mixture":
        assert all(value > 0.1 for value in mine["record"]["router_loss"])


def test_a_small_model_is_one_group(sharded: Any, alone: Any) -> None:
    mine, theirs = sharded[2]["small"], alone["tied"]
    torch.testing.assert_close(mine["record"], theirs["record"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["end"], theirs["end"], rtol=1e-4, atol=1e-5)
    assert sharded[2]["facts"]["reduces_small"] == 1


def test_activation_checkpointing_of_a_sharded_mixture(sharded: Any, alone: Any) -> None:
    mine, theirs = sharded[2]["checkpointing"], alone["mixture"]
    torch.testing.assert_close(mine["record"], theirs["record"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["end"], theirs["end"], rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_in_less_and_keeps_float32(sharded: Any, alone: Any) -> None:
    mine, theirs = sharded[2]["bfloat16"], alone["tied"]
    losses, exact = (torch.stack(run["record"]["loss"]) for run in (mine, theirs))
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=0)
    assert all(value.dtype == torch.float32 for value in mine["end"].values())


def test_weights_that_stay_gathered_are_gathered_once_a_step(sharded: Any, alone: Any) -> None:
    """However many micro-batches there are; and train to the same."""
    mine, theirs = sharded[2]["kept"], alone["tied"]
    torch.testing.assert_close(mine["record"], theirs["record"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["end"], theirs["end"], rtol=1e-4, atol=1e-5)
    facts = sharded[2]["facts"]
    # two blocks and the root; without, the blocks in each pass, the root in each micro-batch
    assert facts["gathers_kept"] == {4: 3, 2: 3, 1: 3}
    assert facts["gathers"] == {4: 5, 2: 10}


def test_in_bfloat16_too_it_makes_no_difference_whether_weights_stay(sharded: Any) -> None:
    for what in ("record", "end"):
        kept, mine = sharded[2]["kept bfloat16"][what], sharded[2]["bfloat16"][what]
        torch.testing.assert_close(kept, mine, rtol=0, atol=0)


def test_gradients_are_reduced_once_a_step(sharded: Any) -> None:
    reduces = sharded[2]["facts"]["reduces"]
    # two blocks, and the root with embedding, norm and head
    assert reduces == {4: 3, 2: 3, 1: 3}


def test_bfloat16_in_one_process_makes_its_own_group() -> None:
    try:
        model = build_model(tiny("llama"), seed=0, precision="bfloat16")
        assert isinstance(model, FSDPModule)
        phase = a_phase(bag_size=S, num_sequences=2, latent_length=L)
        out = model(global_batch(phase, 0), phase)
        out.objective.backward()
        assert out.loss.dtype == torch.float32
        assert float(clip_grad_norm(model, 1.0)) > 0
    finally:
        dist.destroy_process_group()
