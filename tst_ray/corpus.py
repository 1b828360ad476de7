"""The run's corpus: text → shards → order → what each phase reads.

check_inputs        whether the text, the tokenizer or the shards that settings name are there
prepare_corpus      `data.prepared`, or shards made from `data.sources`; verified
corpus_begun_with   the shards of a run that goes on; verified
build_order         which tokens at which step, over those shards
build_feeds         what a reader of each phase needs
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pipelines.corpus import Corpus, SourceSpec, check_source, find_files
from pipelines.errors import BadInput, DataError, Missing, Unreadable
from pipelines.ingest import Feed
from pipelines.manifest import Manifest, verify_shards
from pipelines.order import Order, PhaseLayout, StreamSource
from pipelines.storage import absolute
from pipelines.tokenize import prepare, prepared_folder
from pipelines.tokenizer import check_tokenizer, check_tokenizer_name
from tst_ray.errors import ConfigError, RunError
from tst_ray.plan import Plan
from tst_ray.settings import Config, shipped_values
from tst_ray.storage import Storage

Say = Callable[[str], None]
Workplace = Callable[[], AbstractContextManager[Any]]

_FAR = 2.0  # times as much or as little held out as was asked for


def check_inputs(config: Config) -> None:
    """Refuse settings that name what is not there, as far as that is seen on this machine's disks.

    Storage elsewhere is asked only when it is read.

    Raises:
        BadInput: with the setting and the remedy.
    """
    data = config.data
    if data.prepared:
        if "://" not in data.prepared:
            _manifest(data.prepared)
        return
    for source in data.sources:
        check_source(source.path)
    check_tokenizer_name(data.tokenizer)


def _manifest(prepared: str) -> Manifest:
    """The manifest in `data.prepared`. Raises BadInput if there is none."""
    folder = absolute(prepared)
    try:
        return Manifest.load(folder)
    except Missing as error:
        raise BadInput(
            f"data.prepared = {prepared}: no folder of shards (no manifest.json in it); make one "
            "with `tst-ray prepare`, or correct the folder's name"
        ) from error


def prepare_corpus(
    config: Config, backend: str, say: Say, workplace: Workplace = nullcontext
) -> Manifest:
    """The run's shards: those named by `data.prepared`, or made from `data.sources`.

    Args:
        workplace: where text is tokenized; entered only if some is to do.

    Raises:
        DataError: with the file and the remedy.
    """
    if config.data.prepared:
        manifest = _manifest(config.data.prepared)
        tokenizer = config.data.tokenizer
        check_tokenizer(manifest, None if tokenizer == "train" else tokenizer)
        for remark in _ignored(config, manifest):
            say(remark)
        verify_shards(manifest)
    else:
        sources, settings, folder = _preparation(config)
        ours = (cache_folder(config),)
        how: dict[str, Any] = {"backend": backend, "log": say, "workplace": workplace}
        manifest = prepare(sources, folder=folder, skip=ours, **how, **settings)
    for source in manifest.sources:
        if source.left_out:
            say(f"{source.name}: left out {source.left_out}")
    for line in (_unevaluated(config, manifest), uneven_share(manifest)):
        if line:
            say(line)
    return manifest


def uneven_share(manifest: Manifest) -> str | None:
    """What is told if far less or far more text is held out than was asked for.

    Of a few documents, or very unequal ones, a share of them may be any share of the tokens.
    """
    asked = manifest.settings.get("validation_share")
    if not asked:
        return None
    shares = {
        source.name: source.validation.tokens / (source.train.tokens + source.validation.tokens)
        for source in manifest.sources
    }
    far = [
        f"{share:.2%} of {name}"
        for name, share in shares.items()
        if not asked / _FAR <= share <= asked * _FAR
    ]
    if not far:
        return None
    return (
        f"held out for validation are {', '.join(far)}, where data.validation_share asks for "
        f"{asked:.2%}: the text is short, or a few of its documents are most of it; add text, or "
        "change the share"
    )


def _unevaluated(config: Config, manifest: Manifest) -> str | None:
    """What is told where a source has no held-out text of a sequence's length."""
    length = config.train.sequence_length + 1
    short = [source.name for source in manifest.sources if source.validation.tokens < length]
    if not short:
        return None
    what = f"the validation loss leaves out {', '.join(short)}"
    if len(short) == len(manifest.sources):
        what = "there is no validation loss"
    return (
        f"{what}: fewer than {length} tokens are held out, which is a sequence; raise "
        "data.validation_share or add documents"
    )


def _ignored(config: Config, manifest: Manifest) -> list[str]:
    """Settings of the user that are not those that the prepared shards were made with."""
    made = {**manifest.settings, "vocab_size": manifest.settings.get("tokenizer", {}).get("train")}
    lines = []
    for name in ("row_tokens", "undecodable", "validation_share", "vocab_size"):
        value, default = getattr(config.data, name), type(config.data).model_fields[name].default
        if value not in (made.get(name), default, *shipped_values("data", name)):
            lines.append(
                f"data.{name} = {value}: is ignored with data.prepared; the shards were made with "
                f"{made.get(name) or 'none'}"
            )
    return lines


def corpus_begun_with(
    config: Config,
    plan: dict[str, Any],
    copy: str,
    backend: str,
    say: Say,
    workplace: Workplace = nullcontext,
) -> Manifest:
    """The shards that a run began with, made again where they are gone.

    Args:
        plan: what the run's plan.json holds.
        copy: the run's manifest.
        workplace: as for `prepare_corpus`.

    Raises:
        ConfigError: they are gone, and the text is not what it was.
        DataError: with the file and the remedy.
    """
    manifest, problem = _begun_with(config, plan, copy)
    if manifest is not None:
        return manifest
    if not config.data.prepared:
        say(f"{problem}; preparing the text again")
    found = prepare_corpus(config, backend, say, workplace)
    if found.fingerprint == plan["corpus"]:
        return found
    # The text has grown; those of its shards that the run reads may be whole again.
    manifest, _ = _begun_with(config, plan, copy)
    if manifest is not None:
        return manifest
    raise ConfigError(
        f"data: {found.folder} holds another corpus (fingerprint {found.fingerprint[:12]}) than "
        f"the run began with ({plan['corpus'][:12]}, {copy}); restore the text, or use another "
        "run.name (an older version read damaged files less far, and long documents uncut)"
    )


def _begun_with(
    config: Config, plan: dict[str, Any], copy: str
) -> tuple[Manifest | None, DataError | None]:
    """The shards that a run began with, by its own manifest: text may have been added since.

    They are looked for where they should be now, and then where they were; but `data.prepared` is
    taken at its word.

    Returns:
        the manifest; or None, and what is wrong.

    Raises:
        Unreadable: storage did not let them be read.
    """
    given = shards_folder(config)
    problem = None
    for folder in (given,) if config.data.prepared else dict.fromkeys((given, plan["shards"])):
        try:
            manifest = Manifest.load(folder, copy)
            if manifest.fingerprint != plan["corpus"]:
                raise DataError(f"{copy}: is of another corpus than the run's plan")
            verify_shards(manifest)
            return manifest, None
        except Unreadable:
            raise
        except DataError as error:
            problem = error
    return None, problem


def copied_manifest(folder: str, copy: str) -> Manifest | None:
    """A run's manifest, for shards in that folder; None where there is none whole.

    Raises:
        Unreadable: storage did not let it be read.
    """
    try:
        return Manifest.load(folder, copy)
    except Unreadable:
        raise
    except DataError:
        return None


def find_prepared(config: Config) -> Manifest | None:
    """The run's shards where they are prepared already, else None."""
    if config.data.prepared:
        return _manifest(config.data.prepared)
    try:
        return Manifest.load(shards_folder(config))
    except (DataError, RunError):
        return None


def source_files(config: Config, spec: SourceSpec, say: Say) -> Corpus:
    """The files of a source of text; what is left out is told.

    Raises:
        DataError: it is not there, or has no text.
    """
    return find_files(spec, (cache_folder(config),), say)


def shards_folder(config: Config) -> str:
    """Where the run's shards are, or will be: in `data.prepared`, or below the cache."""
    prepared = config.data.prepared
    return absolute(prepared) if prepared else _preparation(config)[2]


def source_specs(config: Config) -> tuple[SourceSpec, ...]:
    """The sources of text as `pipelines` knows them."""
    return tuple(
        SourceSpec(path=s.path, name=s.name, weight=s.weight, text_field=s.text_field)
        for s in config.data.sources
    )


def _preparation(config: Config) -> tuple[tuple[SourceSpec, ...], dict[str, Any], str]:
    """The sources, the settings, and the folder of shards that belongs to them."""
    data = config.data
    sources = source_specs(config)
    settings: dict[str, Any] = {
        "tokenizer": data.tokenizer,
        "vocab_size": data.vocab_size,
        "validation_share": data.validation_share,
        "row_tokens": data.row_tokens,
        "undecodable": data.undecodable,
    }
    return sources, settings, prepared_folder(cache_folder(config), sources, **settings)


def cache_folder(config: Config) -> str:
    """The folder or URL where shards are kept, a folder for each text."""
    cache = config.data.cache
    return absolute(cache) if cache else f"{Storage(config.run.storage).url}/shards"


def build_order(config: Config, plan: Plan, manifest: Manifest) -> Order:
    """The order of the run over these shards.

    Raises:
        ConfigError: `data.weights` names other sources than there are.
    """
    weights = _weights(config, manifest)
    sources = tuple(
        StreamSource(source.name, source.train.tokens, weight)
        for source, weight in zip(manifest.sources, weights, strict=True)
    )
    layouts = tuple(
        PhaseLayout(
            phase.first_step,
            phase.steps,
            phase.num_sequences,
            phase.data_length,
            phase.lookahead,
        )
        for phase in plan.phases
    )
    block_tokens = manifest.row_tokens
    return Order(sources, layouts, block_tokens, config.data.shuffle_tokens, config.run.seed)


def _weights(config: Config, manifest: Manifest) -> list[float]:
    """Each source's weight in the mixture, as given.

    Without any, all are read at the same pace, so that each has seen as many epochs as the others.
    """
    names = [source.name for source in manifest.sources]
    given = [source.weight for source in config.data.sources]
    if config.data.weights is not None:
        if set(config.data.weights) != set(names):
            raise ConfigError(
                f"data.weights: names {', '.join(config.data.weights)}; the shards have "
                f"{', '.join(names)}; give each of those a weight"
            )
        given = [config.data.weights[name] for name in names]
    if not given or None in given:
        return [float(source.train.tokens) for source in manifest.sources]
    return [float(weight or 0) for weight in given]


def mixture(order: Order) -> dict[str, float]:
    """The share of the training tokens that comes from each source, by name; they sum to 1."""
    total = sum(source.weight for source in order.sources)
    return {source.name: source.weight / total for source in order.sources}


def shown_mixture(shares: dict[str, float]) -> str:
    """What `mixture` gives as text: "web 70.0%, code 30.0%"."""
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def build_feeds(
    plan: Plan, order: Order, manifest: Manifest, path: str | None = None
) -> tuple[Feed, ...]:
    """One feed a phase, over the manifest at `path` (unless given, that of the shards)."""
    path = path or f"{manifest.folder}/manifest.json"
    return tuple(
        Feed(
            manifest.folder,
            path,
            manifest.fingerprint,
            order,
            phase.index,
            phase.input_bag,
            manifest.dtype,
        )
        for phase in plan.phases
    )
