"""What people read about a run: its plan before, its status during, its summary after.

Each comes as plain facts (for --json) and as text made from those facts alone.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from rich.table import Table

from pipelines.errors import one_line
from tst_ray.checkpoint import MARKER, CheckpointInfo, read_meta, step_of, verify
from tst_ray.config import Config
from tst_ray.coordinator import Outcome
from tst_ray.corpus import build_order, find_prepared, mixture, shown_mixture
from tst_ray.curves import TENSORBOARD
from tst_ray.display import describe_phase, duration, plain_console, short_number, show_loss
from tst_ray.errors import RunError
from tst_ray.goodput import Account
from tst_ray.metrics import EVENT_FIELDS, EVENTS, METRICS
from tst_ray.plan import (
    ModelShape,
    Phase,
    Plan,
    batch_split,
    build_plan,
    flops_per_step,
    memory_per_worker,
)
from tst_ray.storage import Storage

_TABLE_WIDTH = 110
_QUICK_BYTES = 256 << 20  # a checkpoint so small is read in about a second
_SILENT_S = 120.0  # a run that trains writes run.json after each step, or every few seconds
_MAX_SPLITS = 16  # world sizes listed a phase; the ends of a longer range say it all


def plan_facts(config: Config) -> dict[str, Any]:
    """The whole plan of a config as plain values; needs neither Ray nor weights.

    Epochs and tails are there when the shards are prepared (`data.prepared`, or in the cache).
    """
    from tst_ray.architecture import check_supported, describe
    from tst_ray.model_config import hf_config

    plan = build_plan(config)
    manifest = find_prepared(config)
    model_config = hf_config(
        config.model,
        vocab_size=manifest.vocab_size if manifest else _vocabulary(config),
        eot_token=manifest.eot_token if manifest else None,
    )
    check_supported(model_config, latent_length=plan.sequence_length)
    shape = describe(model_config)
    phases = [_phase_facts(config, plan, shape, phase) for phase in plan.phases]
    facts: dict[str, Any] = {
        "parameters": shape.parameters,
        "active_parameters": shape.active_parameters,
        "vocab_size": shape.vocab_size,
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
            epochs, tails = order.epochs_after(phase.index), order.tail_tokens(phase.index)
            phases[phase.index]["epochs_after"] = dict(zip(names, epochs, strict=True))
            phases[phase.index]["tail_tokens"] = dict(zip(names, tails, strict=True))
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
            tail = phase["tail_tokens"][name]
            say(
                f"  {name}: {epochs:.3f} epochs when it ends; "
                f"{tail:,} tokens an epoch fill no sequence"
            )
    if "corpus" in facts:
        shares = facts["corpus"]["mixture"]
        if len(shares) > 1:
            say()
            say(f"mixture    {shown_mixture(shares)}")
    else:
        say()
        say("corpus     not prepared yet: epochs and tails are told after `tst-ray prepare`")


def wide_console() -> Console:
    """Standard output, wide enough for a table whatever it is piped into."""
    console = plain_console()
    console.width = max(console.width, _TABLE_WIDTH)
    return console


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def settings_table() -> str:
    """Every field of the config with its default and meaning, as a Markdown table."""
    rows = ["| field | default | meaning |", "|---|---|---|"]
    for section, section_field in Config.model_fields.items():
        fields = getattr(section_field.annotation, "model_fields", None)
        if fields is None:
            rows.append(f"| `{section}` | none | {_cell(section_field.description)} |")
            continue
        defaults = getattr(Config(), section).model_dump(mode="json", by_alias=True)
        for name, field in fields.items():
            name = field.alias or name
            default = _default_words(defaults[name], f"{section}.{name}")
            meaning = _cell(field.description) + _choices(field.annotation)
            rows.append(f"| `{section}.{name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _choices(annotation: Any) -> str:
    """The values that a field takes, where they are few."""
    if get_origin(annotation) is not Literal:
        return ""
    return f" ({', '.join(f'`{value}`' for value in get_args(annotation))})"


def _cell(text: str | None) -> str:
    """Text for a Markdown table: angle brackets would be taken for HTML."""
    return (text or "").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")


def _default_words(value: Any, path: str) -> str:
    if path == "model.config":
        return "`demo-0.4m`"
    if path == "data.sources":
        return "`[python-stdlib]`"
    return "" if value in (None, {}, []) else f"`{json.dumps(value)}`"


def status_facts(run: Storage) -> dict[str, Any]:
    """Where a run stands, from its directory alone.

    Raises:
        RunError: it is not a run directory.
    """
    state = _state_of(run)
    records = run.tail_records(METRICS, 1 << 16, ("step", "step_time_s"))
    step_time_s = sum(r["step_time_s"] for r in records) / len(records) if records else None
    left = state["total_steps"] - state["step"] if "total_steps" in state else None
    silent_s = time.time() - state["updated"]
    silent = state["status"] == "running" and silent_s > max(_SILENT_S, 5 * (step_time_s or 0))
    running = state["status"] == "running" and not silent
    newest = next((c for c in checkpoint_facts(run) if c["state"] == "committed"), None)
    account = Account.from_dict(state.pop("time", None), time.time())
    return {
        "run": run.url,
        **state,
        "last_update_s_ago": round(silent_s, 1),
        "silent": silent,
        "eta_s": round(left * step_time_s, 1) if running and left and step_time_s else None,
        "newest_checkpoint": newest["step"] if newest else None,
        "newest_checkpoint_checked": newest["checked"] if newest else None,
        "goodput": round(account.goodput, 4),
        "wall_s": round(account.wall_s, 3),
        "time_s": {part: round(seconds, 3) for part, seconds in account.parts.items()},
        "last_record": records[-1] if records else None,
        "last_events": run.tail_records(EVENTS, 1 << 20, EVENT_FIELDS)[-5:],
    }


def _state_of(run: Storage) -> dict[str, Any]:
    state = run.read_json("run.json")
    if state is None:
        raise RunError(f"{run.url}: not a run directory, or one that has not started (no run.json)")
    return dict(state)


def print_status(facts: dict[str, Any]) -> None:
    """The status as text."""
    say = plain_console().print
    say(f"{facts['run']}: {facts['status']}")
    if "step" in facts and "total_steps" in facts:
        say(
            f"phase {facts['phase'] + 1}, step {facts['step']:,} of {facts['total_steps']:,}, "
            f"{facts['world_size']} worker(s), attempt {facts['attempt']}"
        )
    if facts["silent"]:
        say(
            f"nothing heard of it for {duration(facts['last_update_s_ago'])}: if its driver is "
            "gone, the same command resumes it"
        )
    if facts["eta_s"] is not None:
        say(f"about {duration(facts['eta_s'])} left")
    if facts["newest_checkpoint"]:
        say(
            f"newest checkpoint: step {facts['newest_checkpoint']:,} "
            f"(verified by {facts['newest_checkpoint_checked']})"
        )
    for line in account_lines(facts["time_s"]):
        say(line)
    for event in facts["last_events"]:
        say(f"  {_event_line(event)}")


def _event_line(event: dict[str, Any]) -> str:
    shown = {
        k: v
        for k, v in event.items()
        if k not in ("time", "event", "times", "node", "nodes", "spans")
    }
    details = ", ".join(f"{k} {v}" for k, v in shown.items())
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    return f"{when}  {event['event']}  {details}"


def account_lines(time_s: dict[str, float]) -> list[str]:
    """Where the wall time went: a line for the whole, and one for each part that took any."""
    wall = sum(time_s.values())
    if wall <= 0:
        return []
    lines = [f"time: {duration(wall)} in all, {time_s['stepping'] / wall:.1%} in steps that count"]
    parts = sorted(time_s.items(), key=lambda part: -part[1])
    lines += [
        f"  {name.replace('_', ' '):<18} {seconds:10,.1f} s  {seconds / wall:6.1%}"
        for name, seconds in parts
        if seconds >= 0.05
    ]
    return lines


def checkpoint_facts(run: Storage, verify_all: bool = False) -> list[dict[str, Any]]:
    """Every checkpoint in a run directory, newest first.

    Args:
        verify_all: whether to read all files of all of them; else only the sizes are looked at, and
            the files of the newest where that is quick.

    Returns:
        step, state (committed, damaged, unreadable, uncommitted), checked (checksums or sizes),
        bytes, world_size, problem.
    """
    root = run / "checkpoints"
    found: list[dict[str, Any]] = []
    for name in reversed(root.names()):
        if (step := step_of(name)) is not None:
            facts = _facts_of(CheckpointInfo(step, root / name, {}), verify_all, not found)
            found += [facts] if facts else []
    return found


def _facts_of(info: CheckpointInfo, verify_all: bool, is_newest: bool) -> dict[str, Any] | None:
    """What is found of one; None where it has gone meanwhile: a run prunes while it trains."""
    facts: dict[str, Any] = {"step": info.step, "state": "uncommitted", "checked": None}
    if not info.folder.exists(MARKER):
        return facts if info.folder.exists() else None
    with contextlib.suppress(ValueError, OSError):  # to be told by `verify`
        info = read_meta(info)
    num_bytes = sum(entry["bytes"] for entry in info.meta.get("files", ()))
    contents = verify_all or (is_newest and num_bytes <= _QUICK_BYTES)
    facts["checked"] = "checksums" if contents else "sizes"
    try:
        problem = verify(info, contents=contents)
        facts["state"] = "damaged" if problem else "committed"
    except OSError as error:
        problem, facts["state"] = one_line(error), "unreadable"
    if problem:
        with contextlib.suppress(OSError):
            if not info.folder.exists(MARKER):
                return None
        return {**facts, "problem": problem}
    return {**facts, "problem": None, "bytes": num_bytes, "world_size": info.meta["world_size"]}


def print_checkpoints(facts: list[dict[str, Any]]) -> None:
    """The checkpoints as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "state", "verified by", "bytes", "workers", "problem"):
        table.add_column(column, justify="right" if column in ("step", "bytes") else "left")
    for entry in facts:
        table.add_row(
            f"{entry['step']:,}",
            entry["state"],
            entry["checked"] or "",
            f"{entry['bytes']:,}" if "bytes" in entry else "",
            str(entry.get("world_size", "")),
            entry.get("problem") or "",
        )
    wide_console().print(table)


def print_summary(outcome: Outcome, console: Console) -> None:
    """What a finished run did, and where everything is."""
    say = console.print
    say()
    for phase in outcome.plan.phases:
        did = f"{phase.steps:,} steps, {phase.data_tokens:,} data tokens"
        if record := outcome.records.get(phase.index):
            size = record["world_size"]
            did += f", {size} worker{'s' if size != 1 else ''}, loss {show_loss(record['loss'])}"
        say(f"{describe_phase(phase, len(outcome.plan.phases))}: {did}")
    if outcome.val_loss is not None:
        say(f"final validation loss: {outcome.val_loss:.4f} nats a token")
    if outcome.samples:
        say("the model writes:")
        for sample in outcome.samples:
            for line in [line for line in sample.splitlines() if line.strip()][:2]:
                say(f"    {line}")
    for line in account_lines(outcome.account.parts):
        say(line)
    run = outcome.run
    say(f"run directory:  {run.url}")
    say(f"curves:         tensorboard --logdir {run.url}/{TENSORBOARD}")
    say(f"model folder:   {outcome.model_folder}")
    if outcome.log_path:
        say(f"Ray's own logs: {outcome.log_path}")
