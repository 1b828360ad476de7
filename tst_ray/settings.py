"""The tree of settings: every field that people may set, its type, default and meaning.

Text below a field says what it is; error messages quote it. The defaults are the demo. How files
and overrides become a `Config`, and what is refused, is in config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)

from tst_ray.derived_fields import head_fields

SHIPPED = Path(__file__).parent / "configs"
DEMO_MODEL = "demo-0.4m"
STDLIB = "python-stdlib"
RESERVED_NAMES = frozenset({"tokenizer", "units"})  # folders beside the sources' among shards

# ---- kinds of values ---------------------------------------------------------------------------


def _as_whole(value: Any) -> Any:
    """A whole number, however it is written: 1e3 and 1000.0 as 1000. Others stay as they are."""
    return int(value) if type(value) is float and value.is_integer() else value


def _as_range(value: Any) -> Any:
    """Both spellings of a worker count, N and [min, max], as (min, max)."""
    value = _as_whole(value)
    pair = [value, value] if isinstance(value, int) else value
    if isinstance(pair, list | tuple):
        pair = [_as_whole(number) for number in pair]
    whole = isinstance(pair, list | tuple) and all(type(n) is int for n in pair)
    if not whole or len(pair) != 2:
        raise ValueError("must be a number of workers or [min, max]")
    if pair[0] < 1:
        raise ValueError("must be at least 1 worker")
    if pair[0] > pair[1]:
        raise ValueError(f"min is more than max; swap them: [{pair[1]}, {pair[0]}]")
    return tuple(pair)


def _as_part(value: Any) -> Any:
    """A part of the run: a share below 1, or a whole number of steps (1.0 might mean either)."""
    value = _as_whole(value) if type(value) is float and value > 1 else value
    if type(value) not in (int, float) or value < 0 or (type(value) is float and not value < 1):
        raise ValueError("must be a share of the steps in [0, 1), or a whole number of steps")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _custom(value: Any) -> Any:
    """Resources that have no setting of their own, which would be overridden in silence."""
    own = {"cpu": "cluster.cpus_per_worker", "gpu": "cluster.gpus_per_worker"}
    for name in value if isinstance(value, Mapping) else ():
        if setting := own.get(str(name).lower()):
            raise ValueError(f"{name} has a setting of its own; set {setting} instead")
    return value


Whole = Annotated[int, BeforeValidator(_as_whole)]
Count = Annotated[Whole, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
StepPart = Annotated[int | float, PlainValidator(_as_part)]
Workers = Annotated[
    tuple[int, int],
    PlainValidator(_as_range),
    PlainSerializer(lambda pair: pair[0] if pair[0] == pair[1] else list(pair)),
]
Weighting = Literal["uniform", "power_law", "exponential", "first_token", "mutual_information"]
Loss = Literal["mce", "mce_alt"]
Mode = Literal["full", "input_only", "output_only"]
Fold = Literal["sequence", "batch", "none"]


# ---- shipped models and names of sources -------------------------------------------------------


def shipped_models() -> tuple[str, ...]:
    """The names of the shipped models."""
    return tuple(sorted(path.stem for path in (SHIPPED / "models").glob("*.yaml")))


def read_shipped_model(name: str) -> dict[str, Any]:
    """The Hugging Face configuration of a shipped model."""
    loaded: dict[str, Any] = yaml.safe_load((SHIPPED / "models" / f"{name}.yaml").read_text())
    return loaded


def shipped_values(section: str, name: str) -> list[Any]:
    """What the shipped configurations set a field to: values that no user need have written."""
    whole = [yaml.safe_load(path.read_text()) or {} for path in sorted(SHIPPED.glob("*.yaml"))]
    return [config[section][name] for config in whole if name in config.get(section, {})]


def own_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `model.config` that are not just as a shipped model gives them.

    Where such a model is changed its other fields stand there, too, which the user has not written.
    """
    for name in shipped_models():
        base = read_shipped_model(name)
        if base.keys() <= config.keys() and base["model_type"] == config["model_type"]:
            given = {k: v for k, v in config.items() if k not in base or base[k] != v}
            if len(given) < len(config) / 2:
                return given
    return dict(config)


def spell_out_model(value: Any) -> Any:
    """The model section's shorthands, a name or a Hugging Face configuration, as a mapping."""
    if isinstance(value, str):
        return {"source": value}
    if isinstance(value, Mapping) and "model_type" in value and "config" not in value:
        own = {name: field for name, field in value.items() if name in ModelConfig.model_fields}
        return {**own, "config": {k: v for k, v in value.items() if k not in own}}
    return value


def _named(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    """The sources, each with a name of its own: its folder's or file's where none is given."""
    taken = {source.name for source in sources} | RESERVED_NAMES
    named = []
    for source in sources:
        name = source.name
        if name is None:
            parts = [part for part in source.path.split("/") if part and "*" not in part]
            stem = re.sub(r"\.(txt|md|jsonl|parquet|gz|zst)\b", "", parts[-1] if parts else "")
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-") or "text"
            number = 1
            while (name := stem if number == 1 else f"{stem}-{number}") in taken:
                number += 1
            taken.add(name)
        named.append(source.model_copy(update={"name": name}))
    return tuple(named)


# ---- sections ----------------------------------------------------------------------------------


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class RunConfig(_Section):
    """What the run is called and where it lives: `<storage>/<name>/`."""

    name: Name = "demo"
    """the name of the run's directory: letters, digits, '.', '_' and '-'"""
    storage: str = Field(default="runs", min_length=1)
    """the folder or URL that holds run directories"""
    seed: Whole = Field(default=0, ge=0, le=2**64 - 1)
    """the seed of the weights and of the data's order"""


class ModelConfig(_Section):
    """A causal language model, by name or by its Hugging Face configuration.

    Text alone is `source`; in a mapping with `model_type`, what is no field here is `config`. The
    name of a shipped model (tst_ray/configs/models/) is replaced by its configuration.
    """

    source: str | None = None
    """a shipped model's name, a Hugging Face folder or a Hugging Face id"""
    config: dict[str, Any] = {}
    """a whole Hugging Face configuration (with model_type), or changes to that of the source"""
    pretrained: bool = False
    """whether to start from the source's weights (continued pre-training)"""
    attention: str = "sdpa"
    """the attention implementation of transformers: sdpa, eager, flash_attention_2, …"""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        value = spell_out_model(value)
        config = value.get("config", {}) if isinstance(value, Mapping) else None
        if not isinstance(config, Mapping) or "model_type" in config:
            return value
        source = value.get("source") or DEMO_MODEL
        if source in shipped_models():
            base = read_shipped_model(source)
            whole = {**base, **head_fields(base, config), **config}
            return {**value, "source": None, "config": whole}
        return {**value, "source": source}


class SourceConfig(_Section):
    """One source of text."""

    path: str = Field(min_length=1)
    """a folder, file, glob or URL of text, .jsonl or Parquet; or python-stdlib"""
    name: Name | None = None
    """a name for it; taken from the path unless given"""
    weight: Amount | None = None
    """its share of the sequences, relative to the other sources' weights"""
    text_field: str = "text"
    """the field or column that holds the text of .jsonl and Parquet"""


class DataConfig(_Section):
    """The text: sources to tokenize, or a folder of shards that `tst-ray prepare` made."""

    sources: Annotated[
        tuple[Annotated[SourceConfig, BeforeValidator(_as_source)], ...],
        Field(strict=False),
        BeforeValidator(_as_list),
        AfterValidator(_named),
    ] = ()
    """what to train on: a list of paths, or of mappings with path, name, weight, text_field"""
    prepared: str | None = None
    """a folder of prepared shards, instead of sources"""
    weights: dict[str, Amount] | None = None
    """with prepared: each source's weight in the mixture, by name; their tokens unless given"""
    tokenizer: str = "train"
    """train (on the text itself), or a tokenizer's Hugging Face id or folder"""
    vocab_size: Whole = Field(default=1024, ge=1, le=2**24)
    """the vocabulary of a tokenizer that is trained"""
    validation_share: float = Field(default=0.04, ge=0, lt=1)
    """the share of the text held out for validation; 0.01 is enough of some gigabytes"""
    row_tokens: Count = 65536
    """tokens in one row of a shard"""
    shuffle_tokens: Count = 16_777_216
    """the window of text that is shuffled as a whole, in tokens"""
    undecodable: Literal["skip", "refuse"] = "skip"
    """what to do with text that doesn't decode"""
    cache: str | None = None
    """the folder that keeps shards; <run.storage>/shards unless given"""

    @model_validator(mode="before")
    @classmethod
    def _default_source(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and not value.get("prepared") and "sources" not in value:
            return {**value, "sources": [{"path": STDLIB}]}
        return value


class _Superposition(_Section):
    bag_size: Count = 4
    """tokens in a bag (s); 1 is ordinary training"""
    weighting: Weighting = "uniform"
    """how the places of the target bag count"""
    loss: Loss = "mce"
    """the multi-hot cross-entropy, or its alternative"""
    mode: Mode = "full"
    """whether inputs and targets are bags, or only one of them"""
    fold: Fold = "sequence"
    """how bags are cut: from sequences s times as long, s times as many, or into fewer positions"""
    workers: Workers | None = None
    """workers of the phase, N or [min, max]; cluster.workers unless given, and 1 in the demo"""


class TstConfig(_Superposition):
    """Token Superposition Training: bags first, for a share of the steps, then plain tokens."""

    ratio: float = Field(default=0.3, ge=0, lt=1)
    """the share of the steps trained on bags (r)"""


class PhaseConfig(_Superposition):
    """One phase, where `phases` spells out what `tst` is shorthand for."""

    name: Name | None = None
    """a name for the phase"""
    bag_size: Count
    """tokens in a bag (s); 1 is ordinary training"""
    steps: Count
    """optimizer steps of the phase"""

    def folded(self, batch_size: int, sequence_length: int) -> tuple[int, int]:
        """(sequences a step, latent positions of each) of the phase."""
        if self.mode == "output_only" or self.fold == "sequence":
            return batch_size, sequence_length
        times = self.bag_size if self.fold == "batch" else 1
        return batch_size * times, sequence_length // self.bag_size


class TrainConfig(_Section):
    """The optimization. A step's global batch is `batch_size` sequences at any world size."""

    steps: Count = 6000
    """optimizer steps of the whole run"""
    sequence_length: Count = 64
    """latent positions of a sequence (L): what the model sees"""
    batch_size: Count = 16
    """sequences of a step over all workers (B)"""
    micro_batch_size: Count | None = None
    """sequences a worker holds at once; its whole share of the batch unless given"""
    learning_rate: float = Field(default=2e-3, gt=0)
    """the peak learning rate"""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        Field(strict=False),
    ] = (0.9, 0.95)
    """AdamW's two decay rates, such as [0.9, 0.95]"""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon"""
    weight_decay: Amount = 0.1
    """AdamW's decoupled weight decay"""
    clip_norm: float = Field(default=1.0, gt=0)
    """the gradient norm above which gradients are scaled down"""
    warmup: StepPart = 0.05
    """the linear rise of the learning rate: a share of the steps below 1, or a number of steps"""
    decay: StepPart = 0.1
    """its linear fall at the end: a share of the steps below 1, or a number of steps"""
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """the learning rate at the very end, relative to the peak"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """the arithmetic of forward and backward; weights and optimizer are float32 in both"""
    compile: bool = False
    """whether to torch.compile each block, and the softmax of a loss in chunks"""
    activation_checkpointing: bool = False
    """whether to recompute each block's activations instead of keeping them"""
    reshard: bool = True
    """whether FSDP gathers a block's weights for each use, or once a step and keeps them"""
    threads: Count | None = None
    """torch's CPU threads per worker; those of its CPUs unless given"""

    def steps_of(self, part: float) -> int:
        """The number of steps that `warmup` or `decay` stands for."""
        return part if isinstance(part, int) else round(part * self.steps)


class ClusterConfig(_Section):
    """Who computes. The model and the data's order do not depend on any of it."""

    backend: Literal["ray", "inline"] = "ray"
    """ray, or inline: this process is the only worker and Ray is not used"""
    workers: Workers = (1, 1)
    """workers, N or [min, max]; 2, and 1 in phase one, unless given"""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    """CPUs that Ray sets aside for a worker"""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs of a worker: 0 or 1"""
    resources_per_worker: Annotated[
        dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(_custom)
    ] = {}
    """custom Ray resources of a worker"""
    data_cpus: Count = 1
    """CPUs kept free of workers, for reading data"""
    wait_s: Amount = 0.0
    """seconds to wait, at the start, for the cluster to reach the smallest allowed size"""
    fork_server: bool = True
    """whether Ray's processes start fast: forked from one on each node that has its imports done"""
    growth_gain: Amount = 2.0
    """more workers are taken in when that saves so many times what it costs; 0: always"""
    settle_s: Amount = 60.0
    """seconds that a worker group runs, at the least, before it takes in more workers"""


class CheckpointConfig(_Section):
    """Checkpoints: how often, how many."""

    every: Count = 500
    """steps between checkpoints, at most"""
    every_s: float | None = Field(default=900.0, gt=0)
    """seconds between checkpoints, at most, where steps are slow; null: no matter"""
    keep: Count = 3
    """the newest checkpoints kept"""
    async_: bool = Field(default=True, alias="async")
    """whether training goes on while a checkpoint is written"""
    memory_every: Count | None = 100
    """steps between checkpoints kept in the memory of two nodes, for fast restarts; null: none"""
    key_file: str | None = None
    """full path, on every node, of a file with a secret key that signs checkpoints; null: none"""


class MetricsConfig(_Section):
    """What is measured and how often."""

    val_every: Count = 250
    """steps between evaluations"""
    val_sequences: Count = 256
    """held-out sequences of an evaluation"""
    tensorboard_every: Count = 10
    """steps between points of the curves"""


class FaultConfig(_Section):
    """What happens when something goes wrong."""

    max_failures: Whole = Field(default=3, ge=0)
    """failures in a row, without progress between them, that a run survives"""
    max_node_failures: Count | None = None
    """failures on one node within a day, after which it is left out where that pays; null: never"""
    max_failed_saves: Count = 3
    """checkpoints in a row that could not be saved, after which the run stops"""
    max_skipped: Count = 5
    """steps in a row with a loss or gradient that is not finite, after which the run rolls back"""
    spike_z: float | None = Field(default=10.0, gt=0)
    """how far above its recent median a loss is a spike, in robust deviations; null: never"""
    spike_window: Whole = Field(default=128, ge=8)
    """steps that make the recent median; a phase's first ones have no spikes"""
    spike_steps: Count = 16
    """spikes in a row that make the run roll back"""
    max_rollbacks: Whole = Field(default=3, ge=0)
    """roll-backs of a run, after which the next one stops it"""
    hang_s: float | None = Field(default=60.0, gt=0)
    """seconds without progress that are a hang, raised by the run's own times; null: never"""
    start_s: float = Field(default=600.0, gt=0)
    """seconds that a phase's first steps may take (loading, compiling), or storing a checkpoint"""


class Config(_Section):
    """A whole run. Built by `load_config` or `parse_config`, which also check across fields."""

    run: RunConfig = RunConfig()
    """name, storage, seed"""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """the model: a name, or a mapping"""
    data: DataConfig = Field(default_factory=DataConfig)
    """the text"""
    tst: TstConfig = TstConfig()
    """Token Superposition, in two phases"""
    phases: Annotated[tuple[PhaseConfig, ...], Field(strict=False, min_length=1)] | None = None
    """the phases in full, instead of tst: a list of mappings with steps and tst's other fields"""
    train: TrainConfig = TrainConfig()
    """the optimization"""
    cluster: ClusterConfig = ClusterConfig()
    """who computes"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """checkpoints"""
    metrics: MetricsConfig = MetricsConfig()
    """measurements"""
    fault: FaultConfig = FaultConfig()
    """failures"""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        """Defaults of one section that depend on what another one says."""
        if not isinstance(value, Mapping):
            return value
        raw = {name: {} if part is None else part for name, part in value.items()}
        raw["phases"] = phases = value.get("phases")
        cluster, tst, train = (raw.setdefault(name, {}) for name in ("cluster", "tst", "train"))
        open_ = isinstance(cluster, Mapping) and "workers" not in cluster
        if open_ and cluster.get("backend") != "inline" and isinstance(tst, Mapping):
            # The demo: phase one on one worker, phase two on two.
            raw["cluster"] = {**cluster, "workers": 2}
            if phases is None:
                raw["tst"] = {"workers": 1, **tst}
        if isinstance(train, Mapping) and "steps" not in train and isinstance(phases, list):
            steps = [
                _as_whole(phase.get("steps")) for phase in phases if isinstance(phase, Mapping)
            ]
            if steps and all(type(number) is int for number in steps):
                raw["train"] = {**train, "steps": sum(steps)}
        return raw

    def phase_settings(self) -> tuple[PhaseConfig, ...]:
        """The phases, as given or as `tst` stands for them."""
        if self.phases is not None:
            return self.phases
        settings = {name: getattr(self.tst, name) for name in _Superposition.model_fields}
        steps = round(self.tst.ratio * self.train.steps)
        plain = PhaseConfig(bag_size=1, steps=self.train.steps - steps)
        return (PhaseConfig(**settings, steps=steps), plain) if steps else (plain,)

    def workers_of(self, phase: PhaseConfig) -> tuple[int, int]:
        """(min, max) workers of a phase."""
        if self.cluster.backend == "inline":  # one process, whatever is written for Ray
            return 1, 1
        return phase.workers or self.cluster.workers

    def dump(self) -> dict[str, Any]:
        """The resolved configuration as plain values; `parse_config` reads it back."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)
