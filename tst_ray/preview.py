"""What people read about a run before it begins: its plan.

It comes as plain facts (for --json) and as text made from those facts alone.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tst_ray.corpus import build_order, find_prepared, mixture, shown_mixture
from tst_ray.display import short_number, wide_console
from tst_ray.estimates import ModelShape, flops_per_step, memory_per_worker
from tst_ray.plan import Phase, Plan, batch_split, build_plan
from tst_ray.settings import Config

_MAX_SPLITS = 16  # world sizes listed a phase; the ends of a longer range say it all


def plan_facts(config: Config) -> dict[str, Any]:
    """The whole plan of a config as plain values; needs neither Ray nor weights.

    Epochs and tails are there when the shards are prepared (`data.prepared`, or in the cache).
    """
    from tst_ray.architecture import check_supported, describe, precision_to_try
    from tst_ray.model_config import hf_config
    from tst_ray.shape import mixture_remark

    plan = build_plan(config)
    manifest = find_prepared(config)
    model_config = hf_config(
        config.model,
        vocab_size=manifest.vocab_size if manifest else _vocabulary(config),
        eot_token=manifest.eot_token if manifest else None,
    )
    check_supported(
        model_config, latent_length=plan.sequence_length, precision=precision_to_try(config)
    )
    shape = describe(model_config)
    phases = [_phase_facts(config, plan, shape, phase) for phase in plan.phases]
    facts: dict[str, Any] = {
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "vocab_size": shape.vocab_size,
        "remark": mixture_remark(model_config),
        "total_steps": plan.total_steps,
        "total_data_tokens": plan.total_data_tokens,
        "total_latent_tokens": plan.total_latent_tokens,
        "total_flops": sum(phase["flops_per_step"] * phase["steps"] for phase in phases),
        "warmup_steps": plan.warmup_steps,
        "decay_steps": plan.decay_steps,
        "phases": phases,
    }
    if manifest:
        order = build_order(config, plan, manifest)
        names = [source.name for source in manifest.sources]
        facts["corpus"] = {
            "folder": manifest.folder,
            "mixture": mixture(order),
            "train_tokens": {source.name: source.train.tokens for source in manifest.sources},
            "validation_tokens": {
                source.name: source.validation.tokens for source in manifest.sources
            },
        }
        for phase in plan.phases:
            for name, of_sources in (
                ("epochs_after", order.epochs_after(phase.index)),
                ("tail_tokens", order.tail_tokens(phase.index)),
                ("dropped_tokens", order.dropped_tokens(phase.index)),
            ):
                phases[phase.index][name] = dict(zip(names, of_sources, strict=True))
    return facts


def _vocabulary(config: Config) -> int | None:
    """The vocabulary where no shards tell: of a tokenizer to train, else the model's own."""
    return config.data.vocab_size if config.data.tokenizer == "train" else None


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
    active = facts["active_parameters"]
    extra = f", {active:,} active" if active != facts["parameters"] else ""
    say(f"model      {facts['parameters']:,} parameters{extra}, vocabulary {facts['vocab_size']:,}")
    if facts["remark"]:
        say(f"           {facts['remark']}")
    say(
        f"run        {facts['total_steps']:,} steps, "
        f"{short_number(facts['total_data_tokens'])} data tokens "
        f"({facts['total_data_tokens']:,}), {short_number(facts['total_flops'])}FLOP"
    )
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
        for size, split in phase["batch_split"].items():
            say(f"  {size:>4} workers: {split} sequences")
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


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
