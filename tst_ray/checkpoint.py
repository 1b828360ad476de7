"""What a checkpoint is: committed last, verified before use.

    checkpoints/step-00001200/
        __0_0.distcp …  .metadata    written by torch.distributed.checkpoint, each rank its own
        meta.json                    step, world size, and every file's size and SHA-256
        COMMITTED                    the SHA-256 of meta.json, and its signature if there is a key;
                                     written last, by rank 0
        DAMAGED                      only where a file was once found altered or missing

A checkpoint without COMMITTED does not exist. One whose files do not match meta.json is damaged:
`find_good` says so and takes the one before; so is one that asks for code to be run, or that the
run's key (`checkpoint.key_file`) did not sign. One that storage does not let be read is not damaged
for that: it is tried again, then passed by without a mark. DCP stores whole tensors by name and
piece, so a checkpoint of any world size loads at any other.

`checkpointer.py` saves and loads them; this module needs no torch until ranks verify together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.errors import one_line
from tst_ray.dcp_metadata import METADATA
from tst_ray.dcp_metadata import problem as metadata_problem
from tst_ray.errors import RunError
from tst_ray.signing import signature, signature_problem
from tst_ray.storage import Storage, patiently
from tst_ray.timeouts import STORAGE_S

log = logging.getLogger(__name__)

MARKER, META, DAMAGED = "COMMITTED", "meta.json", "DAMAGED"
_PLAIN_NAME = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_PATIENCE_S = STORAGE_S  # with the first checkpoint in storage that cannot be read, …
_SHORT_PATIENCE_S = 15.0  # … and with others, and with copies in memory

OnEvent = Callable[..., None]  # called as on_event(kind, **details)


@dataclass(frozen=True)
class CheckpointInfo:
    """A committed checkpoint: where it is, and what its meta.json says."""

    step: int
    folder: Storage
    meta: dict[str, Any]


def folder_name(step: int) -> str:
    """The folder of the checkpoint taken after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for what is no such name."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def committed(root: Storage, damaged: bool = False) -> list[CheckpointInfo]:
    """The committed checkpoints under `root`, newest first; not verified.

    Args:
        damaged: whether to list those too that were once found damaged.
    """
    found = []
    for name in root.names():
        step = step_of(name)
        if step is None:
            continue
        folder = root / name
        if folder.exists(MARKER) and (damaged or not folder.exists(DAMAGED)):
            found.append(CheckpointInfo(step, folder, {}))
    return sorted(found, key=lambda info: -info.step)


def newest_step(run: Storage) -> int:
    """The step of a run's newest committed checkpoint that nobody found damaged; 0 without any.

    Workers, who verify before they load, may find it damaged and go back to an earlier one.
    """
    found = patiently(lambda: committed(run / "checkpoints"))
    return found[0].step if found else 0


def marker(content: bytes, key: bytes | None) -> str:
    """What COMMITTED says of a meta.json: its checksum and, if there is a key, its signature."""
    lines = [hashlib.sha256(content).hexdigest()]
    if key is not None:
        lines.append(signature(key, content))
    return "".join(f"{line}\n" for line in lines)


def read_meta(info: CheckpointInfo, key: bytes | None = None) -> CheckpointInfo:
    """The checkpoint with its meta.json, which must be the one its marker committed.

    Args:
        key: that must have signed it; None asks for no signature.

    Raises:
        ValueError: saying what is damaged.
    """
    try:
        content = info.folder.read(META)
        expected, *signed = info.folder.read(MARKER).decode().splitlines() or [""]
    except FileNotFoundError as error:
        raise ValueError(f"{META} is missing") from error
    if hashlib.sha256(content).hexdigest() != expected.strip():
        raise ValueError(f"{META} is not the one that was committed")
    if key is not None and (problem := signature_problem(key, content, "".join(signed))):
        raise ValueError(problem)
    try:
        meta = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{META} is nested too deeply") from error
    if problem := _meta_problem(meta, info.step):
        raise ValueError(f"{META} {problem}")
    return CheckpointInfo(info.step, info.folder, meta)


def _meta_problem(meta: Any, step: int) -> str | None:
    """What is wrong with what a meta.json says; None if nothing is."""
    try:
        kinds = (("name", str), ("bytes", int), ("sha256", str))
        if not all(isinstance(entry[k], kind) for entry in meta["files"] for k, kind in kinds):
            return "has files without a name, a size or a checksum"
        if not isinstance(meta["world_size"], int):
            return "has no world_size"
        if meta["step"] != step:
            return f"is that of step {meta['step']}"
        names = [entry["name"] for entry in meta["files"]]
    except (KeyError, TypeError) as error:
        return f"misses or misspells {error}"
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            return f"names {name!r}, which is no file of a checkpoint"
    return None if METADATA in names else f"lists no {METADATA}"


def verify_file(folder: Storage, entry: dict[str, Any], contents: bool = True) -> str | None:
    """What is wrong with a file of a checkpoint; None where nothing is.

    Args:
        contents: whether to read it all and compare its checksum, not only its size.
    """
    name = entry["name"]
    try:
        size = folder.size(name)
    except FileNotFoundError:
        return f"{name} is missing"
    if size != entry["bytes"]:
        return f"{name} has {size} bytes instead of {entry['bytes']}"
    if not contents:
        return None
    if folder.sha256(name) != entry["sha256"]:
        return f"{name} has another checksum than when it was written"
    return None


def verify(
    info: CheckpointInfo,
    rank: int = 0,
    world_size: int = 1,
    contents: bool = True,
    key: bytes | None = None,
) -> str | None:
    """What is wrong with this rank's share of a checkpoint's files; None where nothing is.

    Args:
        info: with its meta.json, or without: then it is read.
        key: that must have signed it; None asks for no signature.

    Raises:
        OSError: storage does not let it be read, so that nobody knows.
    """
    try:
        meta = info.meta or read_meta(info, key).meta
        names = {entry["name"] for entry in meta["files"]}
        for entry in meta["files"][rank::world_size]:
            problem = verify_file(info.folder, entry, contents)
            if problem is None and contents and entry["name"] == METADATA:
                problem = metadata_problem(info.folder.read(METADATA), names)
            if problem:
                return problem
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        return one_line(error)
    return None


@dataclass(frozen=True)
class _Verdict:
    """What one rank found of a checkpoint."""

    problem: str | None
    is_known: bool = True  # else storage did not let it be read


def _judge(info: CheckpointInfo, ranks: Ranks, patience_s: float, key: bytes | None) -> _Verdict:
    try:
        return _Verdict(
            patiently(lambda: verify(info, ranks.rank, ranks.size, key=key), patience_s)
        )
    except Exception as error:  # whatever it is, the other ranks must hear of it
        return _Verdict(one_line(error), is_known=False)


class Ranks:
    """The workers that save and load together, talking over a group of their own (gloo).

    Collective: all make theirs in the same order. One process alone needs no group.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1
        self.group = dist.new_group(backend="gloo") if distributed else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in their order; collective."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def find_good(
    roots: Sequence[Storage],
    on_event: OnEvent,
    ranks: Ranks | None = None,
    patience_s: float | None = None,
    key: bytes | None = None,
) -> CheckpointInfo | None:
    """The newest checkpoint that verifies; None where none was ever committed to the last folder.

    Every rank calls this; each verifies its share of the files. A damaged checkpoint is marked, so
    that those who do not verify do not count on it; mended, it counts again.

    Args:
        roots: folders of checkpoints; of the same step, one in an earlier folder is preferred. The
            last is storage; what is before it are copies, which a run can do without.
        on_event: told of "checkpoint_damaged" (rank 0 only).
        ranks: who verifies; this process alone unless given.
        patience_s: how long the first one in storage that cannot be read is tried; as long as a run
            waits for storage, unless given.
        key: that must have signed it; None asks for no signature.

    Raises:
        RunError: there are committed checkpoints in storage, and all are damaged.
        OSError: storage does not let some of them be read, and no other is good.
    """
    ranks = ranks or Ranks()
    # Rank 0's listing for all: on a shared filesystem another rank's may be older.
    candidates: list[CheckpointInfo]
    candidates, stored = ranks.gather(_listed(roots) if ranks.rank == 0 else None)[0]
    unread: str | None = None
    problems: list[str] = []
    for info in candidates:
        is_stored = info.folder.url.startswith(f"{roots[-1].url}/")
        long_s = _PATIENCE_S if patience_s is None else patience_s
        tries_s = long_s if is_stored and unread is None else _SHORT_PATIENCE_S
        verdicts = ranks.gather(_judge(info, ranks, tries_s, key))
        bad = [verdict for verdict in verdicts if verdict.problem is not None]
        if not bad:
            if ranks.rank == 0:
                _mark(info.folder, None)
            return read_meta(info, key)
        # What one rank knows to be damaged is so, whatever another could not read.
        worst = max(bad, key=lambda verdict: verdict.is_known)
        what = "is damaged" if worst.is_known else "cannot be read"
        problems.append(f"step {info.step}: {worst.problem}")
        log.warning("%s %s (%s); trying the one before", info.folder.url, what, worst.problem)
        if not worst.is_known and is_stored:
            unread = worst.problem
        if ranks.rank == 0:
            _tell(info, worst, on_event)
    if unread is not None:
        raise OSError(f"{roots[-1].url}: no good checkpoint can be read now: {unread}")
    if stored:
        raise RunError(
            f"all {stored} checkpoints under {roots[-1].url} are damaged, {candidates[0].step} "
            f"steps would be lost ({problems[0]}); restore one from a copy, or start a new run "
            "with another run.name"
        )
    return None


def _listed(roots: Sequence[Storage]) -> tuple[list[CheckpointInfo], int]:
    """The committed checkpoints of all folders, newest first, and how many are in the last."""
    listed = [committed(root, damaged=True) for root in roots]
    every = sorted((info for infos in listed for info in infos), key=lambda info: -info.step)
    return every, len(listed[-1])


def _tell(info: CheckpointInfo, verdict: _Verdict, on_event: OnEvent) -> None:
    """Tell of a checkpoint that is passed by; a damaged one is marked, and told of once."""
    if not verdict.is_known:
        on_event("checkpoint_unreadable", step=info.step, problem=verdict.problem)
    elif not info.folder.exists(DAMAGED):
        _mark(info.folder, verdict.problem)
        on_event("checkpoint_damaged", step=info.step, problem=verdict.problem)


def _mark(folder: Storage, problem: str | None) -> None:
    """Mark a checkpoint as damaged, or as good again, where storage lets us: a full disk or a
    folder that is only read must not keep a run from the checkpoint before."""
    try:
        if problem is None:
            folder.remove(DAMAGED)
        else:
            folder.write(DAMAGED, problem + "\n")
    except Exception as error:
        log.warning("%s is not marked: %s", folder.url, one_line(error))


def forget_after(root: Storage, step: int) -> None:
    """Remove the checkpoints of more than `step` steps: what they hold must not come back."""
    for info in committed(root, damaged=True):
        if info.step > step:
            remove(info.folder)


def remove(folder: Storage) -> None:
    """Remove a checkpoint."""
    folder.remove(MARKER)  # first: half a checkpoint must not look like one
    folder.remove()
