"""What people read about a run: its status and its checkpoints while it trains, its summary after.

Each comes as plain facts (for --json) and as text made from those facts alone.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.errors import one_line
from tst_ray.checkpoint import MARKER, CheckpointInfo, read_meta, step_of, verify
from tst_ray.coordinator import Outcome
from tst_ray.curves import TENSORBOARD
from tst_ray.display import (
    describe_phase,
    duration,
    percent,
    plain_console,
    short_number,
    show_loss,
    wide_console,
)
from tst_ray.errors import RunError
from tst_ray.goodput import Account
from tst_ray.liveness import driver_state
from tst_ray.metrics import EVENT_FIELDS, EVENTS, METRICS, recent_records
from tst_ray.outlook import overfit
from tst_ray.storage import Storage

_QUICK_BYTES = 256 << 20  # a checkpoint so small is read in about a second
_LAST_STEPS = 50  # whose mean is the training loss that a run ended with
_RECENT_STEPS = 100  # by which speed is told
_SILENT_S = 120.0  # a run that trains writes run.json after each step, or every few seconds


def status_facts(run: Storage) -> dict[str, Any]:
    """Where a run stands, from its directory alone.

    Raises:
        RunError: it is not a run directory.
    """
    state = _state_of(run)
    records = run.tail_records(METRICS, 1 << 20, ("step", "step_time_s"))
    recent = records[-_RECENT_STEPS:]
    step_time_s = sum(r["step_time_s"] for r in recent) / len(recent) if recent else None
    left = state["total_steps"] - state["step"] if "total_steps" in state else None
    silent_s = time.time() - state["updated"]
    at_work = state["status"] in ("starting", "running")
    silent = at_work and silent_s > max(_SILENT_S, 5 * (step_time_s or 0))
    driver = driver_state(run) if at_work else None
    running = state["status"] == "running" and not silent and driver != "gone"
    newest = next((c for c in checkpoint_facts(run) if c["state"] == "committed"), None)
    account = Account.from_dict(state.pop("time", None), time.time())
    return {
        "run": run.url,
        **state,
        "last_update_s_ago": round(silent_s, 1),
        "silent": silent,
        "driver": driver,
        **_progress_facts(records),
        "eta_s": round(left * step_time_s, 1) if running and left and step_time_s else None,
        "newest_checkpoint": newest["step"] if newest else None,
        "newest_checkpoint_checked": newest["checked"] if newest else None,
        "goodput": round(account.goodput, 4),
        "wall_s": round(account.wall_s, 3),
        "time_s": {part: round(seconds, 3) for part, seconds in account.parts.items()},
        "last_record": records[-1] if records else None,
        "last_events": run.tail_records(EVENTS, 1 << 20, EVENT_FIELDS)[-5:],
    }


def _progress_facts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Losses and speed by the newest records; None where there are none.

    A speed is that of the steps alone: evaluations and waiting are in the account of time.
    """
    last = records[-1] if records else {}
    recent = [r for r in records[-_RECENT_STEPS:] if r.get("phase") == last.get("phase")]
    seconds = sum(record["step_time_s"] for record in recent)
    evaluated = [record["val_loss"] for record in records if record.get("val_loss") is not None]
    return {
        "loss": last.get("loss"),
        "val_loss": evaluated[-1] if evaluated else None,
        "steps_per_s": round(len(recent) / seconds, 3) if seconds else None,
        "tokens_per_s": last.get("tokens_per_s"),
    }


def _state_of(run: Storage) -> dict[str, Any]:
    state = run.read_json("run.json")
    if state is None:
        raise RunError(f"{run.url}: not a run directory, or one that has not started (no run.json)")
    return dict(state)


def print_status(facts: dict[str, Any]) -> None:
    """The status as text."""
    say = plain_console().print
    gone = facts["driver"] == "gone"
    status = "not running: its driver has ended; the same command resumes it"
    say(f"{facts['run']}: {status if gone else facts['status']}")
    if "step" in facts and "total_steps" in facts:
        workers = facts["world_size"]
        say(
            f"phase {facts['phase'] + 1}, step {facts['step']:,} of {facts['total_steps']:,}, "
            f"{workers} worker{'s' if workers != 1 else ''}, attempt {facts['attempt']}"
        )
    if facts["loss"] is not None or facts["steps_per_s"]:
        say(_progress_line(facts))
    if facts["silent"] and not gone:
        say(
            f"no news of it for {duration(facts['last_update_s_ago'])}: if its driver has ended, "
            "the same command resumes it"
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


def _progress_line(facts: dict[str, Any]) -> str:
    """loss 2.913, validation loss 2.871, 21.4 steps/s, 312k tokens/s"""
    parts = [f"loss {show_loss(facts['loss'])}"]
    if facts["val_loss"] is not None:
        parts.append(f"validation loss {show_loss(facts['val_loss'])}")
    if facts["steps_per_s"]:
        parts.append(f"{facts['steps_per_s']:.3g} steps/s")
    if facts["tokens_per_s"]:
        parts.append(f"{short_number(facts['tokens_per_s'])} tokens/s")
    return ", ".join(parts)


def _event_line(event: dict[str, Any]) -> str:
    shown = {
        k: v
        for k, v in event.items()
        if k not in ("time", "event", "times", "node", "nodes", "spans")
    }
    if isinstance(shown.get("phase"), int):
        shown["phase"] += 1  # people count them from 1
    details = ", ".join(f"{k} {v}" for k, v in shown.items())
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    return f"{when}  {event['event']}  {details}"


def account_lines(time_s: dict[str, float]) -> list[str]:
    """Where the wall time went: a line for the whole, and one for each part that took any."""
    wall = sum(time_s.values())
    if wall <= 0:
        return []
    lines = [f"total {duration(wall)}, goodput {percent(time_s['stepping'] / wall)}"]
    parts = sorted(time_s.items(), key=lambda part: -part[1])
    lines += [
        f"  {name.replace('_', ' '):<18} {seconds:10,.1f} s  {percent(seconds / wall):>7}"
        for name, seconds in parts
        if seconds >= 0.05
    ]
    return lines


def checkpoint_facts(
    run: Storage, verify_all: bool = False, key: bytes | None = None
) -> list[dict[str, Any]]:
    """Every checkpoint in a run directory, newest first.

    Args:
        verify_all: whether to read all files of all of them; else only the sizes are looked at, and
            the files of the newest where that is quick.
        key: that must have signed them; None asks for no signature.

    Returns:
        step, state (committed, damaged, unreadable, uncommitted), checked (checksums or sizes),
        bytes, world_size, problem.
    """
    root = run / "checkpoints"
    found: list[dict[str, Any]] = []
    for name in reversed(root.names()):
        if (step := step_of(name)) is not None:
            facts = _facts_of(CheckpointInfo(step, root / name, {}), verify_all, not found, key)
            found += [facts] if facts else []
    return found


def _facts_of(
    info: CheckpointInfo, verify_all: bool, is_newest: bool, key: bytes | None
) -> dict[str, Any] | None:
    """What is found of one; None where it has gone meanwhile: a run prunes while it trains."""
    facts: dict[str, Any] = {"step": info.step, "state": "uncommitted", "checked": None}
    if not info.folder.exists(MARKER):
        return facts if info.folder.exists() else None
    with contextlib.suppress(ValueError, OSError):  # to be told by `verify`
        info = read_meta(info, key)
    num_bytes = sum(entry["bytes"] for entry in info.meta.get("files", ()))
    contents = verify_all or (is_newest and num_bytes <= _QUICK_BYTES)
    facts["checked"] = "checksums" if contents else "sizes"
    try:
        problem = verify(info, contents=contents, key=key)
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
    losses = [record["loss"] for record in recent_records(outcome.run, _LAST_STEPS)]
    losses = [loss for loss in losses if loss is not None]
    if warning := overfit(losses, outcome.val_loss, outcome.passes):
        say(warning)
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
