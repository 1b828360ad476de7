"""A tiny model on a tiny corpus: runs of a few steps that take a second, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.ingest import Feed, read_inline
from pipelines.manifest import Manifest
from tests.corpora import write_corpus
from tst_ray.config import load_config
from tst_ray.corpus import build_feeds, build_order
from tst_ray.job import Job, Place
from tst_ray.metrics import METRICS
from tst_ray.plan import Plan, build_plan
from tst_ray.settings import Config
from tst_ray.storage import Storage
from tst_ray.worker import train

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
SETTINGS = {
    "train.steps": 8,
    "train.sequence_length": 8,
    "train.batch_size": 5,
    "train.learning_rate": 1e-2,
    "train.warmup": 2,
    "train.decay": 2,
    "train.threads": 1,
    "tst.bag_size": 4,
    "tst.ratio": 0.5,
    "data.shuffle_tokens": 256,
    "checkpoint.every": 3,
    "metrics.val_every": 4,
    "metrics.val_sequences": 6,
    "fault.hang_s": "null",
    "cluster.backend": "inline",
    "cluster.workers": 1,
}


def make_corpus(folder: Path) -> Manifest:
    """3,000 tokens of a vocabulary of 97, and 400 held out."""
    return write_corpus(folder, 3_000)


def make_config(tmp_path: Path, manifest: Manifest, **overrides: Any) -> Config:
    """A config of `SETTINGS`, changed by section__field=value."""
    settings = dict(SETTINGS) | {
        "data.prepared": manifest.folder,
        "run.storage": str(tmp_path),
        "run.name": "tiny",
    }
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    lines = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    return load_config(None, [f"--model.config={MODEL}", *lines])


def make_job(config: Config, manifest: Manifest, run: Storage | None = None) -> Job:
    """The job of a whole run as one stage."""
    plan = build_plan(config)
    feeds = build_feeds(plan, build_order(config, plan, manifest), manifest)
    run = run or Storage(config.run.storage) / config.run.name
    run.make()
    return Job(config, plan, feeds, run.url, plan.total_steps)


def run_inline(job: Job, place: Place | None = None) -> list[dict[str, Any]]:
    """Train in this process; the records of metrics.jsonl."""
    place = place or Place()

    def open_batches(phase: Any, step: int) -> Any:
        return read_inline(job.feeds[phase.index], step, place.rank, place.world_size)

    train(job, place, open_batches)
    return Storage(job.run_url).read_lines(METRICS)


__all__ = ["Feed", "Plan", "make_config", "make_corpus", "make_job", "run_inline"]
