"""Whole training loops on several gloo ranks without Ray: checkpoints across world sizes, failures.

One start of three processes runs everything; the tests look at what it left.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.manifest import Manifest
from tests.faults import Faults
from tests.tiny import make_config, make_corpus, make_job, run_inline
from tst_ray.checkpointer import Checkpointer
from tst_ray.job import Place
from tst_ray.storage import Storage

# The world size that trains up to steps 3, 6 and 8; each goes on from the one before's checkpoint.
STORIES = {"1-1-1": (1, 1, 1), "2-2-2": (2, 2, 2), "1-3-2": (1, 3, 2), "3-1-2": (3, 1, 2)}
STOPS = (3, 6, 8)


def run_story(folder: Path, name: str, rank: int, sizes: tuple[int, ...]) -> None:
    manifest = Manifest.load(str(folder / "corpus"))
    config = make_config(folder, manifest, run__name=name, train__micro_batch_size=2)
    for number, (stop, world_size) in enumerate(zip(STOPS, sizes, strict=True)):
        if rank < world_size:
            rendezvous = f"file://{folder}/rendezvous-{name}-{number}"
            dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size)
            job = make_job(config, manifest)
            job = type(job)(job.config, job.plan, job.feeds, job.run_url, stop)
            run_inline(job, Place(rank, world_size))
            dist.destroy_process_group()
        wait_for_all(folder, f"{name}-{number}", rank)


def wait_for_all(folder: Path, name: str, rank: int) -> None:
    """Ranks without a part wait until those with one are done: the next group starts after them."""
    dist.init_process_group("gloo", f"file://{folder}/wait-{name}", rank=rank, world_size=3)
    dist.barrier()
    dist.destroy_process_group()


def fail_to_save(folder: Path, rank: int) -> None:
    """Rank 0 cannot make the checkpoint's folder; the others must not wait for it."""
    if rank < 2:
        dist.init_process_group("gloo", f"file://{folder}/fail", rank=rank, world_size=2)
        (folder / "file").write_text("")
        root = Storage(str(folder / "file" / "checkpoints"))
        saver = Checkpointer(root, keep=1, background=True, on_event=lambda kind, **details: None)
        saver.save(1, {"w": torch.ones(2)}, {})
        saver.wait()
        total = torch.tensor(float(saver.failed_saves))
        dist.all_reduce(total)
        (folder / f"failed-{rank}.json").write_text(json.dumps(total.item()))
        dist.destroy_process_group()
    wait_for_all(folder, "fail-to-save", rank)


def commit_slowly(folder: Path, rank: int) -> None:
    """Rank 0 alone commits and clears; the other must wait as for a checkpoint, not in a step."""
    if rank < 2:
        dist.init_process_group("gloo", f"file://{folder}/slow", rank=rank, world_size=2)
        root = Storage(str(folder / "slow-commit"))
        saver = Checkpointer(root, keep=1, background=True, on_event=lambda kind, **details: None)
        prune = saver._prune

        def slowly(newest: int) -> None:
            time.sleep(1.0)
            (folder / "cleared").write_text("")
            prune(newest)

        saver._prune = slowly  # type: ignore[method-assign]
        saver.save(1, {"w": torch.ones(2)}, {})
        saver.wait()
        (folder / f"slow-{rank}.json").write_text(json.dumps((folder / "cleared").exists()))
        dist.destroy_process_group()
    wait_for_all(folder, "commit-slowly", rank)


def strike_one_rank(folder: Path, rank: int) -> None:
    """Rank 1 alone has numbers that are not finite; both must skip, and both go back."""
    manifest = Manifest.load(str(folder / "corpus"))
    config = make_config(
        folder,
        manifest,
        run__name="struck",
        checkpoint__every=1,
        fault__max_skipped=2,
        train__micro_batch_size=2,
    )
    if rank < 2:
        with Faults().not_finite_at(3, 5, 6, rank=1).injected():
            for attempt in range(2):
                rendezvous = f"file://{folder}/rendezvous-struck-{attempt}"
                dist.init_process_group("gloo", rendezvous, rank=rank, world_size=2)
                run_inline(make_job(config, manifest), Place(rank, 2))
                dist.destroy_process_group()
    wait_for_all(folder, "strike-one-rank", rank)


def process(rank: int, folder_name: str) -> None:
    folder = Path(folder_name)
    try:
        strike_one_rank(folder, rank)
        for name, sizes in STORIES.items():
            run_story(folder, name, rank, sizes)
        fail_to_save(folder, rank)
        commit_slowly(folder, rank)
    except BaseException:
        traceback.print_exc()
        raise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_corpus(folder / "corpus")
    mp.spawn(process, args=(str(folder),), nprocs=3)
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return Storage(str(folder / name)).read_lines("metrics.jsonl")


@pytest.mark.parametrize("name", STORIES)
def test_a_run_carried_over_world_sizes_gives_the_same_losses(folder: Path, name: str) -> None:
    """5 sequences a step divide by none of 2 and 3; checkpoints reshard both ways."""
    one, other = records(folder, "1-1-1"), records(folder, name)
    sizes = [
        size for size, steps in zip(STORIES[name], (3, 3, 2), strict=True) for _ in range(steps)
    ]
    assert [r["world_size"] for r in other] == sizes
    assert [r["step"] for r in other] == list(range(1, 9))
    assert [r["data_digest"] for r in other] == [r["data_digest"] for r in one]
    for a, b in zip(one, other, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
    assert other[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-4)


def test_a_save_that_fails_on_one_rank_fails_on_all_and_none_waits(folder: Path) -> None:
    assert [json.loads((folder / f"failed-{rank}.json").read_text()) for rank in range(2)] == [2, 2]


def test_all_ranks_wait_for_the_commit(folder: Path) -> None:
    assert [json.loads((folder / f"slow-{rank}.json").read_text()) for rank in range(2)] == [
        True, True,
    ]  # fmt: skip


def test_what_is_not_finite_on_one_rank_is_skipped_on_all(folder: Path) -> None:
    struck, one = records(folder, "struck"), records(folder, "2-2-2")
    assert [r.get("mark") for r in struck] == [
        None, None, "not_finite", None, "passed_over", "passed_over", None, None,
    ]  # fmt: skip
    assert [r["attempt"] for r in struck] == [1] * 4 + [2] * 4
    assert [r["data_digest"] for r in struck] == [r["data_digest"] for r in one]
    assert [r["loss"] for r in struck[:2]] == [r["loss"] for r in one[:2]]
    assert all(r["loss"] < 5 for r in struck if "mark" not in r)
