"""What the driver has done elsewhere: tasks that need torch, and take seconds or minutes.

    begin ──> a Ray task, or a call in this process where there is no Ray ──> what waits for it

The driver's process does without torch and without tensors: whether a model can be trained, and the
model folder, are the work of a node with a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipelines.manifest import Manifest
from tst_ray.config import Config
from tst_ray.errors import ConfigError, RunError
from tst_ray.nodes import away_from, living_nodes
from tst_ray.plan import ModelShape, Plan, memory_checkpoint_bytes
from tst_ray.storage import Storage


def begin(
    backend: str,
    function: Callable[..., Any],
    *args: Any,
    memory: float = 0.0,
    away: frozenset[str] = frozenset(),
) -> Callable[[], Any]:
    """Begin a call as a Ray task; what waits for it, or makes it here where there is no Ray.

    Args:
        memory: the bytes it needs: it is not to be put on a small head where others are larger.
        away: the nodes that it is kept off.
    """
    if backend == "inline":
        return lambda: function(*args)
    import ray
    from ray.exceptions import RayError, RayTaskError

    nodes = [node.resources for node in living_nodes(away) if node.places({"CPU": 1.0})]
    # Half of the largest at the most: better there than nowhere, or behind what others hold.
    most = max((resources.get("memory", 0.0) for resources in nodes), default=0.0) // 2
    options = {
        "num_cpus": 1,
        "memory": min(memory, most),
        "label_selector": away_from(away) or None,
    }
    begun = ray.remote(function).options(**options).remote(*args)

    def wait() -> Any:
        try:
            return ray.get(begun)
        except RayTaskError as error:
            raise error.cause from None  # the function's own error, without Ray's frames around it
        except RayError as error:  # its node is lost, or short of memory
            why = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"{function.__name__}: {why[:300]}") from error

    return wait


def memory_problem(shape: ModelShape, stores: Sequence[float]) -> str | None:
    """Why checkpoints are not kept in memory; None where they take half of it at the most.

    Args:
        stores: bytes of the object store of each node that workers are on; Ray Data needs it, too.
            What it has no room for goes to its node's disk, in silence, and may fill it.
    """
    needed, there = memory_checkpoint_bytes(shape, len(stores)), sum(stores)
    if needed <= there / 2:
        return None
    return (
        f"no checkpoints in memory: they would take {needed / 2**30:,.1f} GiB of the nodes' object "
        f"stores, which have {there / 2**30:,.1f}; a restart reads run.storage"
    )


def check_model(
    config: Config, plan: Plan, manifest: Manifest | None
) -> tuple[list[str], ModelShape]:
    """Refuse, before workers start, a model that cannot be trained or does not fit the text.

    And a tokenizer that is not the one the text's shards were made with: the trained model's folder
    would get it. It needs torch and transformers, which this process can do without.

    Args:
        manifest: the text's; None before it is there, for all that the model alone tells.

    Returns:
        remarks for the user, and the model's shape.

    Raises:
        ConfigError: with the reason.
        DataError: the shards' tokenizer is not there, or is another one.
    """
    import torch

    from pipelines.tokenizer import check_tokenizer
    from tst_ray.architecture import check_supported, describe
    from tst_ray.model_config import hf_config, ignored_fields

    cluster = config.cluster
    if cluster.backend == "inline" and cluster.gpus_per_worker and not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.gpus_per_worker = {cluster.gpus_per_worker:g}: torch sees no GPU on this "
            "machine; set 0, or cluster.backend=ray on a cluster that has some"
        )
    model = hf_config(
        config.model,
        vocab_size=manifest.vocab_size if manifest else None,
        eot_token=manifest.eot_token if manifest else None,
    )
    if manifest:
        check_tokenizer(manifest)
    check_supported(model, latent_length=plan.sequence_length)
    return ignored_fields(config.model), describe(model)


def export_model(run_url: str) -> tuple[int, list[str]]:
    """Export the newest good checkpoint and sample; runs where tensors may live.

    Returns:
        the checkpoint's step, and the samples.
    """
    from tst_ray.export import export_run, sample_text

    step, folder = export_run(Storage(run_url))
    return step, sample_text(folder)
