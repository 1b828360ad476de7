"""A stage's decisions, without Ray: what counts as progress, when a run gives up, what it says."""

from __future__ import annotations

import gc
import json
import math
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RpcError

from pipelines.manifest import Manifest
from tests.tiny import make_config, make_corpus, make_job
from tst_ray.checkpoint import MARKER, folder_name
from tst_ray.elastic import Node
from tst_ray.errors import Interrupted, RunError
from tst_ray.group import GroupFailed
from tst_ray.guard import Guard
from tst_ray.hold import Hold, Overtaken
from tst_ray.job import DONE, FAILED_SAVES, GROW, INTERRUPT, Ended, Job
from tst_ray.journal import read_state, update_state
from tst_ray.model import build_model
from tst_ray.room import Room, steadily
from tst_ray.sight import Sight
from tst_ray.stage import Stage
from tst_ray.storage import Storage

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


class Scripted(Stage):
    """Attempts that end as a script says: where each starts, and how it ends."""

    def __init__(self, folder: Path, manifest: Manifest, script: list[tuple[int, Any]]) -> None:
        config = make_config(folder, manifest, fault__max_failures=2)
        job = make_job(config, manifest)
        self.said: list[str] = []
        self.script = script
        super().__init__(job, job.plan.phases, self.said.append)
        update_state(self.run, status="starting")
        self.on_attempt: Callable[[], None] = lambda: None

    def interrupt(self) -> None:
        self._interrupts.by = signal.SIGTERM

    def _one_attempt(self) -> Ended:
        self.on_attempt()
        starts_at, ending = self.script.pop(0)
        attempt = read_state(self.run).get("attempt", 0) + 1
        update_state(self.run, attempt=attempt, attempt_from=starts_at, step=starts_at)
        if isinstance(ending, Exception):
            raise ending
        if ending.reason == DONE:
            (self.run / "checkpoints" / f"step-{ending.step:08d}").write("COMMITTED", "x")
        return ending


DIED = GroupFailed("the process of rank 1 died", started=True)
NO_START = GroupFailed("a node was lost", started=False)
NO_ROOM = GroupFailed("nothing is free", started=False, no_room=True)
FINISHED = (6, Ended(8, DONE))


def failures(stage: Stage) -> list[int]:
    events = stage.run.read_lines("events.jsonl")
    return [event["in_a_row"] for event in events if event["event"] == "failure"]


def test_failures_with_progress_between_them_are_no_reason_to_give_up(
    tmp_path: Path, manifest: Manifest
) -> None:
    stage = Scripted(tmp_path, manifest, [(n, DIED) for n in range(6)] + [FINISHED])
    stage.train()
    assert failures(stage) == [1] * 6
    assert "the process of rank 1 died" in stage.said[0]


@pytest.mark.parametrize("failure", [DIED, NO_START])
def test_failures_without_progress_end_the_run(
    tmp_path: Path, manifest: Manifest, failure: GroupFailed
) -> None:
    stage = Scripted(tmp_path, manifest, [(3, failure)] * 10)
    with pytest.raises(RunError, match=r"gave up after 3 failures .*fault.max_failures"):
        stage.train()
    assert failures(stage) == [1, 2, 3]


def test_an_attempt_that_was_asked_to_stop_makes_failures_count_anew(
    tmp_path: Path, manifest: Manifest
) -> None:
    script = [(3, DIED), (3, DIED), (3, Ended(4, GROW)), (4, DIED), (4, DIED), FINISHED]
    stage = Scripted(tmp_path, manifest, script)
    stage.train()
    assert failures(stage) == [1, 2, 1, 2]


def test_saves_that_keep_failing_end_the_run_with_the_remedy(
    tmp_path: Path, manifest: Manifest
) -> None:
    stage = Scripted(tmp_path, manifest, [(0, Ended(5, FAILED_SAVES))])
    with pytest.raises(RunError, match=r"fault.max_failed_saves.*make room in run.storage"):
        stage.train()


def test_an_interrupt_says_how_to_go_on_and_its_status_is_the_signals(
    tmp_path: Path, manifest: Manifest
) -> None:
    stage = Scripted(tmp_path, manifest, [(0, Ended(5, INTERRUPT))])
    stage.on_attempt = stage.interrupt
    with pytest.raises(Interrupted, match="the same command resumes") as caught:
        stage.train()
    assert caught.value.exit_status == 143


def test_an_interrupt_does_not_wait_for_a_terminal_that_stands_still(
    tmp_path: Path, manifest: Manifest
) -> None:
    stage, taken = Scripted(tmp_path, manifest, []), threading.Event()
    stage.say = lambda line: taken.wait(PATIENCE_S)  # type: ignore[assignment]
    caller = threading.Thread(target=stage._on_interrupt)
    caller.start()
    caller.join(PATIENCE_S / 2)
    assert not caller.is_alive()
    taken.set()


@pytest.mark.parametrize(
    ("saved", "said"), [(3, "with a checkpoint of step 3;"), (0, "before the first checkpoint;")]
)
def test_an_interrupt_names_a_checkpoint_that_there_is(
    tmp_path: Path, manifest: Manifest, saved: int, said: str
) -> None:
    """Storage may have taken none where the group ended."""
    stage = Scripted(tmp_path, manifest, [(0, Ended(5, INTERRUPT))])
    if saved:
        (stage.run / "checkpoints" / folder_name(saved)).write(MARKER, "x")
    stage.on_attempt = stage.interrupt
    with pytest.raises(Interrupted, match=said):
        stage.train()


def test_a_stage_whose_last_checkpoint_is_missing_is_not_done(
    tmp_path: Path, manifest: Manifest
) -> None:
    stage = Scripted(tmp_path, manifest, [(0, Ended(5, DONE))])
    with pytest.raises(RunError, match="was not committed"):
        stage.train()


def test_an_interrupt_while_a_stage_ends_is_not_forgotten(
    tmp_path: Path, manifest: Manifest
) -> None:
    """The group was done before it saw the request; the phases after it must not begin."""
    stage = Scripted(tmp_path, manifest, [(0, Ended(4, DONE))])
    stage.job = replace(stage.job, last_step=4)
    stage.on_attempt = stage.interrupt
    with pytest.raises(Interrupted, match="checkpoint of step 4"):
        stage.train()


def test_an_interrupt_while_the_run_ends_lets_it_end(tmp_path: Path, manifest: Manifest) -> None:
    stage = Scripted(tmp_path, manifest, [FINISHED])
    stage.on_attempt = stage.interrupt
    stage.train()


def test_an_interrupt_before_an_attempt_is_not_forgotten(
    tmp_path: Path, manifest: Manifest
) -> None:
    stage = Scripted(tmp_path, manifest, [FINISHED])
    stage.interrupt()
    with pytest.raises(Interrupted, match="before the first checkpoint"):
        stage.train()
    assert stage.script == [FINISHED]


class Supervised(Stage):
    """A real stage over groups that do as a script says."""

    def __init__(self, folder: Path, manifest: Manifest, workers: str, **overrides: Any) -> None:
        config = make_config(
            folder,
            manifest,
            **overrides,
            cluster__backend="ray",
            tst__workers=workers,
            cluster__workers=workers,
        )
        job = make_job(config, manifest)
        super().__init__(job, job.plan.phases, lambda text: None)
        update_state(self.run, status="starting")


def test_what_keeps_the_supervisor_from_its_work_does_not_end_the_group(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "1")
    looks = iter([False, False, True])

    class Group:
        def __init__(self, *args: Any) -> None: ...
        def wait(self, seconds: float) -> bool:
            return next(looks)

        def outcome(self) -> Ended:
            return Ended(8, DONE)

    def down(*args: Any) -> Any:
        raise ConnectionError("the head node does not answer")

    monkeypatch.setattr("tst_ray.stage.Group", Group)
    monkeypatch.setattr("tst_ray.stage.draining_nodes", down)
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, without: None)
    assert stage._one_attempt() == Ended(8, DONE)


def test_events_of_an_object_store_are_joined_while_a_group_trains(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is an object of its own, and a run of months has thousands."""
    stage = Supervised(tmp_path, manifest, "1")
    stage.run = Storage(f"memory://{tmp_path.name}/run")
    monkeypatch.setattr("tst_ray.stage.draining_nodes", set)
    monkeypatch.setattr(stage._growing, "worth", lambda *args: None)
    told = [{"event": "checkpoint", "step": step} for step in (10, 20)]
    for event in told:
        stage.run.add("events.jsonl", json.dumps(event) + "\n")
    beside = stage.run / "events.jsonl.d"
    stage._supervise(1, started=time.monotonic())
    assert len(beside.names()) == 2, "not at each look"
    stage._folded_at -= 601.0
    stage._supervise(1, started=time.monotonic())
    assert beside.names() == []
    assert stage.run.read_lines("events.jsonl") == told


def test_workers_for_whom_there_was_no_room_are_not_tried_again_at_once(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that others use too, what nodes have is not what is free."""
    stage = Supervised(tmp_path, manifest, "[1, 4]")
    tried: list[int] = []

    class Group:
        def __init__(self, job: Job, world_size: int, without: Any, readers: Any) -> None:
            tried.append(world_size)

        def wait(self, seconds: float) -> bool:
            return True

        def outcome(self) -> Ended:
            if tried[-1] > 2:
                raise GroupFailed("nothing is free", started=False, no_room=True)
            return Ended(8, DONE)

    monkeypatch.setattr("tst_ray.stage.Group", Group)
    nodes = [3]
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: min(most, nodes[0]))
    monkeypatch.setattr("tst_ray.room.free_room", lambda config, most, without: 2)
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, without: None)
    with pytest.raises(GroupFailed):
        stage._one_attempt()
    assert stage._one_attempt() == Ended(8, DONE)
    assert tried == [3, 2]
    (told,) = [e for e in stage.run.read_lines("events.jsonl") if e["event"] == "no_room"]
    assert (told["workers"], told["left"]) == (3, 2)
    assert stage.room.now() == 2
    nodes[0] = 4  # another joined
    assert stage.room.now() == 4
    nodes[0] = 3
    stage.room._until = 0.0  # a while after
    assert stage.room.now() == 3


def test_a_group_that_grew_into_what_others_use_goes_back_to_what_it_was(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one worker fewer each time: that would take a minute each."""
    stage = Supervised(tmp_path, manifest, "[1, 4]")
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    monkeypatch.setattr("tst_ray.room.free_room", lambda *args: 0)  # ours, not free yet
    stage.room.ran(2)
    stage._note_no_room(4)
    assert stage.room.now() == 2
    stage._note_no_room(2)  # nor is there room for those now
    assert stage.room.now() == 1


def test_growing_into_what_others_keep_becomes_rare(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try ends a group that trains."""
    room = Supervised(tmp_path, manifest, "[1, 4]").room
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    now = [0.0]
    monkeypatch.setattr("tst_ray.room.time.monotonic", lambda: now[0])

    def tries(seconds: float) -> int:
        end, count = now[0] + seconds, 0
        while now[0] < end:
            now[0] += 60.0
            if room.possible(2) > 2:
                room.lacked(4)
                count += 1
            room.ran(2)
        return count

    room.ran(2)
    assert tries(3600.0) == 3
    assert 20 < tries(24 * 3600.0) < 30
    room.ran(4)  # they have gone
    room.ran(2)
    assert tries(3600.0) == 3


def test_a_driver_that_was_overtaken_ends_and_begins_nothing(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Scripted(tmp_path, manifest, [(0, DIED), FINISHED])

    class Lost(Hold):
        def check(self) -> None:
            if len(stage.script) == 1:
                raise Overtaken("another driver has taken this run")

    stage._held = Lost()
    with pytest.raises(Overtaken):
        stage.train()
    assert stage.script == [FINISHED]


def test_a_driver_that_is_overtaken_does_not_wait_for_its_group(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "1")

    class Endless:
        def __init__(self, *args: Any) -> None:
            pass

        def wait(self, seconds: float) -> bool:
            assert not isinstance(stage._held, Lost), "waits on"
            stage._held = Lost()
            return False

    class Lost(Hold):
        def check(self) -> None:
            raise Overtaken("another driver has taken this run")

    monkeypatch.setattr("tst_ray.stage.Group", Endless)
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, without: None)
    with pytest.raises(Overtaken):
        stage._one_attempt()


def test_a_head_node_that_stays_away_ends_the_run_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look() -> None:
        raise RpcError("unavailable")

    monkeypatch.setattr("tst_ray.storage.pauses", lambda patience_s: iter(()))
    with pytest.raises(RunError, match=r"the head node does not answer .*the same command resumes"):
        steadily(look)


def test_a_lack_of_room_is_no_failure(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run waits for nodes as long as it takes, whoever has them meanwhile."""
    stage = Scripted(tmp_path, manifest, [*[(0, NO_ROOM)] * 9, (0, DIED), FINISHED])
    stage.train()
    assert failures(stage) == [1]
    stage = Scripted(tmp_path / "stopped", manifest, [(0, NO_ROOM), FINISHED])
    stage.on_attempt = stage.interrupt
    with pytest.raises(Interrupted):
        stage.train()


def test_of_gpus_only_those_that_nobody_uses_are_grown_into(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "[1, 4]")
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    monkeypatch.setattr("tst_ray.room.free_room", lambda config, most, without: 1)
    assert stage.room.possible(2) == 4  # on CPUs, what is free says little
    cluster = stage.config.cluster.model_copy(update={"gpus_per_worker": 1.0})
    on_gpus = Room(stage.config.model_copy(update={"cluster": cluster}), 1, 4, Sight())
    assert on_gpus.possible(2) == 3


def test_a_group_settles_from_its_first_step_on(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading and compiling for minutes is no time in which it has trained."""
    stage = Supervised(tmp_path, manifest, "[1, 4]", cluster__growth_gain=0)
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    monkeypatch.setattr("tst_ray.room.nodes_for_workers", lambda config, without: [])
    monkeypatch.setattr("tst_ray.stage.draining_nodes", set)
    update_state(stage.run, attempt=1, attempt_from=0, step=3)
    for step in (1, 2, 3):
        record = {"step": step, "attempt": 1, "world_size": 1, "step_time_s": 1.0}
        stage.run.append("metrics.jsonl", json.dumps(record) + "\n")
    long_ago = time.monotonic() - 10_000
    stage._growing._resized_at = long_ago
    stage._supervise(1, started=long_ago)
    assert stage._asked is None
    stage._growing._began_at -= 61
    stage._looked_at = long_ago
    stage._supervise(1, started=long_ago)
    assert stage._asked == GROW
    (told,) = [e for e in stage.run.read_lines("events.jsonl") if e["event"] == "grow"]
    assert (told["step"], told["workers"], told["before"]) == (3, 4, 1)


def test_a_head_node_that_is_away_between_two_groups_is_waited_for(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "[1, 4]")
    answers = iter([RpcError("unavailable"), RuntimeError("no GCS"), 3])

    def room(config: Any, most: int, without: Any) -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def asked(*request: Any) -> None:
        raise RpcError("unavailable")

    monkeypatch.setattr("tst_ray.room.room_for", room)
    monkeypatch.setattr("tst_ray.autoscaler.ask", asked)
    monkeypatch.setattr("tst_ray.storage.time.sleep", lambda seconds: None)
    assert stage._wait_for_room() == 3


def test_what_else_keeps_workers_from_starting_says_nothing_of_room(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "[1, 4]")

    class Group:
        def __init__(self, *args: Any) -> None: ...
        def wait(self, seconds: float) -> bool:
            return True

        def outcome(self) -> Ended:
            raise NO_START

    monkeypatch.setattr("tst_ray.stage.Group", Group)
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: min(most, 4))
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, without: None)
    with pytest.raises(GroupFailed):
        stage._one_attempt()
    assert stage.room.now() == 4


def test_a_node_that_ended_many_attempts_is_left_out_and_told(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three places on three nodes, of which two are wanted; the worker on one dies each time."""
    stage = Supervised(tmp_path, manifest, "[1, 2]", fault__max_node_failures=3)
    groups: list[list[str]] = []

    class Group:
        def __init__(self, job: Job, world_size: int, without: Any, readers: Any) -> None:
            self.nodes = [name for name in ("bad", "good", "other") if name not in without]
            self.nodes = self.nodes[:world_size]
            groups.append(self.nodes)
            run = Storage(job.run_url)
            attempt = read_state(run).get("attempt", 0) + 1
            update_state(run, attempt=attempt, attempt_from=attempt, nodes=self.nodes)

        def wait(self, seconds: float) -> bool:
            return True

        def outcome(self) -> Ended:
            if "bad" in self.nodes:
                ranks = dict.fromkeys([self.nodes.index("bad")])
                raise GroupFailed("the process died", started=True, ranks=ranks)
            return Ended(8, GROW)

    def room_for(config: Any, most: int, without: Any) -> int:
        return min(most, 3 - len(without))

    monkeypatch.setattr("tst_ray.stage.Group", Group)
    monkeypatch.setattr("tst_ray.room.room_for", room_for)
    monkeypatch.setattr("tst_ray.stage.lost_nodes", lambda nodes: set())
    asked: list[set[str]] = []
    monkeypatch.setattr(
        "tst_ray.room.ask_autoscaler", lambda config, most, without: asked.append(set(without))
    )
    monkeypatch.setattr("tst_ray.room.address_of", lambda node: f"address of {node}")
    nodes = [Node(name, {}) for name in ("bad", "good", "other")]
    monkeypatch.setattr("tst_ray.room.living_nodes", lambda: nodes)
    assert [stage._attempt() for _ in range(4)] == [None] * 3 + [Ended(8, GROW)]
    assert groups == [["bad", "good"]] * 3 + [["good", "other"]]
    assert asked == [set()] * 3 + [{"bad"}], "another is to be started in its place"
    (told,) = [e for e in stage.run.read_lines("events.jsonl") if e["event"] == "left_out"]
    assert (told["node"], told["address"]) == ("bad", "address of bad")
    assert (told["failures"], told["workers"]) == (3, 2)

    # Another driver knows it too.
    again = Supervised(tmp_path, manifest, "[1, 2]", fault__max_node_failures=3)
    assert again._attempt() == Ended(8, GROW)
    assert groups[-1] == ["good", "other"]
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: 0 if without else 1)
    assert again._attempt() is None  # no other is left: better that node than none
    assert groups[-1] == ["bad"]


def test_a_node_that_is_left_out_and_missed_is_taken_back(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nodes hold is not what is free: others may use the room there is without it."""
    stage = Supervised(tmp_path, manifest, "[1, 2]", fault__max_node_failures=3)
    event = {"event": "left_out", "time": time.time(), "node": "bad"}
    stage.run.append("events.jsonl", json.dumps(event) + "\n")
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: most)
    monkeypatch.setattr("tst_ray.room.free_room", lambda config, most, without: 1)
    stage._leave_out()
    assert stage.room.without == {"bad"}
    stage._note_no_room(2)
    assert stage.room.without == frozenset()
    stage._leave_out()
    assert stage.room.without == frozenset()


def test_nodes_that_do_not_see_the_run_are_no_room_and_told_once(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Sight):
        problem: str | None = "node 10.0.0.7 does not see /runs"

        def look(self) -> None:
            """Nothing: what there is to see is given."""

        def unseen(self) -> frozenset[str]:
            return frozenset({"blind"} if self.problem else ())

        def problems(self) -> dict[str, str]:
            return {"blind": self.problem} if self.problem else {}

    stage = Supervised(tmp_path, manifest, "[1, 2]")
    sight = stage.room.sight = Seen()
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: 2 - len(without))
    assert (stage.room.now(), stage.room.without) == (1, {"blind"})
    for problem in (sight.problem, sight.problem, None, sight.problem):
        sight.problem = problem
        stage._tell_of_the_blind()
    told = [e for e in stage.run.read_lines("events.jsonl") if e["event"] == "unseen"]
    assert [(e["node"], e["why"]) for e in told] == [
        ("blind", "node 10.0.0.7 does not see /runs")
    ] * 2
    assert not stage._need_not_wait(), "the node may yet be seen to see"
    sight.problem = None
    assert (stage.room.now(), stage.room.without) == (2, frozenset())
    assert stage._need_not_wait()


def test_interrupted_while_nodes_are_looked_at_no_group_is_started(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "[1, 2]")

    class Slow(Sight):
        def settle(self, enough: Callable[[], bool] = lambda: False) -> None:
            stage._interrupts.by = signal.SIGTERM
            assert enough()

    stage.room.sight = Slow()
    monkeypatch.setattr("tst_ray.room.room_for", lambda config, most, without: 1)
    monkeypatch.setattr("tst_ray.room.ask_autoscaler", lambda config, most, without: None)
    with pytest.raises(Interrupted):
        stage._wait_for_room()


def test_no_node_is_left_out_where_that_is_not_wanted(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "[1, 2]", fault__max_node_failures="null")
    event = {"event": "left_out", "time": time.time(), "node": "bad"}
    stage.run.append("events.jsonl", json.dumps(event) + "\n")
    stage._leave_out()
    assert stage.room.without == frozenset()


def test_a_stage_has_no_more_workers_than_its_steps_have_sequences(
    tmp_path: Path, manifest: Manifest
) -> None:
    """Of a batch of 5, cut into bags: 20 sequences a step in phase one, 5 in phase two."""
    stage = Supervised(tmp_path, manifest, "[2, 64]", tst__fold="batch")
    assert [phase.num_sequences for phase in stage.phases] == [20, 5]
    assert (stage.room.least, stage.room.most) == (2, 5)
    assert Supervised(tmp_path / "few", manifest, "[2, 4]").room.most == 4


def test_checkpoints_in_memory_are_where_workers_are_or_may_come(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, set[str]]] = []

    class Vaults:
        def cover(self, nodes: set[str]) -> None:
            told.append(("cover", nodes))

        def keep_to(self, nodes: set[str]) -> None:
            told.append(("keep to", nodes))

    def placed() -> list[tuple[str, set[str]]]:
        told.clear()
        stage._place_vaults()
        return told

    stage = Supervised(tmp_path, manifest, "[1, 4]")
    stage._vaults = Vaults()
    nodes = [Node("head", {"CPU": 0.0}), *(Node(name, {"CPU": 1.0}) for name in "abc")]
    monkeypatch.setattr(
        "tst_ray.nodes.living_nodes",
        lambda without=(): [node for node in nodes if node.node_id not in without],
    )
    assert placed() == [("cover", {"a", "b", "c"})]
    stage.room._left_out = frozenset("a")
    assert placed() == [("cover", {"b", "c"})]
    stage.room._left_out = frozenset()
    at_work: dict[str, Any] = {"attempt": 1, "attempt_from": 10, "nodes": ["b", "c", "b"]}
    update_state(stage.run, **at_work, step=209)
    stage._trains = True
    assert placed() == [("cover", {"a", "b", "c"})], "what they had is not yet written anew"
    update_state(stage.run, step=210)
    assert placed() == [("keep to", {"b", "c"}), ("cover", {"b", "c"})]
    update_state(stage.run, nodes=["b"])
    assert placed() == [("cover", {"a", "b", "c"})], "second copies are on another one"


def test_a_driver_whose_node_goes_ends_with_a_checkpoint(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Supervised(tmp_path, manifest, "1")
    monkeypatch.setattr("tst_ray.stage.own_node", lambda: "drivers")
    leaving = {"other"}
    monkeypatch.setattr("tst_ray.stage.draining_nodes", lambda: leaving)
    stage._looked_at = time.monotonic()
    stage._supervise(1, started=time.monotonic())
    assert stage._asked is None
    leaving.add("drivers")
    stage._supervise(1, started=time.monotonic())
    assert stage._asked == INTERRUPT
    (told,) = [e for e in stage.run.read_lines("events.jsonl") if e["event"] == "preemption"]
    assert (told["nodes"], told["driver"]) == (["drivers"], True)
    assert stage._interrupts.by is None, "a first Ctrl-C must not be taken for a second"
    with pytest.raises(Interrupted, match="the same command resumes") as caught:
        stage._take(Ended(4, INTERRUPT))
    assert caught.value.exit_status == 143


def test_without_ray_a_model_is_gone_before_the_next_is_built(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a roll-back, two would be held at once."""
    built: list[weakref.ref[Any]] = []
    alive: list[int] = []
    observe = Guard.observe

    def build(*args: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in built))
        model = build_model(*args, **options)
        built.append(weakref.ref(model))
        return model

    def mistrust(guard: Guard, step: int, loss: float, norm: float) -> str | None:
        return observe(guard, step, math.nan if step == 4 and len(built) == 1 else loss, norm)

    monkeypatch.setattr("tst_ray.worker.build_model", build)
    monkeypatch.setattr(Guard, "observe", mistrust)
    job = make_job(make_config(tmp_path, manifest, fault__max_skipped=1), manifest)
    stage = Stage(job, job.plan.phases, print)
    gc.disable()  # it might happen to run in between
    try:
        stage.train()
    finally:
        gc.enable()
    assert alive == [0, 0]
    assert not any(model() for model in built)
