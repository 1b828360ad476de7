"""The fork server: what a forked process is, and when nothing is forked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tst_ray import forkserver

CLIENT = [sys.executable, "-S", "-E", forkserver.__file__]
PATIENCE_S = 120.0
# A worker process that tells what it is, in the file that it is told.
WORKER = """
import json, os, random, sys
facts = {
    "parent": os.getppid(), "group": os.getpgrp() == os.getpid(), "folder": os.getcwd(),
    "arguments": sys.argv, "variable": os.environ.get("MINE"), "name": __name__,
    "torch": "torch" in sys.modules, "random": random.random(),
}
if "ray" in sys.modules:
    from ray import ObjectID
    facts["id"] = ObjectID.from_random().hex()
print("heard", flush=True)
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(facts, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""


@pytest.fixture(scope="module")
def address() -> Iterator[dict[str, str]]:
    with forkserver.server_ahead("llama") as variables:
        yield variables


def start(folder: Path, variables: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Have a worker process started; what it told, and what was printed."""
    script, told = folder / "worker.py", folder / "told.json"
    script.write_text(WORKER)
    told.unlink(missing_ok=True)
    done = subprocess.run(
        [*CLIENT, str(script), str(told)],
        env=os.environ | variables | {"MINE": folder.name},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not told.exists():
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.02)
    return json.loads(told.read_text()), done.stdout + done.stderr


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    return tmp_path / "one", tmp_path / "other"


def test_a_forked_process_is_what_its_client_was_to_be(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    told, _ = zip(*(start(folder, address) for folder in folders), strict=True)
    for folder, facts in zip(folders, told, strict=True):
        assert facts["arguments"] == [str(folder / "worker.py"), str(folder / "told.json")]
        assert (facts["folder"], facts["variable"]) == (str(folder), folder.name)
        assert facts["group"], "a raylet ends a process with its group: it must have its own"
        assert facts["torch"] and facts["name"] == "__main__"
    one, other = told
    assert one["parent"] == other["parent"], "the server"
    assert one["random"] != other["random"]
    assert one["id"] != other["id"], "two objects of one id would be one object"


def test_what_it_prints_goes_where_the_clients_goes(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    assert "heard" in start(folders[0], address)[1]


def test_without_a_server_the_client_is_the_process(folders: tuple[Path, Path]) -> None:
    facts, printed = start(folders[0], {"TST_RAY_FORK_SERVER": "/nowhere/at/all"})
    assert "not forked" in printed and "heard" in printed
    assert facts["arguments"][0] == str(folders[0] / "worker.py") and not facts["torch"]
    assert facts["parent"] == os.getpid()


def run_server(code: str) -> str:
    """Run code in a process like a server's; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_server_whose_children_would_be_alike_does_not_serve() -> None:
    asks = "from tst_ray import forkserver as f; {}; print(f._why_not_fork(0))"
    assert run_server(asks.format("f._import_ray()")) == "None"
    alike = run_server(asks.format("import ray; ray.ObjectID.from_random()"))
    assert "same random numbers" in alike


def test_a_server_with_threads_does_not_serve() -> None:
    code = (
        "import threading; from tst_ray import forkserver as f; stop = threading.Event(); "
        "threading.Thread(target=stop.wait, name='busy').start(); "
        "print(f._why_not_fork(1)); stop.set()"
    )
    assert "busy" in run_server(code)


def test_a_server_ends_with_its_parent_and_when_nobody_needs_it(tmp_path: Path) -> None:
    code = (
        "import sys; from tst_ray import forkserver as f; f._AT_ONCE = (); f._IDLE_S = {}; "
        "f.serve(f._listen(sys.argv[1]), int(sys.argv[2]))"
    )
    for idle_s, parent in ((0.1, "sys.stdin.read()"), (1e9, "")):
        server = [sys.executable, "-c", code.format(idle_s), str(tmp_path / "socket")]
        starts = (
            f"import os, subprocess, sys; p = subprocess.Popen({server!r} + [str(os.getpid())], "
            f"stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL); print(p.pid, flush=True); "
            f"{parent}"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", starts], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdin is not None
        pid = int(process.stdout.readline())
        deadline = time.monotonic() + PATIENCE_S
        while lives(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.stdin.close()
        process.stdout.close()
        process.wait()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_environment_of_a_run() -> None:
    plain = forkserver.job_environment(None, {"A": "1"}, "llama")
    assert plain["py_executable"].startswith(sys.executable)
    assert plain["env_vars"] == {"A": "1", "TST_RAY_MODEL_TYPE": "llama"}


def test_a_submitted_job_keeps_what_it_says_itself() -> None:
    submitted = json.dumps({"runtime_env": {"env_vars": {"A": "2"}, "working_dir": "gcs://x"}})
    assert forkserver.job_environment(submitted, {"A": "1", "B": "1"}, "llama")["env_vars"] == {
        "B": "1",
        "TST_RAY_MODEL_TYPE": "llama",
    }
    submitted = json.dumps({"runtime_env": {"pip": ["x"]}})
    assert "py_executable" not in forkserver.job_environment(submitted, {}, "llama")
