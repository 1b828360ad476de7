"""The loop, without Ray: resume anywhere, the plain path, what is recorded."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipelines.ingest import FILLER, BatchMismatch, read_inline
from pipelines.manifest import Manifest
from tests.test_watchdog import watchdogs
from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray import journal, worker
from tst_ray import model as model_module
from tst_ray.batches import micro_batches
from tst_ray.checkpoint import Ranks, committed, folder_name
from tst_ray.checkpointer import Checkpointer
from tst_ray.errors import RunError
from tst_ray.job import Place
from tst_ray.journal import Journal, Writer
from tst_ray.model import build_model
from tst_ray.model_config import hf_config
from tst_ray.sharded import read_full
from tst_ray.storage import Storage
from tst_ray.timeouts import Bounds
from tst_ray.watchdog import Unwatched
from tst_ray.worker import Trainer, seed_step, train

NUM_STEPS = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> tuple[Any, list[Any]]:
    """An undisturbed run with a checkpoint after each step: its job and records."""
    folder = tmp_path_factory.mktemp("whole")
    config = make_config(folder, manifest, checkpoint__every=1, checkpoint__keep=100)
    job = make_job(config, manifest)
    return job, run_inline(job)


def test_what_never_gets_a_gradient_is_saved_and_loaded_too(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An indexer of sparse attention, say. AdamW alone would have no state of it to save."""

    def build_with_more(*args: Any, **options: Any) -> Any:
        model = build_model(*args, **options)
        model.hf_model.indexer = torch.nn.Linear(2, 2, bias=False)
        return model

    build_model = worker.build_model
    monkeypatch.setattr(worker, "build_model", build_with_more)
    config = make_config(tmp_path, manifest, checkpoint__every=1, checkpoint__keep=100)
    whole = make_job(config, manifest)
    records = run_inline(whole)
    begun = Storage(str(tmp_path / "begun"))
    begun.make()
    at_3 = f"checkpoints/{folder_name(3)}"
    shutil.copytree(Path(Storage(whole.run_url).at(at_3)), begun.at(at_3))
    shutil.copy(Storage(whole.run_url).at("metrics.jsonl"), begun.at("metrics.jsonl"))
    resumed = run_inline(make_job(config, manifest, begun))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in records]
    assert begun.read_lines("events.jsonl")[0]["step"] == 3


def test_memory_for_copies_is_asked_for_once_after_the_first_step(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def reserve(saver: Checkpointer, state: dict[str, Any]) -> None:
        asked.extend({int(moments["step"]) for moments in state["optimizer"]["state"].values()})

    monkeypatch.setattr(Checkpointer, "reserve", reserve)
    run_inline(make_job(make_config(tmp_path, manifest), manifest))
    assert asked == [1]


def test_the_model_is_built_as_the_settings_say(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: dict[str, Any] = {}

    def spy(*args: Any, **options: Any) -> Any:
        built.update(options)
        return build_model(*args, **options)

    monkeypatch.setattr("tst_ray.worker.build_model", spy)
    settings = {"activation_checkpointing": "true", "reshard": "false"}
    config = make_config(tmp_path, manifest, **{f"train__{k}": v for k, v in settings.items()})
    run_inline(make_job(config, manifest))
    assert built["activation_checkpointing"] and not built["reshard"]
    assert not built["compile"] and built["precision"] == "float32"


@pytest.mark.parametrize(("every_s", "steps"), [("0.000001", range(1, 9)), ("3600", [8])])
def test_a_checkpoint_is_due_by_the_clock_too(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, every_s: str, steps: Any
) -> None:
    """Where steps are slow, `checkpoint.every` steps may be hours of work."""
    no_time = property(lambda _: 0.0, lambda _, seconds: None)
    monkeypatch.setattr(Checkpointer, "save_s", no_time, raising=False)
    config = make_config(
        tmp_path,
        manifest,
        checkpoint__every=1_000,
        checkpoint__every_s=every_s,
        checkpoint__keep=100,
    )
    job = make_job(config, manifest)
    run_inline(job)
    saved = sorted(info.step for info in committed(Storage(job.run_url) / "checkpoints"))
    assert saved == list(steps)


def test_an_attempt_waits_for_storage_to_say_which_it_is(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first look that failed would be a failed attempt, of which a run has but a few."""
    truly, looks = journal.read_state, []

    def hiccups(run: Storage) -> dict[str, Any]:
        looks.append(run)
        if len(looks) == 1:
            raise OSError("stale file handle")
        return truly(run)

    monkeypatch.setattr(journal, "read_state", hiccups)
    job = make_job(make_config(tmp_path, manifest), manifest)
    assert len(run_inline(job)) == 8


def final_weights(run: Storage) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader

    newest = committed(run / "checkpoints")[0]
    tensors = FileSystemReader(newest.folder.path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in tensors.items()
        if hasattr(entry, "size")
    }
    read_full(newest.folder, state)
    return state


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stopped_at", range(NUM_STEPS + 1))
def test_a_run_stopped_after_any_step_ends_bit_equal(
    tmp_path: Path,
    manifest: Manifest,
    whole: tuple[Any, list[Any]],
    stopped_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, records = whole
    create, made = model_module._create, []
    monkeypatch.setattr(model_module, "_create", lambda *args: made.append(args) or create(*args))
    run = Storage(str(tmp_path / "run"))
    run.make()
    for step in range(1, stopped_at + 1):
        name = f"checkpoints/{folder_name(step)}"
        shutil.copytree(Path(Storage(job.run_url).at(name)), run.at(name))
    shutil.copy(Storage(job.run_url).at("metrics.jsonl"), run.at("metrics.jsonl"))
    resumed = run_inline(make_job(job.config, manifest, run))
    assert [r["step"] for r in resumed] == list(range(1, NUM_STEPS + 1))
    for name in ("loss", "lr", "grad_norm", "data_digest", "data_tokens", "val_loss"):
        assert [r.get(name) for r in resumed] == [r.get(name) for r in records], name
    assert same(final_weights(run), final_weights(Storage(job.run_url)))
    assert len(made) == (stopped_at == 0)  # no weights are made for a checkpoint to replace


def test_one_process_in_bfloat16_resumes_and_saves_over_groups_of_its_own(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed precision takes a group of one; the checkpoint thread must not meet the loop in it."""
    made: list[Ranks] = []

    class Noted(Ranks):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr("tst_ray.checkpointer.Ranks", Noted)
    config = make_config(
        tmp_path, manifest, train__precision="bfloat16", checkpoint__every=1, checkpoint__keep=100
    )
    job = make_job(config, manifest)
    run = Storage(job.run_url)
    try:
        records = run_inline(job)
        weights = final_weights(run)
        for step in range(6, NUM_STEPS + 1):
            shutil.rmtree(run.at(f"checkpoints/{folder_name(step)}"))
        resumed = run_inline(job)
    finally:
        dist.destroy_process_group()
    assert [r["loss"] for r in resumed] == [r["loss"] for r in records]
    assert same(final_weights(run), weights)
    assert len(made) == 2
    assert all(ranks.group is not None for ranks in made)


def test_what_a_record_holds(whole: tuple[Any, list[Any]]) -> None:
    _, records = whole
    bag, plain = records[0], records[-1]
    assert (bag["phase"], bag["bag_size"]) == (0, 4)
    assert (plain["phase"], plain["bag_size"]) == (1, 1)
    assert bag["data_tokens"] == 5 * 8 * 4
    assert plain["data_tokens"] == 4 * 5 * 8 * 4 + 4 * 5 * 8
    assert plain["latent_tokens"] == 8 * 5 * 8
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8]
    for name in ("loss", "lr", "grad_norm", "world_size", "attempt", "step_time_s", "data_wait_s"):
        assert name in bag, name
    assert len({r["data_digest"] for r in records}) == NUM_STEPS
    assert bag["loss"] == pytest.approx(np.log(97), rel=0.05)
    assert plain["loss"] == pytest.approx(np.log(97), rel=0.05)


def test_events_tell_the_story(whole: tuple[Any, list[Any]]) -> None:
    events = [event["event"] for event in Storage(whole[0].run_url).read_lines("events.jsonl")]
    assert events[0] == "attempt"
    assert events.count("phase_start") == 2
    assert events.count("checkpoint") == NUM_STEPS


def test_without_superposition_the_run_is_a_plain_loop(tmp_path: Path, manifest: Manifest) -> None:
    """Bit for bit: the loop a reader would write with `transformers` alone."""
    config = make_config(tmp_path, manifest, tst__bag_size=1, tst__ratio=0)
    job = make_job(config, manifest)
    records = run_inline(job)

    torch.set_num_threads(1)
    tiny = hf_config(config.model, vocab_size=97, eot_token=0)
    model = build_model(tiny, seed=config.run.seed, device="cpu").hf_model
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for step, batch in enumerate(read_inline(job.feeds[0], 0)):
        tokens = torch.from_numpy(batch["tokens"].astype(np.int64)).reshape(5, 9)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.reshape(-1, 97), tokens[:, 1:].reshape(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * job.plan.lr_multiplier(step)
        optimizer.step()
        optimizer.zero_grad()
        assert records[step]["loss"] == loss.item()
        assert records[step]["grad_norm"] == norm.item()
    trained = final_weights(Storage(job.run_url))
    for name, tensor in model.state_dict().items():
        assert torch.equal(trained[f"model.hf_model.{name}"], tensor), name


@pytest.mark.parametrize(
    ("changes", "data_tokens", "latent_tokens"),
    [
        ({"tst__fold": "sequence"}, 5 * 8 * 4, 5 * 8),
        ({"tst__fold": "batch"}, 5 * 4 * 8, 5 * 4 * 2),
        ({"tst__fold": "none"}, 5 * 8, 5 * 2),
        ({"tst__mode": "input_only"}, 5 * 8 * 4, 5 * 8),
        ({"tst__mode": "output_only"}, 5 * 8, 5 * 8),
        ({"tst__weighting": "power_law"}, 5 * 8 * 4, 5 * 8),
    ],
)
def test_every_fold_and_mode_trains(
    tmp_path: Path,
    manifest: Manifest,
    changes: dict[str, Any],
    data_tokens: int,
    latent_tokens: int,
) -> None:
    config = make_config(tmp_path, manifest, train__steps=30, train__learning_rate=3e-2, **changes)
    records = run_inline(make_job(config, manifest))
    assert (records[0]["data_tokens"], records[0]["latent_tokens"]) == (data_tokens, latent_tokens)
    assert records[0]["loss"] == pytest.approx(np.log(97), rel=0.05)
    assert all(0 < record["grad_norm"] < np.inf for record in records)


def test_the_alternative_loss_trains(tmp_path: Path, manifest: Manifest) -> None:
    config = make_config(tmp_path, manifest, train__steps=30, tst__loss="mce_alt")
    records = run_inline(make_job(config, manifest))
    # At the start the mass on a bag of 4 is about 4 in 97.
    assert records[0]["loss"] == pytest.approx(np.log(97 / 4), rel=0.1)
    assert records[14]["loss"] < records[0]["loss"]


def test_micro_batches_change_nothing_but_memory(tmp_path: Path, manifest: Manifest) -> None:
    one = run_inline(make_job(make_config(tmp_path / "a", manifest), manifest))
    two = run_inline(
        make_job(make_config(tmp_path / "b", manifest, train__micro_batch_size=2), manifest)
    )
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_another_batch_than_planned_stops_the_run(tmp_path: Path, manifest: Manifest) -> None:
    job = make_job(make_config(tmp_path, manifest), manifest)
    with pytest.raises(BatchMismatch, match="plan says"):
        train(job, Place(), lambda phase, step: read_inline(job.feeds[phase.index], step + 1))


def test_micro_batches_are_as_many_on_every_rank() -> None:
    slots = {3: [0, 1, 2], 2: [0, 1, FILLER], 0: [FILLER] * 3}
    shapes = {}
    for real, slot in slots.items():
        batch = {"slot": np.array(slot), "tokens": np.arange(12).reshape(3, 4)}
        shapes[real] = [(len(t), n) for t, n in micro_batches(batch, 2)]
    assert shapes == {3: [(2, 2), (1, 1)], 2: [(2, 2), (1, 0)], 0: [(1, 0), (1, 0)]}


def test_random_numbers_are_a_function_of_the_step() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return torch.rand(()).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(0, 5, 1), draw(0, 5, 0), draw(0, 6, 1), draw(1, 5, 1)}) == 4


def test_an_attempt_that_was_overtaken_ends_itself(tmp_path: Path, manifest: Manifest) -> None:
    """Workers can outlive a driver that was killed; two must not write one run."""
    job = make_job(make_config(tmp_path, manifest), manifest)

    def begin() -> Trainer:
        journal = Journal(Storage(job.run_url), job.plan, Writer(0, 1))
        trainer = Trainer(job, Place(), Ranks(), journal, Unwatched(Bounds(0.0, 600.0)))
        trainer.restore()
        return trainer

    old, new = begin(), begin()
    assert (old.journal.attempt, new.journal.attempt) == (1, 2)
    new.journal.write_state(0)
    with pytest.raises(RunError, match="another attempt of this run has taken over"):
        old.journal.write_state(0)
    old.saving._save(3, old.saving.storage)
    old.saving.wait(3)
    assert committed(Storage(job.run_url) / "checkpoints") == []
    for trainer in (old, new):
        trainer.journal.close()


def test_after_a_failure_no_watchdog_waits_for_the_next_beat(
    tmp_path: Path, manifest: Manifest
) -> None:
    """A process that catches the error must not be ended for what it does next."""
    job = make_job(make_config(tmp_path, manifest, fault__hang_s=300), manifest)
    with pytest.raises(BatchMismatch):
        train(job, Place(), lambda phase, step: read_inline(job.feeds[phase.index], step + 1))
    assert watchdogs(Storage(job.run_url)) == []
    assert not [t for t in threading.enumerate() if t.name == "stop-request"]


class Beats(Unwatched):
    """Stands in for a watchdog: what it was told to expect."""

    def __init__(self) -> None:
        super().__init__(Bounds(60.0, 600.0))
        self.kinds: list[str] = []

    def expect(self, kind: str, step: int) -> None:
        self.kinds.append(kind)


@pytest.mark.parametrize("background", [True, False])
def test_while_the_loop_waits_for_a_checkpoint_it_says_so(
    tmp_path: Path, manifest: Manifest, background: bool
) -> None:
    """Else a save longer than `fault.hang_s` would be taken for a hang, and ended."""
    settings = {"checkpoint__async": str(background).lower()}
    job = make_job(make_config(tmp_path, manifest, **settings), manifest)
    beats = Beats()
    journal = Journal(Storage(job.run_url), job.plan, Writer(0, 1))
    trainer = Trainer(job, Place(), Ranks(), journal, beats)
    trainer.restore()
    for _ in range(10):
        beats.bounds.saw("step", 1.0)
    trainer.start_phase(job.plan.phases[0], 0)
    assert beats.bounds.bound_s("step") == 600.0  # the phase's first step may compile
    saver, waited = trainer.saving.storage, []
    write = saver._write

    def slow(*args: Any) -> Any:
        waited.append(beats.kinds[-1])
        return write(*args)

    wait = saver.wait

    def noted() -> None:
        waited.append(beats.kinds[-1])
        wait()

    saver.wait = noted  # type: ignore[method-assign]
    if not background:
        saver._write = slow  # type: ignore[method-assign]
    trainer.saving._save(1, trainer.saving.storage)
    trainer.finish(1)
    journal.close()
    # Inside `Checkpointer.save` the one before is done, and there is nothing to wait for.
    assert set(waited) == ({"commit", "save"} if background else {"commit"})
    assert beats.kinds[-1] == "commit"
    assert beats.bounds._seen["commit"][-1] == saver.save_s > 0
