"""What people read about a run before it begins: its plan.

It comes as plain facts (for --json) and as text made from those facts alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.errors import DataError
from pipelines.manifest import Manifest
from pipelines.tokenizer import TRAIN, check_tokenizer, load_tokenizer, vocabulary_size
from tst_ray.corpus import (
    build_order,
    find_prepared,
    mixture,
    shown_mixture,
    source_files,
    source_specs,
)
from tst_ray.display import short_number, wide_console
from tst_ray.errors import UserError
from tst_ray.estimates import ModelShape, flops_per_step, memory_per_worker
from tst_ray.origins import Origins
from tst_ray.outlook import (
    estimated_passes,
    hints,
    passes,
    rough_duration,
    shown_passes,
    text_bytes,
    training_seconds,
)
from tst_ray.plan import Phase, Plan, batch_split, build_plan
from tst_ray.runstore import check_same_run, run_storage
from tst_ray.session import check_local
from tst_ray.settings import Config

_MAX_SPLITS = 16  # world sizes listed a phase; the ends of a longer range say it all


def plan_facts(config: Config, origins: Origins | None = None) -> dict[str, Any]:
    """The whole plan of a config as plain values; needs neither Ray nor weights.

    Epochs and tails are there when the shards are prepared (`data.prepared`, or in the cache). What
    a run would be refused for, of its text and tokenizer, is under "problems", a line each.

    Args:
        origins: who wrote which setting, to be told beside it.

    Raises:
        ConfigError: of the model nothing can be told.
    """
    from tst_ray.architecture import check_supported, describe, precision_to_try
    from tst_ray.model_config import check_tokenizer_fits, hf_config
    from tst_ray.shape import mixture_remark, shape_facts

    plan, origins = build_plan(config), origins or Origins()
    problems, remarks = _Problems(), list[str]()
    sources = {
        str(spec.name): found
        for spec in source_specs(config)
        if (found := problems.of(source_files, config, spec, remarks.append))
    }
    manifest = problems.of(find_prepared, config)
    known = problems.of(_tokenizer_facts, config, manifest)
    vocab_size, eot_token, tokenizer = known or (None, None, None)
    model_config = hf_config(config.model, vocab_size=vocab_size, eot_token=eot_token)
    if tokenizer is not None:
        problems.of(check_tokenizer_fits, config.model, model_config, tokenizer)
    check_supported(
        model_config, latent_length=plan.sequence_length, precision=precision_to_try(config)
    )
    shape = describe(model_config)
    phases = [_phase_facts(config, plan, shape, phase) for phase in plan.phases]
    facts: dict[str, Any] = {
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "vocab_size": shape.vocab_size,
        "vocab_size_is_the_tokenizers": vocab_size is not None,
        "remark": mixture_remark(model_config),
        "model": shape_facts(model_config) | {"from": _field_origins(model_config, origins)},
        "settings": {
            path: {"value": value, "from": where}
            for path, (value, where) in origins.written.items()
        },
        "sources": {
            name: {"root": found.root, "files": len(found.files), "bytes": found.size}
            for name, found in sources.items()
        },
        "total_steps": plan.total_steps,
        "total_data_tokens": plan.total_data_tokens,
        "total_latent_tokens": plan.total_latent_tokens,
        "total_flops": sum(phase["flops_per_step"] * phase["steps"] for phase in phases),
        "training_s": training_seconds(config, plan, shape),
        "warmup_steps": plan.warmup_steps,
        "decay_steps": plan.decay_steps,
        "phases": phases,
    }
    order = problems.of(build_order, config, plan, manifest) if manifest else None
    if manifest and order:
        facts |= {"passes": passes(order), "passes_are_estimated": False}
        facts["corpus"] = {
            "folder": manifest.folder,
            "mixture": mixture(order),
            "train_tokens": {source.name: source.train.tokens for source in manifest.sources},
            "validation_tokens": {
                source.name: source.validation.tokens for source in manifest.sources
            },
        }
        names = [source.name for source in manifest.sources]
        for phase in plan.phases:
            for name, of_sources in (
                ("epochs_after", order.epochs_after(phase.index)),
                ("tail_tokens", order.tail_tokens(phase.index)),
                ("dropped_tokens", order.dropped_tokens(phase.index)),
            ):
                phases[phase.index][name] = dict(zip(names, of_sources, strict=True))
    else:
        sizes = {name: text_bytes(found) for name, found in sources.items()}
        estimated = estimated_passes(config, plan, shape.vocab_size, sizes)
        facts |= {"passes": estimated, "passes_are_estimated": True}
    facts["hints"] = [*remarks, *_refusals(config, plan), *hints(config, plan, facts["passes"])]
    facts["problems"] = problems.lines
    return facts


class _Problems:
    """What a run would be refused for, a line each, while the rest of the plan is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def of(self, find: Callable[..., Any], *args: Any) -> Any:
        """What a function finds; None where it raises, which is noted."""
        try:
            return find(*args)
        except (DataError, UserError) as error:
            if str(error) not in self.lines:
                self.lines.append(str(error))
            return None


def _tokenizer_facts(
    config: Config, manifest: Manifest | None
) -> tuple[int, int | None, Any | None]:
    """The vocabulary, the end-of-text token, and the tokenizer if there is one already.

    They are those of the shards, or of the tokenizer to be used.

    Raises:
        DataError: the tokenizer cannot be loaded, or is not that of the shards.
    """
    name = config.data.tokenizer
    if manifest:
        tokenizer = check_tokenizer(manifest, name if config.data.prepared else None)
        return manifest.vocab_size, manifest.eot_token, tokenizer
    if name == TRAIN:
        return config.data.vocab_size, None, None
    tokenizer = load_tokenizer(name)
    return vocabulary_size(tokenizer), tokenizer.eos_token_id, tokenizer


_SHAPE_FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "tie_word_embeddings",
)  # fmt: skip


def _field_origins(model_config: Any, origins: Origins) -> dict[str, str]:
    """Where each field of a model's shape comes from."""
    fields = [name for name in _SHAPE_FIELDS if hasattr(model_config, name)]
    return {name: origins.of_model_field(name) for name in fields}


def _refusals(config: Config, plan: Plan) -> list[str]:
    """Why a run here and now would be refused; on another machine, or by another name, it may not.

    A plan is made for a cluster on a laptop, and beside the runs that are there.
    """
    found = []
    with_ray_here = config.cluster.backend == "ray" and not os.environ.get("RAY_ADDRESS")
    checks = [lambda: check_same_run(run_storage(config), config)]
    if with_ray_here:
        checks.append(lambda: check_local(config, plan))
    for check in checks:
        try:
            check()
        except UserError as error:
            found.append(f"a run would be refused here: {str(error).splitlines()[0].rstrip(':')}")
    return found


def _phase_facts(config: Config, plan: Plan, shape: ModelShape, phase: Phase) -> dict[str, Any]:
    sizes = list(range(phase.min_workers, phase.max_workers + 1))
    if len(sizes) > _MAX_SPLITS:
        sizes = sizes[: _MAX_SPLITS // 2] + sizes[-_MAX_SPLITS // 2 :]
    return {
        "index": phase.index,
        "bag_size": phase.bag_size,
        "steps": phase.steps,
        "data_tokens": phase.data_tokens,
        "latent_tokens": phase.latent_tokens,
        "flops_per_step": flops_per_step(shape, phase),
        "sequences_per_step": phase.num_sequences,
        "sequence_data_tokens": phase.data_length,
        "workers": [phase.min_workers, phase.max_workers],
        "batch_split": {str(size): _split_words(phase.num_sequences, size) for size in sizes},
        "memory_per_worker": {
            str(size): memory_per_worker(shape, plan, phase, size, config.train)
            for size in {sizes[0], sizes[-1]}
        },
    }


def _split_words(num_sequences: int, world_size: int) -> str:
    """16 over 3 workers: "1 x 6 + 2 x 5"."""
    split = batch_split(num_sequences, world_size)
    counts = {size: split.count(size) for size in sorted(set(split), reverse=True)}
    return " + ".join(f"{count} x {size}" for size, count in counts.items())


def print_plan(facts: dict[str, Any], console: Console | None = None) -> None:
    """The plan as text."""
    console = console or wide_console()
    say = console.print
    _say_model(facts, say)
    for name, found in facts["sources"].items():
        say(f"text       {name}: {found['files']:,} files, {found['bytes'] / 1e6:,.1f} MB")
    say(
        f"run        {facts['total_steps']:,} steps, "
        f"{short_number(facts['total_data_tokens'])} data tokens "
        f"({facts['total_data_tokens']:,}), {short_number(facts['total_flops'])}FLOP"
    )
    if facts["training_s"]:
        say(f"time       about {rough_duration(sum(facts['training_s']))} of training here")
    if facts["passes"]:
        how = " (estimated; exact once the text is prepared)" * facts["passes_are_estimated"]
        say(f"passes     {shown_passes(facts['passes'])}{how}")
    say(
        f"schedule   {facts['warmup_steps']:,} steps of warm-up, "
        f"{facts['decay_steps']:,} of decay at the end"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("phase", "bag", "steps", "sequences", "x tokens", "data tokens",
                   "latent tokens", "FLOPs/step", "workers"):  # fmt: skip
        table.add_column(column, justify="right")
    for phase in facts["phases"]:
        low, high = phase["workers"]
        table.add_row(
            str(phase["index"] + 1),
            str(phase["bag_size"]),
            f"{phase['steps']:,}",
            f"{phase['sequences_per_step']:,}",
            f"{phase['sequence_data_tokens']:,}",
            f"{short_number(phase['data_tokens'])}",
            f"{short_number(phase['latent_tokens'])}",
            f"{phase['flops_per_step']:.3g}",
            str(low) if low == high else f"{low}–{high}",
        )
    say()
    say(table)
    for phase in facts["phases"]:
        say()
        say(f"phase {phase['index'] + 1}")
        before = 0
        for size, split in phase["batch_split"].items():
            if before and int(size) > before + 1:
                say("     …")  # the sizes between them are allowed, too
            before = int(size)
            say(f"  {size:>4} {'workers' if before > 1 else 'worker '}: {split} sequences")
        for size, memory in phase["memory_per_worker"].items():
            parts = ", ".join(
                f"{name.replace('_', ' ')} {_bytes(value)}"
                for name, value in memory.items()
                if name != "total"
            )
            say(f"  memory a worker of {size}: about {_bytes(memory['total'])} ({parts})")
        for name, epochs in phase.get("epochs_after", {}).items():
            tail, dropped = phase["tail_tokens"][name], phase["dropped_tokens"][name]
            at_its_end = f", {dropped:,} when the phase ends" if dropped else ""
            say(
                f"  {name}: {epochs:.3f} epochs when it ends; {tail:,} tokens per epoch are "
                f"dropped (incomplete last sequence){at_its_end}"
            )
    if "corpus" in facts:
        shares = facts["corpus"]["mixture"]
        if len(shares) > 1:
            say()
            say(f"mixture    {shown_mixture(shares)}")
    else:
        say()
        say("corpus     not prepared yet: epochs and tails are told after `tst-ray prepare`")
    say()
    _say_settings(facts, say)
    for hint in facts["hints"]:
        say(hint)


def _say_model(facts: dict[str, Any], say: Callable[..., None]) -> None:
    model, active = facts["model"], facts["active_parameters"]
    unknown = not facts["vocab_size_is_the_tokenizers"]
    extra = f", {active:,} active" if active != facts["parameters"] else ""
    experts = (
        f", {model['experts_per_token']} of {model['experts']} experts a token"
        if model["experts"]
        else ""
    )
    say(
        f"model      {model['model_type']}, {facts['parameters']:,} parameters{extra}, "
        f"vocabulary {facts['vocab_size']:,}"
        + " (the model's own: that of the tokenizer is not known)"
        * unknown
    )
    say(
        f"           {model['layers']} layers of width {model['hidden_size']}, "
        f"{model['heads']} heads of size {model['head_dim']} "
        f"({model['kv_heads']} for keys and values), "
        f"feed-forward {model['intermediate_size']:,}{experts}, "
        f"{'tied' if model['tied_embeddings'] else 'untied'} embeddings"
    )
    if facts["remark"]:
        say(f"           {facts['remark']}")
    origins: dict[str, list[str]] = {}
    for name, origin in model["from"].items():
        origins.setdefault(origin, []).append(name)
    for origin, names in origins.items():
        say(f"           from {origin}: {', '.join(names)}")


def _say_settings(facts: dict[str, Any], say: Callable[..., None]) -> None:
    """Every setting that somebody wrote, and where; a model's fields stand with the model."""
    shown = {
        path: setting
        for path, setting in facts["settings"].items()
        if not path.startswith("model.config.")
    }
    if not shown:
        say("settings   all are defaults")
        return
    start = "settings"
    for path, setting in shown.items():
        say(f"{start:<10} {path} = {setting['value']} ({setting['from']})")
        start = ""
    say(f"{start:<10} all others are defaults")


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
