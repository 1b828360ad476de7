"""Whole runs on real Ray, as people start them: the command line, text in, a model folder out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import end_tree
from tst_ray.goodput import PARTS

ROOT = Path(__file__).parent.parent
PATIENCE_S = 240.0
OPEN = {"RAY_AUTH_MODE": "disabled"}  # a head on the loopback interface needs no token
STEPS, SWITCH = 24, 10
SETTINGS = {
    "model.config": (
        "{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64, "
        "tie_word_embeddings: false}"
    ),
    "data.vocab_size": 300,
    "data.row_tokens": 512,
    "data.validation_share": 0.1,
    "data.shuffle_tokens": 4096,
    "train.steps": STEPS,
    "train.sequence_length": 16,
    "train.batch_size": 7,
    "train.threads": 1,
    "tst.ratio": SWITCH / STEPS,
    "tst.workers": 1,
    "cluster.workers": 2,
    "checkpoint.every": 4,
    "metrics.val_every": 8,
    "metrics.val_sequences": 8,
}


def write_text(folder: Path) -> Path:
    """Some 120 kB of text in 40 files: the sources of a few modules of the standard library."""
    folder.mkdir(parents=True)
    for name in ("argparse", "ast", "json.decoder"):
        module = __import__(name, fromlist=["x"])
        lines = Path(module.__file__).read_text().splitlines(keepends=True)
        for part in range(0, len(lines), 120):
            (folder / f"{name}-{part:05d}.py").write_text("".join(lines[part : part + 120]))
    return folder


def command(storage: Path, text: Path, name: str, **changes: Any) -> list[str]:
    settings = {**SETTINGS, "data.sources": text, "run.storage": storage, "run.name": name}
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [
        sys.executable, "-m", "tst_ray.run",
        *(f"--{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    ours = ("RAY_ADDRESS", "RAY_AUTH_MODE")
    env = {k: v for k, v in os.environ.items() if k not in ours} | environment
    with log.open("ab") as file:
        return subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=file, env=env)


def finish(arguments: list[str], log: Path, **environment: str) -> str:
    process = start(arguments, log, **environment)
    try:
        status = process.wait(timeout=PATIENCE_S)
    finally:
        process.kill()
    output = log.read_text()
    assert status == 0, output[-3000:]
    return output


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / name
    if not path.exists():
        return []
    complete = [line for line in path.read_text().split("\n")[:-1] if line]
    return [json.loads(line) for line in complete]


def last_step(run: Path) -> int:
    records = lines(run, "metrics.jsonl")
    return records[-1]["step"] if records else 0


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run, "events.jsonl") if event["event"] == kind]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def text(place: Path) -> Path:
    return write_text(place / "text")


@pytest.fixture(scope="module")
def undisturbed(place: Path, text: Path) -> tuple[Path, str]:
    """A run from text to model, phase one on one worker, phase two on two; and its output."""
    output = finish(command(place / "runs", text, "whole"), place / "whole.log")
    return place / "runs" / "whole", output


@pytest.mark.slow
def test_from_text_to_a_model_on_two_cluster_sizes(undisturbed: tuple[Path, str]) -> None:
    run, output = undisturbed
    records = lines(run, "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["world_size"] for record in records] == [1] * SWITCH + [2] * (STEPS - SWITCH)
    assert [record["bag_size"] for record in records] == [4] * SWITCH + [1] * (STEPS - SWITCH)
    assert records[-1]["loss"] < records[0]["loss"]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    (switch,) = events(run, "switch")
    assert switch["step"] == SWITCH
    assert len(events(run, "finish")) == 1
    for said in ("tokeniz", "training phase 1 on 1 worker", "training phase 2 on 2 workers",
                 "final validation loss", "tensorboard --logdir", str(run / "model"),
                 str(run / "ray.log")):  # fmt: skip
        assert said in output, said
    assert "Traceback" not in output
    assert "(raylet" not in output and "INFO worker.py" not in output


@pytest.mark.slow
def test_the_model_folder_is_plain_transformers(undisturbed: tuple[Path, str]) -> None:
    """In a process without any of this project."""
    run, _ = undisturbed
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(run / 'model')!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer('def parse(self):', return_tensors='pt').input_ids\n"
        "assert torch.isfinite(model(ids).logits).all()\n"
        "assert tokenizer.decode(ids[0]) == 'def parse(self):'\n"
        "assert not any(name.startswith(('tst_ray', 'pipelines')) for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_curves_are_continuous(undisturbed: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(undisturbed[0] / "tensorboard" / undisturbed[0].name))
    board.Reload()
    steps = [point.step for point in board.Scalars("loss/train")]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert {point.value for point in board.Scalars("run/world_size")} == {1.0, 2.0}
    parts = [board.Scalars(f"time/{part}_s")[-1].value for part in PARTS]
    assert 0 < board.Scalars("time/goodput")[-1].value < 1
    assert parts[PARTS.index("stepping")] > 0 and parts[PARTS.index("restart")] > 0
    assert "_hparams_/session_start_info" in board.summary_metadata


@pytest.mark.slow
def test_a_killed_driver_resumes_as_if_nothing_had_been(
    place: Path, text: Path, undisturbed: tuple[Path, str]
) -> None:
    """Killed in phase one, on one worker, and again in phase two, on two."""
    run, log = place / "runs" / "killed", place / "killed.log"
    arguments = command(place / "runs", text, run.name)
    for killed_at in (5, 18):
        driver = start(arguments, log)
        wait_until(
            lambda step=killed_at, driver=driver: (  # type: ignore[misc]
                last_step(run) >= step or driver.poll() is not None
            ),
            f"step {killed_at}",
        )
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert last_step(run) >= killed_at
    finish(arguments, log)

    whole = lines(undisturbed[0], "metrics.jsonl")
    resumed = lines(run, "metrics.jsonl")
    for name in ("step", "data_digest", "world_size", "loss", "grad_norm"):
        assert [r[name] for r in resumed] == [r[name] for r in whole], name
    assert resumed[-1]["val_loss"] == whole[-1]["val_loss"]


@pytest.mark.slow
def test_another_world_size_gives_the_same_losses(
    place: Path, text: Path, undisturbed: tuple[Path, str]
) -> None:
    """Phase one on two workers, phase two on one; 7 sequences divide by neither."""
    changed = command(place / "runs", text, "swapped", tst__workers=2, cluster__workers=1)
    finish(changed, place / "swapped.log")
    whole = lines(undisturbed[0], "metrics.jsonl")
    swapped = lines(place / "runs" / "swapped", "metrics.jsonl")
    assert [r["data_digest"] for r in swapped] == [r["data_digest"] for r in whole]
    for a, b in zip(swapped, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_phases_with_the_same_workers_share_a_group(
    place: Path, text: Path, undisturbed: tuple[Path, str]
) -> None:
    """The switch happens inside the group, and no checkpoint is needed for it."""
    same = command(place / "runs", text, "same", tst__workers=2, checkpoint__every=100)
    finish(same, place / "same.log")
    run = place / "runs" / "same"
    assert len(events(run, "attempt")) == 1
    assert [event["step"] for event in events(run, "phase_start")] == [0, SWITCH]
    assert [event["step"] for event in events(run, "checkpoint")] == [STEPS]
    whole = lines(undisturbed[0], "metrics.jsonl")
    for a, b in zip(lines(run, "metrics.jsonl"), whole, strict=True):
        assert a["data_digest"] == b["data_digest"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_what_a_restart_would_only_meet_again_stops_the_run(
    place: Path, text: Path, undisturbed: tuple[Path, str]
) -> None:
    """A model folder without weights, found by a worker: one line, no second attempt.

    Its path is relative, and the worker's folder the driver's.
    """
    folder = place / "no-weights"
    shutil.copytree(undisturbed[0] / "model", folder)
    (folder / "model.safetensors").unlink()
    source = os.path.relpath(folder, ROOT)
    changes = {"model__source": source, "model__pretrained": "true", "data__tokenizer": folder}
    arguments = command(place / "runs", text, "fatal", **changes)
    arguments = [argument for argument in arguments if not argument.startswith("--model.config")]
    log = place / "fatal.log"
    assert start(arguments, log).wait(timeout=PATIENCE_S) == 1
    said = log.read_text()
    last = said.splitlines()[-1]
    assert f"model.source = {source!r}: its weights do not load" in last
    assert str(place / "runs" / "fatal") in said
    assert "Traceback" not in said
    assert len(events(place / "runs" / "fatal", "attempt")) == 0


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(
    place: Path, text: Path, undisturbed: tuple[Path, str]
) -> None:
    run = undisturbed[0]
    before = (run / "metrics.jsonl").read_bytes()
    output = finish(command(place / "runs", text, "whole"), place / "again.log")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "training phase" not in output
    assert "final validation loss" in output


@pytest.fixture(scope="module")
def ray_head(place: Path) -> Iterator[tuple[str, str]]:
    """A Ray head with its dashboard, as `ray start --head` makes it: the addresses of both."""
    import socket
    import tempfile

    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: Ray puts sockets there
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", f"--port={ports[0]}",
         f"--dashboard-port={ports[1]}", "--num-cpus=4", "--block",
         "--disable-usage-stats", f"--temp-dir={folder}"],
        env=os.environ | OPEN | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=(place / "head.log").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    address = f"http://127.0.0.1:{ports[1]}"
    gcs = f"127.0.0.1:{ports[0]}"
    try:
        wait_until(lambda: _answers(address), f"the dashboard; see {place}/head.log")
        yield address, gcs
    finally:
        end_tree(head.pid)  # asked politely, it takes half a minute
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(address: str) -> bool:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        urlopen(f"{address}/api/version", timeout=5).close()
    except HTTPError:
        return True  # it wants a token, which `ray job submit` knows
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_ray_job_runs_it(place: Path, text: Path, ray_head: tuple[str, str]) -> None:
    """`ray job submit --working-dir . -- python -m tst_ray.run`, with a config and overrides."""
    config = place / "job.yaml"
    config.write_text("run: {name: job}\ntrain: {steps: 6}\ntst: {ratio: 0.5}\n")
    options = [
        f"--{key}={value}"
        for key, value in {
            **SETTINGS, "data.sources": text, "run.storage": place / "runs",
        }.items()
        if key not in ("train.steps", "tst.ratio")
    ]  # fmt: skip
    submit = [
        str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_head[0],
        "--working-dir", ".", "--", "python", "-m", "tst_ray.run", f"--config={config}", *options,
    ]  # fmt: skip
    output = finish(submit, place / "job.log", **OPEN)
    assert "succeeded" in output
    assert "final validation loss" in output
    run = place / "runs" / "job"
    assert [record["step"] for record in lines(run, "metrics.jsonl")] == list(range(1, 7))


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_are_refused_with_the_numbers(
    place: Path, text: Path, ray_head: tuple[str, str]
) -> None:
    log = place / "refused.log"
    process = start(
        command(place / "runs", text, "refused", cluster__workers=5),
        log,
        RAY_ADDRESS=ray_head[1],
        **OPEN,
    )
    assert process.wait(timeout=PATIENCE_S) == 1
    said = log.read_text()
    assert "needs 5 x 1 CPU for the workers and 1 for Ray Data, 6 in all; the cluster has 4" in said
    assert "Traceback" not in said
