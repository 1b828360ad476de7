"""Units of work: one unit's files become its shards, in a plain loop or as Ray Data tasks.

    key, Unit ── tokenize_unit ──> <source>/<split>-<key>-<part>.parquet, …
                                       then units/<key>.json, the record that commits them

A unit without a record was not finished. A unit's key is a hash of all that its shards depend on,
so a record found under a wanted key is finished work, as long as its shards are whole. Shards are
named by it as well: two who prepare one folder at a time write one file only if it is the same.

A document that goes on in the other split ends in the one that it leaves: so in each split an
end-of-text token stands between any two documents.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.corpus import Unit
from pipelines.encoder import plain_encoder, within
from pipelines.errors import DataError, Unreadable, one_line
from pipelines.holdout import hold_out
from pipelines.manifest import SPLITS, Shard, damaged_shards
from pipelines.seams import Part, Seams
from pipelines.shards import ShardWriter
from pipelines.storage import below, listed, locate, read_bytes, write_atomically
from pipelines.texts import LeftOut, Text, read_unit

ENCODING = 2  # raised if the same text gives other shards than before
BATCH_BYTES = 2**21
ENCODE_LIMIT_S = 60.0  # for a MiB of text; the slowest tokenizers take about one
MAX_NAMED_SKIPS = 100
Record = dict[str, Any]


# ── one unit of work ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """What every unit of a preparation has in common; travels to the tasks once."""

    folder: str
    tokenizer_json: str
    eot_token: int
    dtype: str
    validation_share: float
    row_tokens: int
    undecodable: str
    max_shard_tokens: int


def tokenize_unit(job: Job, key: str, unit: Unit) -> Record:
    """Write one unit's shards and then the record that commits them, which is returned.

    Raises DataError where storage fails, or for an unreadable text when those are refused.
    """
    writers = {
        split: ShardWriter(
            job.folder,
            f"{unit.source}/{split}-{key[:16]}",
            dtype=job.dtype,
            row_tokens=job.row_tokens,
            max_shard_tokens=job.max_shard_tokens,
        )
        for split in SPLITS
    }
    record: Record = {
        "key": key,
        "source": unit.source,
        "documents": 0,
        "text_bytes": 0,
        "num_skipped": 0,
        "skipped": [],
        "num_cut": 0,
        "cut": [],
    }
    seams = Seams(lambda texts, places: _encodings(job, texts, places), job.eot_token)
    texts = hold_out(
        _readable(read_unit(unit), job, unit, record), job.validation_share, unit.span, unit.name
    )
    for batch in _batches(texts):
        encoded = _encode(job, seams, [text for _, text in batch])
        for (split, _), ids in zip(batch, encoded, strict=True):
            if ids:
                writers[split].add(np.array(ids, job.dtype))
    for split, writer in writers.items():
        record[split] = [asdict(shard) for shard in writer.close()]
    filesystem, root = locate(job.folder)
    write_atomically(filesystem, _record_path(root, key), json.dumps(record).encode())
    return record


def _readable(
    texts: Iterable[Text | LeftOut], job: Job, unit: Unit, record: Record
) -> Iterator[Text]:
    """The readable texts; the others are counted, or refused."""
    for text in texts:
        if isinstance(text, Text):
            record["documents"] += text.ends_document
            record["text_bytes"] += text.num_bytes
            yield text
            continue
        if job.undecodable == "refuse":
            raise DataError(
                f"{below(unit.root, text.path)}: {text.reason}; mend or leave out the file, "
                "or set data.undecodable=skip"
            )
        kind = "cut" if text.is_rest else "skipped"
        record[f"num_{kind}"] += 1
        if len(record[kind]) < MAX_NAMED_SKIPS:
            record[kind].append({"path": text.path, "reason": text.reason})


def _batches(texts: Iterable[tuple[str, Text]]) -> Iterator[list[tuple[str, Text]]]:
    """A few MiB of texts together, each with its split."""
    batch: list[tuple[str, Text]] = []
    num_bytes = 0
    for split, text in texts:
        batch.append((split, text))
        num_bytes += text.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _encode(job: Job, seams: Seams, texts: list[Text]) -> list[list[int]]:
    """The token ids that are sure with each text, an end-of-text token where a document ends."""
    try:
        return seams.encode([Part(text.content, text.ends_document) for text in texts])
    except MemoryError:
        raise
    except TimeoutError as error:
        raise DataError(
            f"tokenizer {job.folder}/tokenizer: takes more than {ENCODE_LIMIT_S:.0f} s for a "
            f"megabyte of {_paths(texts)}; its tokenizer.json is at fault (a pattern that tries "
            "ever more ways): set data.tokenizer to another one"
        ) from error
    except Exception as error:  # its library raises bare ones
        raise DataError(
            f"tokenizer {job.folder}/tokenizer: cannot encode {_paths(texts)} "
            f"({one_line(error)}); set data.tokenizer to one that knows every character, or has a "
            "token for the unknown"
        ) from error


def _paths(texts: list[Text]) -> str:
    """The first file that texts are from, and how many more."""
    first, *others = dict.fromkeys(text.path for text in texts)
    return f"{first} or {len(others)} other files" if others else first


def _encodings(job: Job, texts: Sequence[str], with_places: bool) -> Sequence[Any]:
    """The tokenizer's encodings. Raises TimeoutError, or what its library raises."""
    encoder = plain_encoder(job.tokenizer_json, job.eot_token)
    encode = encoder.encode_batch if with_places else encoder.encode_batch_fast
    limit_s = ENCODE_LIMIT_S * max(1.0, sum(map(len, texts)) / 2**20)
    return within(limit_s, lambda: encode(list(texts), add_special_tokens=False))


# ── all units: in a loop, or through Ray Data ────────────────────────────────────────────────────


def run_inline(job: Job, units: dict[str, Unit]) -> Iterator[Record]:
    for key, unit in units.items():
        yield tokenize_unit(job, key, unit)


def run_on_ray(job: Job, units: dict[str, Unit]) -> Iterator[Record]:
    """One Ray Data task per unit (for very many units: per few), a core each.

    Raises DataError where text or storage is to blame, or Ray lost the tasks.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    items = [{"unit": pickle.dumps(item)} for item in units.items()]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 10_000))
    dataset.context.enable_progress_bars = False
    try:
        for row in dataset.map(_ray_row, fn_kwargs={"job": job}, num_cpus=1).iter_rows():
            if row["error"]:
                raise DataError(row["error"])
            yield json.loads(row["record"])
    except RayTaskError:  # the function's own, and so a defect
        raise
    except RayError as error:  # a node is lost, or short of memory
        raise DataError(
            f"{job.folder}: Ray could not tokenize it all ({one_line(error)}); the same command "
            "goes on with what is left"
        ) from error


def _ray_row(row: dict[str, bytes], *, job: Job) -> dict[str, str]:
    """A unit's outcome as a row: JSON, as the tables between tasks need equal columns."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the task was given one core
    try:
        record = tokenize_unit(job, *pickle.loads(row["unit"]))
    except (DataError, OSError) as error:  # told by the driver in its one line, not by Ray in many
        return {"record": "", "error": str(error)}
    return {"record": json.dumps(record), "error": ""}


# ── finished work ────────────────────────────────────────────────────────────────────────────────


def _record_path(root: str, key: str) -> str:
    return f"{root}/units/{key[:32]}.json"


def kept_records(folder: str, keys: Collection[str]) -> dict[str, Record]:
    """The records of those keys that are finished and whose shards are there, whole.

    A damaged record does not count as finished. Raises Unreadable where storage fails.
    """
    records = _finished_records(folder, keys)
    shards = {key: all_shards(record) for key, record in records.items()}
    damaged = damaged_shards(folder, [shard for group in shards.values() for shard in group])
    return {
        key: record
        for key, record in records.items()
        if not any(shard.file in damaged for shard in shards[key])
    }


def _finished_records(folder: str, keys: Collection[str]) -> dict[str, Record]:
    filesystem, root = locate(folder)
    names = {info.base_name for info in listed(filesystem, f"{root}/units")}
    found = [key for key in keys if os.path.basename(_record_path(root, key)) in names]

    def read(key: str) -> Record | None:
        path = _record_path(root, key)
        try:
            record = json.loads(read_bytes(filesystem, path))
        except OSError as error:
            raise Unreadable(f"{path}: cannot be read ({one_line(error)})") from error
        except ValueError:
            return None
        return record if isinstance(record, dict) and _is_record(record, key) else None

    with ThreadPoolExecutor(16) as pool:
        return {record["key"]: record for record in pool.map(read, found) if record}


def _is_record(record: Record, key: str) -> bool:
    """Whether a record is that of a key, with shards in the folder."""
    try:
        all_shards(record)
    except (KeyError, TypeError, DataError):
        return False
    return record.get("key") == key


def all_shards(record: Record) -> list[Shard]:
    return [shard for split in SPLITS for shard in record_shards(record, split)]


def record_shards(record: Record, split: str) -> tuple[Shard, ...]:
    return tuple(Shard(**shard) for shard in record[split])
