"""Whole runs on a cluster of several nodes, with faults put into them: nothing is lost.

Each test starts `python -m tst_ray.run` as people do, lets an `Injector` strike it while it trains,
and compares what it left with an undisturbed run of the same plan: the digest of every step's data;
at an unchanged world size every weight, to the bit; at a changed one every loss, to 1e-4.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.faults import OWN_KINDS, Fault, Faults, schedule
from cluster.injector import Injector
from cluster.local import LocalCluster
from cluster.targets import LocalTarget
from tests.chaos import small_filesystem
from tests.mounts import hidden
from tests.test_runs import events, last_step, lines, wait_until, write_text
from tests.test_worker import final_weights, same
from tst_ray.storage import Storage

ROOT = Path(__file__).parent.parent
PATIENCE_S = 400.0
STEPS, SWITCH, EVERY = 120, 40, 10
SPOT = {"spot": 1.0}
QUICK_TO_NOTICE = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000}
SETTINGS = {
    "model.config": (
        "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64, "
        "tie_word_embeddings: false}"
    ),
    "data.vocab_size": 300,
    "data.row_tokens": 512,
    "data.validation_share": 0.1,
    "data.shuffle_tokens": 4096,
    "train.steps": STEPS,
    "train.sequence_length": 32,
    "train.batch_size": 15,
    "train.micro_batch_size": 4,
    "train.learning_rate": 3e-4,
    "train.threads": 1,
    "tst.ratio": SWITCH / STEPS,
    "tst.workers": 2,
    "cluster.workers": 2,
    "cluster.resources_per_worker": "{spot: 1}",
    "cluster.settle_s": 0,
    "cluster.growth_gain": 0,
    "checkpoint.every": EVERY,
    "checkpoint.keep": 6,
    "checkpoint.memory_every": 8,
    "metrics.val_every": 60,
    "metrics.val_sequences": 8,
    "fault.hang_s": 10,
    "fault.start_s": 120,
    "fault.max_failures": 2,
}


@dataclass
class Place:
    """A cluster, a text, and runs on them."""

    cluster: LocalCluster
    folder: Path
    text: Path

    def nodes(self, count: int) -> None:
        """Let the cluster have so many nodes besides the head, and Ray know it."""
        running = self.cluster.node_ids()
        for node_id in running[count:]:
            self.cluster.remove_node(node_id)
        for _ in range(count - len(running)):
            self.cluster.add_node(1, SPOT)
        wait_until(
            lambda: len(self.cluster.alive_node_ids()) == count == len(self.cluster.node_ids()),
            f"{count} nodes",
        )

    def start(self, name: str, **changes: Any) -> Run:
        """Start a run's driver."""
        settings = SETTINGS | {"data.sources": self.text, "run.storage": self.folder / "runs"}
        settings |= {"run.name": name} | {k.replace("__", "."): v for k, v in changes.items()}
        command = [sys.executable, "-m", "tst_ray.run"]
        command += [f"--{key}={value}" for key, value in settings.items()]
        run = Run(
            Path(str(settings["run.storage"])) / name,
            command,
            os.environ | self.cluster.environment,
            self.folder / f"{name}.log",
        )
        run.start()
        return run

    def inject(
        self, run: Run, faults: tuple[Fault, ...], status: int = 0, replaced: bool = False
    ) -> list[dict[str, Any]]:
        """Strike a run until it ends; what was done. A driver that was killed is started again.

        Args:
            replaced: whether lost nodes are replaced, as an autoscaler does.
        """
        target = LocalTarget(self.cluster, node_resources=SPOT)
        with Injector(Storage(str(run.folder)), faults, target) as injector:

            def over() -> bool:
                if replaced and len(self.cluster.node_ids()) < 2:
                    self.cluster.add_node(1, SPOT)
                if run.process.poll() is None:
                    return False
                if run.process.returncode == -signal.SIGKILL:
                    run.start()
                    return False
                return not injector.ongoing

            assert injector.run(over, timeout_s=PATIENCE_S * (1 + len(faults) // 4)), run.said()
        assert run.process.returncode == status, run.said()
        assert [record["outcome"] for record in injector.done] == ["done"] * len(faults), (
            injector.done,
            injector.pending,
        )
        return injector.done


@dataclass
class Run:
    """One run, and its driver's process."""

    folder: Path
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] = None  # type: ignore[assignment]

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=file, stderr=file, env=self.environment
            )

    def said(self) -> str:
        return self.log.read_text()[-4000:]

    def reach(self, step: int) -> None:
        wait_until(
            lambda: last_step(self.folder) >= step or self.process.poll() is not None,
            f"step {step}",
        )
        assert self.process.poll() is None, self.said()

    def finish(self, status: int = 0) -> str:
        try:
            self.process.wait(timeout=PATIENCE_S)
        finally:
            self.process.kill()
        assert self.process.returncode == status, self.said()
        return self.log.read_text()

    @property
    def records(self) -> list[dict[str, Any]]:
        return lines(self.folder, "metrics.jsonl")

    def kinds(self) -> list[str]:
        return [event["event"] for event in lines(self.folder, "events.jsonl")]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return events(self.folder, kind)

    def repeated(self) -> list[int]:
        return [event["repeated_steps"] for event in self.events("attempt")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("recovery")
    with LocalCluster(head_cpus=2, system_config=QUICK_TO_NOTICE) as cluster:
        yield Place(cluster, folder, write_text(folder / "text"))


@pytest.fixture(scope="module")
def whole(place: Place) -> Run:
    """The undisturbed run, on two workers."""
    place.nodes(2)
    run = place.start("whole")
    run.finish()
    return run


def assert_nothing_lost(run: Run, whole: Run, same_size: bool = True) -> None:
    """The run trained on the same data in the same order, and got what the undisturbed one got."""
    one, other = run.records, whole.records
    assert [r["step"] for r in one] == list(range(1, len(other) + 1))
    assert [r["data_digest"] for r in one] == [r["data_digest"] for r in other]
    if same_size:
        assert [r["loss"] for r in one] == [r["loss"] for r in other]
        weights = [final_weights(Storage(str(each.folder))) for each in (run, whole)]
        assert same(*weights)
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    state = json.loads((run.folder / "run.json").read_text())
    assert state["status"] == "finished"
    wall_s = state["time"]["at"] - first_second(run)
    assert sum(state["time"]["parts"].values()) == pytest.approx(wall_s, abs=20.0)


def first_second(run: Run) -> float:
    """When the run began, as its directory tells."""
    return (run.folder / "config.yaml").stat().st_mtime


@pytest.mark.slow
def test_killed_and_frozen_workers(place: Place, whole: Run) -> None:
    """In phase one, at the switch, in phase two, each rank; where a hang was is told.

    Who tells is whose bound comes first: the frozen rank's, or that of one who waits for it. A rank
    that was frozen as it waited for a checkpoint has a longer one.
    """
    place.nodes(2)
    run = place.start("killed-and-frozen")
    faults = Faults().fail_at(14, rank=1).fail_at(SWITCH, rank=0).freeze_at(80, rank=1)
    place.inject(run, faults)
    assert_nothing_lost(run, whole)
    assert len(run.events("failure")) == 3
    assert all("died" in event["error"] for event in run.events("failure"))
    assert max(run.repeated()) <= EVERY + 5  # a worker let go on to say where it is may step once
    assert any(event["from_memory"] for event in run.events("attempt"))
    hangs = run.events("hang")
    assert hangs
    assert all("Thread" in (run.folder / event["stacks"]).read_text() for event in hangs)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_checkpoint(place: Place, whole: Run) -> None:
    """The half-written one does not exist; the one before it counts."""
    place.nodes(2)
    run = place.start("mid-checkpoint", checkpoint__memory_every="null")
    checkpoints = run.folder / "checkpoints"

    def half_written() -> bool:
        found = [path for path in checkpoints.glob("step-*") if not (path / "COMMITTED").exists()]
        return bool(found) and last_step(run.folder) > EVERY

    target = LocalTarget(place.cluster)
    driver = Injector(Storage(str(run.folder)), (), target)._driver
    wait_until(half_written, "a checkpoint half written")
    target.signal_worker(target.workers(driver())[0], signal.SIGKILL)
    run.finish()
    assert_nothing_lost(run, whole)
    assert len(run.events("failure")) == 1
    assert max(run.repeated()) <= 2 * EVERY


@pytest.mark.slow
def test_a_lost_node_leaves_one_worker_and_a_new_one_lets_the_run_grow(
    place: Place, whole: Run
) -> None:
    """Down to the minimum at once, from the memory of the node that is left: storage has nothing;
    up again through a checkpoint, with no step repeated."""
    place.nodes(2)
    run = place.start(
        "shrink-grow", tst__workers="[1,2]", cluster__workers="[1,2]", checkpoint__every=1000,
        # slow, so that the new node comes, and is looked at, well before the end
        checkpoint__memory_every=1, train__micro_batch_size=1,
    )  # fmt: skip
    place.inject(run, Faults().kill_node_at(20).add_node_at(25))
    assert_nothing_lost(run, whole, same_size=False)
    sizes = [event["world_size"] for event in run.events("attempt")]
    assert sizes == [2, 1, 2]
    assert run.repeated()[1] <= EVERY
    assert run.events("attempt")[1]["from_memory"], "the other node has a copy"
    assert run.repeated()[2] == 0
    (grown,) = run.events("grow")
    assert (grown["before"], grown["workers"]) == (1, 2)
    assert [event["reason"] for event in run.events("stop")] == ["grow"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "file"),
    [("run.storage", "blind-to-run.storage/config.yaml"), ("data.prepared", "manifest.json")],
)
def test_a_node_that_does_not_see_what_the_run_needs_takes_no_part(
    place: Place, whole: Run, setting: str, file: str
) -> None:
    """A worker would end there, and a reader find no shards; another node is waited for."""
    place.nodes(2)
    changes, unseen = {}, place.folder / "runs"
    if setting == "data.prepared":
        unseen = place.folder / "prepared elsewhere"
        (prepared,) = (place.folder / "runs" / "shards").glob("*/manifest.json")
        shutil.copytree(prepared.parent, unseen)
        changes = {"data__prepared": unseen}
    run = place.start(f"blind-to-{setting}", **changes)
    run.reach(15)
    place.cluster.remove_node(place.cluster.node_ids()[0])
    wait_until(lambda: bool(run.events("waiting")), "the run to wait for a node")
    with hidden(unseen):
        blind = place.cluster.add_node(1, SPOT)
    wait_until(lambda: bool(run.events("unseen")), "the run to say what the node does not see")
    (told,) = run.events("unseen")
    assert told["node"] == blind
    assert re.fullmatch(rf"node \S+ does not see {unseen}/{file} \({setting}\)", told["why"])
    refused = place.start(f"refused-{setting}", **changes).finish(status=1)
    assert f"({setting}); give a folder that all nodes share" in refused
    place.cluster.add_node(1, SPOT)
    run.finish()
    assert_nothing_lost(run, whole)
    assert [blind in event["nodes"] for event in run.events("attempt")] == [False, False]
    assert len(run.events("failure")) == 1, "of the lost node"
    place.cluster.remove_node(blind)


@pytest.mark.slow
def test_a_node_whose_worker_dies_again_and_again_is_left_out(place: Place, whole: Run) -> None:
    place.nodes(3)
    run = place.start(
        "bad-node", tst__workers="[2,3]", cluster__workers="[2,3]",
        fault__max_failures=3, fault__max_node_failures=2,
    )  # fmt: skip
    target = LocalTarget(place.cluster)
    driver = Injector(Storage(str(run.folder)), (), target)._driver
    bad = place.cluster.node_ids()[0]
    for attempt in (1, 2):
        wait_until(
            lambda n=attempt: any(r["attempt"] == n for r in run.records[-1:]),  # type: ignore[misc]
            f"a step of attempt {attempt}",
        )
        (worker,) = [w for w in target.workers(driver()) if w.node_id == bad]
        target.signal_worker(worker, signal.SIGKILL)
        wait_until(
            lambda n=attempt: len(run.events("failure")) == n,  # type: ignore[misc]
            f"failure {attempt}",
        )
    run.finish()
    assert_nothing_lost(run, whole, same_size=False)
    assert [event["node"] for event in run.events("failure")] == [bad] * 2
    (told,) = run.events("left_out")
    assert (told["node"], told["failures"], told["workers"]) == (bad, 2, 2)
    attempts = run.events("attempt")
    assert [bad in event["nodes"] for event in attempts] == [True, True, False]
    assert [event["world_size"] for event in attempts] == [3, 3, 2]
    assert "going on without it (fault.max_node_failures)" in run.said()


@pytest.mark.slow
def test_below_the_minimum_the_run_waits_and_says_so(place: Place, whole: Run) -> None:
    place.nodes(2)
    run = place.start("waits")
    run.reach(30)
    place.cluster.remove_node(place.cluster.node_ids()[0])
    wait_until(lambda: bool(run.events("waiting")), "the run to say that it waits")
    stood_at = last_step(run.folder)
    place.cluster.add_node(1, SPOT)
    run.finish()
    assert_nothing_lost(run, whole)
    assert "waiting for nodes: room for 1 of at least 2 workers" in run.said()
    state = json.loads((run.folder / "run.json").read_text())
    assert state["time"]["parts"]["waiting_for_nodes"] > 0
    assert stood_at < STEPS


@pytest.mark.slow
def test_a_reclaimed_node_is_left_in_time_and_no_step_is_lost(place: Place, whole: Run) -> None:
    place.nodes(2)
    run = place.start("reclaimed", tst__workers="[1,2]", cluster__workers="[1,2]")
    place.inject(run, Faults().drain_at(30, deadline_s=20))
    assert_nothing_lost(run, whole, same_size=False)
    assert [event["reason"] for event in run.events("stop")] == ["preemption"]
    assert run.repeated() == [0, 0]
    assert run.events("failure") == []
    (notice,) = run.events("preemption")
    assert len(notice["nodes"]) == 1


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(place: Place, whole: Run) -> None:
    """Cut, altered, without a file, without its marker; a worker dies before there is another."""
    place.nodes(2)
    run = place.start("damaged", checkpoint__memory_every="null", checkpoint__every=20)
    faults = Faults()
    for step, how in ((44, "cut"), (64, "flip"), (84, "remove"), (104, "unmark")):
        faults = faults.damage_checkpoint_at(step, how=how).fail_at(step)
    place.inject(run, faults)
    assert_nothing_lost(run, whole)
    # Without its marker a checkpoint does not exist, which is no damage to tell of.
    assert len(run.events("checkpoint_damaged")) == 3
    assert all(20 <= repeated <= 60 for repeated in run.repeated()[1:])


@pytest.mark.slow
def test_all_checkpoints_damaged_stops_the_run_and_says_what_is_lost(place: Place) -> None:
    place.nodes(2)
    run = place.start("all-damaged", checkpoint__memory_every="null")
    run.reach(45)
    run.process.kill()
    run.process.wait()
    for path in (run.folder / "checkpoints").glob("step-*/*.distcp"):
        path.write_bytes(b"")
    run.start()
    said = run.finish(status=1)
    assert "are damaged" in said and "steps would be lost" in said
    assert "Traceback" not in said
    assert last_step(run.folder) >= 45


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_filesystem(tmp_path / "disk", 64) as folder:
        yield folder


@pytest.mark.slow
def test_a_full_disk_is_told_and_outlived(place: Place, whole: Run, small_disk: Path) -> None:
    place.nodes(2)
    run = place.start(
        "full-disk", run__storage=small_disk, data__cache=place.folder / "runs" / "shards",
        fault__max_failed_saves=100,
    )  # fmt: skip
    place.inject(run, (Fault("fill_disk", at_step=50, seconds=4.0),))
    assert_nothing_lost(run, whole)
    assert run.repeated() == [0]


@pytest.mark.slow
def test_a_disk_that_stays_full_stops_the_run_with_its_last_checkpoint_intact(
    place: Place, whole: Run, small_disk: Path
) -> None:
    place.nodes(2)
    run = place.start(
        "stays-full", run__storage=small_disk, data__cache=place.folder / "runs" / "shards",
        fault__max_failed_saves=2, checkpoint__memory_every="null",
    )  # fmt: skip
    place.inject(run, (Fault("fill_disk", at_step=50, seconds=12.0),), status=1)
    said = run.said()
    assert "checkpoints in a row could not be saved (fault.max_failed_saves)" in said
    assert "Traceback" not in said
    run.start()
    run.finish()
    assert_nothing_lost(run, whole)


@pytest.mark.slow
def test_a_killed_driver_and_a_new_cluster(place: Place, whole: Run, tmp_path: Path) -> None:
    """The driver is killed; then the cluster it ran on is lost as a whole."""
    with LocalCluster(head_cpus=2, system_config=QUICK_TO_NOTICE) as lost:
        other = Place(lost, tmp_path, place.text)
        lost.add_node(2, {"spot": 2.0})  # one node for both workers: it is there the sooner
        settings = {"data__cache": place.folder / "runs" / "shards"}
        run = other.start("moved", **settings)
        run.reach(25)
        run.process.kill()
        run.process.wait()
        run.start()
        run.reach(60)
        run.process.send_signal(signal.SIGSTOP)  # it must not tidy up
    run.process.kill()
    run.process.wait()
    place.nodes(2)
    run.environment = os.environ | place.cluster.environment
    run.start()
    run.finish()
    assert_nothing_lost(run, whole)
    assert len(run.events("attempt")) == 3


@pytest.mark.slow
def test_asked_to_stop_the_driver_checkpoints_first(place: Place, whole: Run) -> None:
    """SIGTERM; one SIGINT does the same, see below and in test_faults.py."""
    number = signal.SIGTERM
    place.nodes(2)
    run = place.start("asked", checkpoint__every=1000, checkpoint__memory_every=1000)
    run.reach(50)
    run.process.send_signal(number)
    said = run.finish(status=128 + number)
    assert "the same command resumes" in said.splitlines()[-1]
    stopped_at = last_step(run.folder)
    assert [event["step"] for event in run.events("checkpoint")] == [stopped_at]
    run.start()
    run.finish()
    assert run.repeated() == [0, 0]
    assert_nothing_lost(run, whole)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(place: Place) -> None:
    place.nodes(2)
    run = place.start("impatient", checkpoint__every=1000, checkpoint__memory_every="null")
    run.reach(10)
    target = LocalTarget(place.cluster)
    driver = Injector(Storage(str(run.folder)), (), target)._driver
    target.signal_worker(target.workers(driver())[0], signal.SIGSTOP)  # nothing will be saved
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: "Ctrl-C again" in run.said(), "the first to be heard")
    run.process.send_signal(signal.SIGINT)
    said = run.finish(status=130)
    assert "interrupted; the same command resumes" in said
    assert run.events("checkpoint") == []


@pytest.mark.slow
def test_a_model_that_breaks_is_rolled_back_and_then_given_up(place: Place) -> None:
    """A learning rate that no model survives: its data is named, no broken model is kept."""
    place.nodes(2)
    run = place.start(
        "breaks", train__learning_rate=1e30, train__warmup=20,
        fault__max_skipped=3, fault__max_rollbacks=1,
    )  # fmt: skip
    said = run.finish(status=1)
    assert "after 1 roll-backs (fault.max_rollbacks)" in said and "Traceback" not in said
    (rollback,) = run.events("rollback")
    steps = range(rollback["first_step"] + 1, rollback["last_step"] + 2)
    assert [span[0] for span in rollback["spans"]] == [step for step in steps for _ in range(15)]
    again = [r for r in run.records if r["step"] in steps and r["attempt"] == 2]
    assert {r["mark"] for r in again} == {"passed_over"}
    assert all(event["step"] <= rollback["first_step"] for event in run.events("checkpoint"))


SOAK_KINDS = (*OWN_KINDS, "kill_driver")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A short soak for every day; `--soak N` makes one long one of N faults."""
    if metafunc.definition.name == "test_soak":
        long = metafunc.config.getoption("--soak")
        cases = [(long, 11)] if long else [(4, 1)]
        names = [f"{faults}-faults-seed-{seed}" for faults, seed in cases]
        metafunc.parametrize(("num_faults", "seed"), cases, ids=names)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_soak(place: Place, whole: Run, num_faults: int, seed: int) -> None:
    """Faults at random, of every kind that strikes processes, nodes and files: nothing is lost."""
    steps = max(30 * num_faults, STEPS)
    settings = {"train__steps": steps, "tst__ratio": SWITCH / STEPS}
    place.nodes(2)
    if steps != STEPS:
        whole = place.start(f"calm-{steps}", **settings)
        whole.finish()
    run = place.start(f"soak-{num_faults}-{seed}", **settings, fault__max_failures=5)
    faults = schedule(seed, num_faults, first_step=15, last_step=steps - 15, kinds=SOAK_KINDS)
    done = place.inject(run, faults, replaced=True)
    assert_nothing_lost(run, whole)
    account = json.loads((run.folder / "run.json").read_text())["time"]["parts"]
    print(f"\n{len(done)} faults: " + ", ".join(record["kind"] for record in done))
    print(f"goodput {account['stepping'] / sum(account.values()):.1%}: {account}")
