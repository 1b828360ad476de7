"""What the driver has done elsewhere: tasks that need torch, and take seconds or minutes.

    begin ──> Task, on a node with a CPU ──> has_begun ──> result
         └──> Call, in this process, where there is no Ray

The driver's process does without torch and without tensors: whether a model can be trained, and the
model folder, are the work of a node with a CPU. Others may hold every CPU, for hours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.errors import DataError
from pipelines.manifest import Manifest
from tst_ray.errors import ConfigError, RunError
from tst_ray.estimates import ModelShape, memory_checkpoint_bytes
from tst_ray.nodes import away_from, free_nodes, living_nodes
from tst_ray.plan import Plan
from tst_ray.settings import Config
from tst_ray.signing import read_key
from tst_ray.storage import Storage


class Call:
    """What is done in this process, once its result is asked for."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        self._function, self._args = function, args

    def has_begun(self, wait_s: float) -> bool:
        """Whether it need not be waited for."""
        return True

    def lacks(self) -> str | None:
        """What it needs that others have all of; None where there is some left."""
        return None

    def result(self) -> Any:
        """What the function returns; whatever it raises."""
        return self._function(*self._args)


class Task(Call):
    """A Ray task.

    Args:
        memory: the bytes it needs: it is not to be put on a small head where others are larger.
        away: the nodes that it is kept off.
    """

    def __init__(
        self, function: Callable[..., Any], args: Sequence[Any], memory: float, away: frozenset[str]
    ) -> None:
        import ray

        super().__init__(function, args)
        nodes = [node.resources for node in living_nodes(away) if node.places({"CPU": 1.0})]
        # Half of the largest at the most: better there than nowhere, or behind what others hold.
        most = max((resources.get("memory", 0.0) for resources in nodes), default=0.0) // 2
        self._needs, self._away = {"CPU": 1.0, "memory": min(memory, most)}, away
        options = {
            "num_cpus": 1,
            "memory": self._needs["memory"],
            "label_selector": away_from(away) or None,
            "num_returns": "streaming",
            "name": function.__name__,
        }
        self._told = ray.remote(_telling).options(**options).remote(function, *args)
        self._has_begun = False

    def has_begun(self, wait_s: float) -> bool:
        """Whether it has been given a place; waits for that, so long at the most."""
        import ray

        if not self._has_begun:
            self._has_begun = bool(ray.wait([self._told], timeout=wait_s)[0])
        return self._has_begun

    def lacks(self) -> str | None:
        """What it needs on one node, where none that it may go to has so much left."""
        if any(node.places(self._needs) for node in free_nodes(self._away)):
            return None
        memory = self._needs["memory"]
        return "a free CPU" + (f" and {memory / 2**30:,.1f} GiB of free memory" if memory else "")

    def result(self) -> Any:
        """What the function returns, or raises.

        Raises:
            RunError: the task was lost, with its node or for lack of memory.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            ray.get(next(self._told))
            return ray.get(next(self._told))
        except RayTaskError as error:
            raise error.cause from None  # the function's own error, without Ray's frames around it
        except RayError as error:  # its node is lost, or short of memory
            why = " ".join(str(error).split()) or type(error).__name__
            raise RunError(f"{self._function.__name__}: {why[:300]}") from error


def _telling(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """What a function returns, and first that its task has begun: Ray does not tell."""
    yield None
    yield function(*args)


def begin(
    backend: str,
    function: Callable[..., Any],
    *args: Any,
    memory: float = 0.0,
    away: frozenset[str] = frozenset(),
) -> Call:
    """Begin a call as a Ray task (see `Task`), or have it ready where there is no Ray."""
    return Call(function, args) if backend == "inline" else Task(function, args, memory, away)


def store_problem(shape: ModelShape, stores: Sequence[float]) -> str | None:
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
    config: Config, plan: Plan, manifest: Manifest | None, kept: dict[str, Any] | None = None
) -> tuple[list[str], ModelShape, dict[str, Any]]:
    """Refuse, before workers start, a model that cannot be trained or does not fit the text.

    And a tokenizer that is not the one the text's shards were made with: the trained model's folder
    would get it. It needs torch and transformers, which this process can do without.

    Args:
        manifest: the text's; None before it is there, for all that the model alone tells.
        kept: the model's fields that the run began with; None reads them.

    Returns:
        remarks for the user, the model's shape, and its fields.

    Raises:
        ConfigError: with the reason.
        DataError: the shards' tokenizer is not there, or is another one.
    """
    import torch

    from pipelines.tokenizer import check_tokenizer
    from tst_ray.architecture import check_supported, describe, precision_to_try
    from tst_ray.model_config import (
        check_tokenizer_fits,
        hf_config,
        model_fields,
        model_remarks,
    )
    from tst_ray.shape import mixture_remark

    cluster = config.cluster
    if cluster.backend == "inline" and cluster.gpus_per_worker and not torch.cuda.is_available():
        raise ConfigError(
            f"cluster.gpus_per_worker = {cluster.gpus_per_worker:g}: torch sees no GPU on this "
            "machine; set 0, or cluster.backend=ray on a cluster that has some"
        )
    fields = kept or model_fields(config.model)
    vocab_size, eot_token = (manifest.vocab_size, manifest.eot_token) if manifest else (None, None)
    ahead = config.data.vocab_size if _trains_tokenizer(config) else None
    model = hf_config(
        config.model, vocab_size=vocab_size or ahead, eot_token=eot_token, kept=fields
    )
    tokenizer = check_tokenizer(manifest) if manifest else _tokenizer_ahead(config, kept)
    if tokenizer is not None:
        check_tokenizer_fits(config.model, model, tokenizer)
    check_supported(model, latent_length=plan.sequence_length, precision=precision_to_try(config))
    remarks = model_remarks(config.model, kept, vocab_size)
    if manifest is None and (unbalanced := mixture_remark(model)):
        remarks.append(unbalanced)
    return remarks, describe(model), fields


def _trains_tokenizer(config: Config) -> bool:
    return config.data.tokenizer == "train" and not config.data.prepared


def _tokenizer_ahead(config: Config, kept: dict[str, Any] | None) -> Any:
    """The tokenizer that a pretrained model's text is to be tokenized with; None if it has been.

    What is wrong with it is told by who tokenizes.
    """
    from pipelines.tokenizer import load_tokenizer

    if not config.model.pretrained or kept or config.data.prepared:
        return None
    with contextlib.suppress(DataError):
        return load_tokenizer(config.data.tokenizer)
    return None


def export_model(run_url: str, key_file: str | None = None) -> tuple[int, list[str]]:
    """Export the newest good checkpoint and sample; runs where tensors may live.

    Args:
        key_file: the config's `checkpoint.key_file`.

    Returns:
        the checkpoint's step, and the samples.
    """
    from tst_ray.export import export_run, sample_text

    step, folder = export_run(Storage(run_url), key=read_key(key_file))
    return step, sample_text(folder)
