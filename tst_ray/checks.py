"""Checks across settings: what is well-formed field by field and still cannot work.

Each check yields `Problem`s; config.py reports them together with what is wrong inside fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tst_ray.settings import RESERVED_NAMES, Config, PhaseConfig, TstConfig, shipped_models
from tst_ray.signing import key_problem

SettingPath = tuple[int | str, ...]
"""Where a setting is: keys of mappings and places in lists."""


class Problem(NamedTuple):
    """One thing wrong.

    Attributes:
        path: the setting to blame.
        text: what is wrong, and the remedy.
        about: the other settings that it depends on.
    """

    path: SettingPath
    text: str
    about: tuple[SettingPath, ...] = ()


def dotted(path: SettingPath) -> str:
    """A path as people write it: data.sources[0].path."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def problems(config: Config) -> Iterator[Problem]:
    """Everything wrong with a configuration whose fields are each well-formed."""
    yield from _model_problems(config)
    yield from _data_problems(config)
    yield from _phase_problems(config)
    yield from _schedule_problems(config)
    yield from _cluster_problems(config)
    yield from _checkpoint_problems(config)


def _model_problems(config: Config) -> Iterator[Problem]:
    model, path = config.model, ("model", "source")
    about = (("model",),)
    if model.source is not None and "model_type" in model.config:
        yield Problem(
            path, "model.config is whole (it has model_type); set model to one of them", about
        )
    if model.pretrained and model.source is None:
        yield Problem(
            ("model", "pretrained"),
            "there are no weights to start from; set model.source to a Hugging Face folder or id",
            about,
        )
    elif model.pretrained and config.data.tokenizer == "train" and config.data.prepared is None:
        yield Problem(
            ("data", "tokenizer"),
            f"a pretrained model needs its own tokenizer; set data.tokenizer to {model.source}",
            about,
        )
    elif model.source is not None and "/" not in model.source:
        near = difflib.get_close_matches(model.source.lower(), shipped_models(), 1, 0.8)
        if near and not Path(model.source).exists():
            yield Problem(path, f"no such model; did you mean {near[0]}?", about)


def _data_problems(config: Config) -> Iterator[Problem]:
    data, path = config.data, ("data", "sources")
    if data.prepared is not None and data.sources:
        yield Problem(
            ("data", "prepared"), "data.sources is given too; set only one of them", (path,)
        )
    if data.prepared is None and not data.sources:
        yield Problem(path, "nothing to train on; list at least one path")
    if data.weights is not None and data.prepared is None:
        yield Problem(
            ("data", "weights"),
            "is for data.prepared; give each of data.sources a weight of its own",
            (path, ("data", "prepared")),
        )
    elif data.weights is not None and not sum(data.weights.values()):
        yield Problem(("data", "weights"), "no weight is positive; give at least one that is")
    weights = [source.weight for source in data.sources if source.weight is not None]
    if weights and len(weights) < len(data.sources):
        yield Problem(path, "some sources have a weight and some have none; give each one")
    elif weights and sum(weights) == 0:
        yield Problem(path, "every weight is 0; give at least one a positive weight")
    names = [source.name for source in data.sources]
    for number, name in enumerate(names):
        if name in names[:number] or name in RESERVED_NAMES:
            yield Problem((*path, number, "name"), "this name is taken; set another", (path,))
    if data.tokenizer == "train" and data.prepared is None and data.vocab_size < 257:
        yield Problem(
            ("data", "vocab_size"),
            "a tokenizer of bytes needs at least 257 (every byte, and end of text)",
            (("data", "tokenizer"), ("data", "prepared")),
        )


def _phase_problems(config: Config) -> Iterator[Problem]:
    train, steps = config.train, ("train", "steps")
    if config.phases is not None:
        if config.tst != TstConfig():
            yield Problem(
                ("tst",), "phases is given too; remove tst, its shorthand", (("phases",),)
            )
        total = sum(phase.steps for phase in config.phases)
        if total != train.steps:
            yield Problem(
                steps,
                f"the phases have {total} steps; set {total}, or leave it out",
                (("phases",),),
            )
    elif config.tst.ratio > 0 and not 0 < round(config.tst.ratio * train.steps) < train.steps:
        yield Problem(
            ("tst", "ratio"),
            f"leaves a phase without steps, of train.steps = {train.steps}; "
            "set more steps, or tst.ratio=0 for one phase",
            (steps,),
        )
        return
    for number, phase in enumerate(config.phase_settings()):
        where: SettingPath = ("tst",) if config.phases is None else ("phases", number)
        yield from _fold_problems(config, phase, where)


def _fold_problems(config: Config, phase: PhaseConfig, where: SettingPath) -> Iterator[Problem]:
    batch, length, bag = config.train.batch_size, config.train.sequence_length, phase.bag_size
    yield from _mode_problems(phase, where)
    about: tuple[SettingPath, ...] = (("train", "batch_size"), ("train", "sequence_length"), where)
    if phase.mode != "output_only" and phase.fold != "sequence" and length % bag:
        yield Problem(
            ("train", "sequence_length"),
            f"{dotted((*where, 'fold'))}={phase.fold} cuts sequences into bags of {bag}; "
            f"set a multiple of {bag}, such as {-(-length // bag) * bag}, or fold=sequence",
            about,
        )
    num_sequences, _ = phase.folded(batch, length)
    fewest, _ = config.workers_of(phase)
    if fewest > num_sequences:
        yield Problem(
            ("cluster", "workers") if phase.workers is None else (*where, "workers"),
            f"at least {fewest} workers share {num_sequences} sequences a step, so some would "
            f"never train; allow {num_sequences} or fewer, or raise train.batch_size",
            about,
        )


def _mode_problems(phase: PhaseConfig, where: SettingPath) -> Iterator[Problem]:
    """Settings of a phase that its mode or loss leaves without a meaning."""
    mode, loss = (f"{dotted((*where, name))}={getattr(phase, name)}" for name in ("mode", "loss"))
    one_target = phase.mode == "input_only"
    for name, plain, is_idle, why in (
        ("fold", "sequence", phase.mode == "output_only", f"{mode} cuts no bags"),
        ("loss", "mce", one_target, f"{mode} has one target a position"),
        ("weighting", "uniform", one_target, f"{mode} has one target a position"),
        ("weighting", "uniform", phase.loss == "mce_alt", f"{loss} has no weights of places"),
    ):
        if is_idle and phase.bag_size > 1 and getattr(phase, name) != plain:
            yield Problem((*where, name), f"{why}; leave it {plain}", (where,))


def _schedule_problems(config: Config) -> Iterator[Problem]:
    train = config.train
    warmup, decay = train.steps_of(train.warmup), train.steps_of(train.decay)
    if warmup + decay > train.steps:
        yield Problem(
            ("train", "warmup"),
            f"{warmup} steps of warm-up and {decay} of decay are more than "
            f"train.steps = {train.steps}; shorten them",
            (("train", "decay"), ("train", "steps"), ("phases",)),
        )


def _cluster_problems(config: Config) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.gpus_per_worker not in (0, 1):
        yield Problem(
            ("cluster", "gpus_per_worker"),
            "a worker trains on one GPU of its own, or on CPU; set 1 or 0",
        )


def _checkpoint_problems(config: Config) -> Iterator[Problem]:
    path, where = config.checkpoint.key_file, ("checkpoint", "key_file")
    if path is None:
        return
    if not path.startswith(("/", "~")):
        yield Problem(where, "every node reads it, in a folder of its own; give the full path")
    elif problem := key_problem(path):
        yield Problem(where, problem)
