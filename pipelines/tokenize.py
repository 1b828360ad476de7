"""Text to token shards, through Ray Data: `prepare`.

    sources ── find_files ──> corpora ── plan_units ──> units of work
                                 │                         │  kept: finished before, shards whole
                     tokenizer: trained or loaded          │  todo: Ray Data, or a plain loop
                                 └───── tokenize_unit ─────┘
                                              │
                                              └──> shards and records, then manifest.json

A unit's key is a hash of the settings, the tokenizer and its files' names, sizes and times, so a
unit is done again only if one of these changed. Its shards are named by its key: good shards are
never altered or deleted, and a reader by an older manifest goes on undisturbed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from pipelines.corpus import (
    Corpus,
    SourceSpec,
    facts,
    find_files,
    named_sources,
    plan_units,
    source_root,
)
from pipelines.duplicates import told_duplicates
from pipelines.errors import BadInput, DataError, Unreadable, one_line
from pipelines.holdout import section_span
from pipelines.manifest import (
    SPLITS,
    VERSION,
    Manifest,
    Source,
    Split,
    damaged_shards,
    verify_shards,
)
from pipelines.progress import shown_bytes, told_while
from pipelines.shards import MAX_SHARD_TOKENS
from pipelines.storage import locate, read_bytes, write_atomically
from pipelines.texts import LeftOut, read_file, sample_texts
from pipelines.tokenizer import (
    TRAIN,
    is_whole,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    tokenizer_identity,
    train_tokenizer,
    vocabulary_size,
)
from pipelines.units import (
    ENCODING,
    MAX_NAMED_SKIPS,
    Job,
    Record,
    all_shards,
    kept_records,
    record_shards,
    run_inline,
    run_on_ray,
)

# Measured on the standard library, V = 1,024, tested on an eighth of its files: 2.57 bytes a token
# from 4 or 8 Mi characters, 2.59 from 16; training takes 0.5, 0.9 and 2.1 s on two cores.
SAMPLE_CHARACTERS = 2**23
PREPARATION = "preparation.json"


# ── the settings that shards depend on ───────────────────────────────────────────────────────────


def shard_settings(
    sources: Sequence[SourceSpec],
    *,
    tokenizer: str,
    vocab_size: int,
    validation_share: float,
    row_tokens: int,
    undecodable: str,
) -> dict[str, Any]:
    """Everything but the texts themselves that decides what is in the shards."""
    return {
        "version": VERSION,
        "sources": [
            {"name": spec.name, "path": source_root(spec), "text_field": spec.text_field}
            for spec in named_sources(sources)
        ],
        "tokenizer": tokenizer_identity(tokenizer, vocab_size),
        "validation_share": validation_share,
        "encoding": ENCODING,
        "row_tokens": row_tokens,
        "undecodable": undecodable,
    }


def prepared_folder(
    cache: str,
    sources: Sequence[SourceSpec],
    *,
    tokenizer: str,
    vocab_size: int,
    validation_share: float,
    row_tokens: int,
    undecodable: str,
) -> str:
    """Where under `cache` the shards of these settings go, so that runs which agree share them."""
    settings = shard_settings(
        sources,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_share=validation_share,
        row_tokens=row_tokens,
        undecodable=undecodable,
    )
    names = "+".join(source["name"] for source in settings["sources"])[:48]
    return f"{cache.rstrip('/')}/{names}-{_hash(settings)[:12]}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ── the whole ────────────────────────────────────────────────────────────────────────────────────


def prepare(
    sources: Sequence[SourceSpec],
    *,
    folder: str,
    tokenizer: str = TRAIN,
    vocab_size: int = 1024,
    validation_share: float = 0.02,
    row_tokens: int = 65_536,
    undecodable: str = "skip",
    backend: str = "inline",
    max_shard_tokens: int = MAX_SHARD_TOKENS,
    skip: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
    workplace: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Manifest:
    """Turn text into token shards in `folder`, doing only what is not done yet.

    `backend` "ray" spreads the units over the Ray that is connected by then, "inline" works them
    off here; the shards are the same bit for bit. They are worked off in a `workplace()`, which is
    entered only if some are not done yet. `undecodable` texts are counted and left out
    ("skip"), or end the preparation ("refuse"). Of a source, the folders in `skip` are no part, nor
    is this one. The shards of the manifest that is returned are verified. Raises DataError, in one
    line, for whatever is wrong with the input or the folder.
    """
    _check_choices(validation_share, row_tokens, undecodable, backend)
    specs = named_sources(sources)
    settings = shard_settings(
        specs,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_share=validation_share,
        row_tokens=row_tokens,
        undecodable=undecodable,
    )
    corpora = [_found(spec, (folder, *skip), log) for spec in specs]
    listing = _hash([facts(corpus) for corpus in corpora])
    made_with = {**settings, "listing": listing}
    if done := _unchanged(folder, made_with):
        log(f"{folder}: already prepared, nothing has changed")
        return done
    for corpus in corpora:
        log(f"{corpus.name}: {len(corpus.files):,} files, {corpus.size / 1e6:,.1f} MB")
    if line := told_duplicates(corpora):
        log(line)
    own = _own_tokenizer(folder, tokenizer, vocab_size, settings, corpora, log)
    job = Job(
        folder=folder,
        tokenizer_json=own.backend_tokenizer.to_str(),
        eot_token=own.eos_token_id,
        dtype="uint16" if vocabulary_size(own) <= 2**16 else "uint32",
        validation_share=validation_share,
        row_tokens=row_tokens,
        undecodable=undecodable,
        max_shard_tokens=max_shard_tokens,
    )
    records, made = _all_records(job, settings, corpora, backend, log, workplace)
    manifest = Manifest(
        folder=folder,
        dtype=job.dtype,
        row_tokens=row_tokens,
        vocab_size=vocabulary_size(own),
        eot_token=job.eot_token,
        tokenizer_fingerprint=tokenizer_fingerprint(own),
        sources=tuple(
            _source(corpus, spec, [r for r in records.values() if r["source"] == spec.name])
            for corpus, spec in zip(corpora, specs, strict=True)
        ),
        settings=made_with,
    )
    # The others were looked at when they were kept. Of tasks elsewhere, a folder that not all nodes
    # share has nothing here.
    verify_shards(manifest, (shard for key in made for shard in all_shards(records[key])))
    manifest.save()
    return manifest


def _check_choices(
    validation_share: float, row_tokens: int, undecodable: str, backend: str
) -> None:
    if not 0 <= validation_share < 1:
        raise BadInput(
            f"data.validation_share = {validation_share}: must be at least 0 and below 1"
        )
    if row_tokens < 1:
        raise BadInput(f"data.row_tokens = {row_tokens}: must be at least 1")
    if undecodable not in ("skip", "refuse"):
        raise BadInput(f"data.undecodable = {undecodable!r}: must be skip or refuse")
    if backend not in ("ray", "inline"):
        raise DataError(f"backend = {backend!r}: must be ray or inline")


def _found(spec: SourceSpec, skip: Sequence[str], log: Callable[[str], None]) -> Corpus:
    """A source's files; while its storage does not answer, the log is told."""
    with told_while(log, lambda: f"{spec.name}: waiting for the list of files of {spec.path}"):
        return find_files(spec, skip, log)


def _unchanged(folder: str, settings: dict[str, Any]) -> Manifest | None:
    """The folder's manifest, if it is of these settings and files and all it names is whole."""
    try:
        manifest = Manifest.load(folder)
    except DataError:
        return None
    if manifest.settings != settings or damaged_shards(folder, list(manifest.shards())):
        return None
    own = manifest.tokenizer_folder, manifest.tokenizer_fingerprint, manifest.eot_token
    return manifest if is_whole(*own) else None


def _own_tokenizer(
    folder: str,
    name: str,
    vocab_size: int,
    settings: dict[str, Any],
    corpora: Sequence[Corpus],
    log: Callable[[str], None],
) -> Any:
    """The folder's own tokenizer: made once, then kept with its fingerprint.

    A trained tokenizer outlives changes of the texts: otherwise any change would redo every unit.
    One that is missing or was altered is made again. Raises DataError where that gives another one.
    """
    place = f"{folder}/tokenizer"
    recorded = _recorded_tokenizer(folder, settings)
    if recorded is not None and (own := _loaded(place, recorded)) is not None:
        return own
    made = _trained(corpora, vocab_size, log) if name == TRAIN else load_tokenizer(name)
    if name != TRAIN and recorded is None:  # training has read of each source already
        for corpus in corpora:
            next(sample_texts([corpus], 1), None)
    if recorded is None or recorded.fits(made):
        save_tokenizer(made, place)
    own = load_tokenizer(place) if recorded is None else _loaded(place, recorded)
    if own is None:
        assert recorded is not None
        raise DataError(
            f"{place}: is missing or was altered, and cannot be made again: the shards were made "
            f"with fingerprint {recorded.fingerprint[:12]}…; restore it from a copy, such as a "
            "model folder of a run on these shards, or prepare in another folder"
        )
    if recorded is None:  # written after the tokenizer, and so a sign that it is whole
        content = {
            "settings": settings,
            "tokenizer_fingerprint": tokenizer_fingerprint(own),
            "eot_token": own.eos_token_id,
        }
        filesystem, root = locate(folder)
        write_atomically(filesystem, f"{root}/{PREPARATION}", json.dumps(content).encode())
    return own


@dataclass(frozen=True)
class _Recorded:
    """The tokenizer that a folder was prepared with; older versions did not note its last token."""

    fingerprint: str
    eot_token: int | None

    def fits(self, tokenizer: Any) -> bool:
        """Whether a tokenizer is the same."""
        is_same = tokenizer_fingerprint(tokenizer) == self.fingerprint
        return is_same and self.eot_token in (None, tokenizer.eos_token_id)


def _loaded(place: str, recorded: _Recorded) -> Any:
    """The tokenizer in a folder; None where it is not the one that was recorded."""
    try:
        own = load_tokenizer(place)
    except DataError:
        return None
    return own if recorded.fits(own) else None


def _trained(corpora: Sequence[Corpus], vocab_size: int, log: Callable[[str], None]) -> Any:
    """A tokenizer trained on the texts. Raises DataError where none of them can be read.

    One that was trained on nothing must not be kept: it would outlive the mending of the texts.
    """
    log(f"training a byte-level BPE tokenizer of {vocab_size:,} tokens")
    texts = sample_texts(corpora, SAMPLE_CHARACTERS)
    first = next(filter(None, texts), None)
    if first is None:
        corpus = corpora[0]
        found = read_file(corpus.root, corpus.files[0], corpus.text_field)
        reasons = (f"{text.path}: {text.reason}" for text in found if isinstance(text, LeftOut))
        why = next(reasons, f"{corpus.files[0].path}: no text in it")
        raise DataError(
            f"source {corpus.root}: nothing to train a tokenizer on, such as {why}; "
            "name files of UTF-8 text"
        )
    with told_while(log, lambda: "still training the tokenizer"):
        tokenizer = train_tokenizer(chain([first], texts), vocab_size)
    if (size := vocabulary_size(tokenizer)) < vocab_size:
        log(f"the text gives {size:,} different tokens, fewer than the {vocab_size:,} asked for")
    return tokenizer


def _recorded_tokenizer(folder: str, settings: dict[str, Any]) -> _Recorded | None:
    """The tokenizer that an earlier preparation left here, if there was one.

    Raises DataError where that one had other settings: its shards are not for us to replace; and
    Unreadable where storage fails.
    """
    try:
        before = _preparation(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(f"{folder}/{PREPARATION}: cannot be read ({one_line(error)})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}/{PREPARATION}: cannot be read ({one_line(error)}); "
            "prepare in another folder, or delete this one"
        ) from error
    others, recorded = before
    if others != settings:
        differing = ", ".join(key for key in settings if others.get(key) != settings[key])
        raise DataError(
            f"{folder}: was prepared with other settings ({differing}); "
            "prepare in another folder, or delete this one"
        )
    return recorded


def _preparation(folder: str) -> tuple[dict[str, Any], _Recorded]:
    """The settings and the tokenizer that a folder was prepared with.

    The manifest has them as well, where there is one. Raises whatever reading them does.
    """
    filesystem, root = locate(folder)
    manifest = None
    with contextlib.suppress(DataError):
        manifest = Manifest.load(folder)
    try:
        before = json.loads(read_bytes(filesystem, f"{root}/{PREPARATION}"))
        eot_token = before.get("eot_token", manifest and manifest.eot_token)
        recorded = _Recorded(str(before["tokenizer_fingerprint"]), eot_token)
        return dict(before["settings"]), recorded
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        if manifest is None:
            raise
        own = {key: value for key, value in manifest.settings.items() if key != "listing"}
        return own, _Recorded(manifest.tokenizer_fingerprint, manifest.eot_token)


def _all_records(
    job: Job,
    settings: dict[str, Any],
    corpora: Sequence[Corpus],
    backend: str,
    log: Callable[[str], None],
    workplace: Callable[[], AbstractContextManager[Any]],
) -> tuple[dict[str, Record], set[str]]:
    """The record of every unit by its key, in the corpus's order; and which were made now."""
    salt = _hash([settings, asdict(replace(job, folder=""))])  # a folder that moves stays good
    units = {
        _hash([salt, facts(unit)]): unit
        for corpus in corpora
        for unit in plan_units(corpus, section_span(corpus.size, job.validation_share))
    }
    records = kept_records(job.folder, units)
    todo = {key: unit for key, unit in units.items() if key not in records}
    kept = f", {len(records):,} more were finished before" if records else ""
    log(f"tokenizing {len(todo):,} units of work{kept}")
    total, done = sum(unit.size for unit in todo.values()), 0
    told = told_while(log, lambda: f"{shown_bytes(done, total)} of text are tokenized")
    with workplace() if todo else nullcontext(), told:
        for record in (run_on_ray if backend == "ray" else run_inline)(job, todo) if todo else ():
            records[record["key"]] = record
            done += todo[record["key"]].size
    return {key: records[key] for key in units}, set(todo)


def _source(corpus: Corpus, spec: SourceSpec, records: Sequence[Record]) -> Source:
    """A source's entry in the manifest. Raises DataError where it gives nothing to train on."""
    splits = {
        split: Split.of(
            tuple(shard for record in records for shard in record_shards(record, split))
        )
        for split in SPLITS
    }
    skipped, cut = (
        tuple(text for record in records for text in record.get(kind, ()))[:MAX_NAMED_SKIPS]
        for kind in ("skipped", "cut")
    )
    source = Source(
        name=corpus.name,
        path=spec.path,
        documents=sum(record["documents"] for record in records),
        text_bytes=sum(record["text_bytes"] for record in records),
        num_skipped=sum(record["num_skipped"] for record in records),
        skipped=skipped,
        num_cut=sum(record.get("num_cut", 0) for record in records),  # older records have none
        cut=cut,
        **splits,
    )
    if not source.train.tokens:
        raise DataError(
            f"source {spec.path}: gives nothing to train on: {source.documents:,} documents, "
            f"{source.validation.tokens:,} tokens held out, left out {source.left_out or 'nothing'}"
            "; name more text, or lower data.validation_share"
        )
    return source
