"""The fork server: what a forked process is, and when nothing is forked."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.processes import signal_ray_worker
from tst_ray import forkclient, forkserver

CLIENT = [sys.executable, "-S", "-E", forkclient.__file__]
ROOT = Path(__file__).parent.parent
PATIENCE_S = 120.0
# A worker process that tells what it is, in the file that it is told.
WORKER = """
import json, os, random, sys
def parent_of(pid):
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
facts = {
    "parent": os.getppid(), "grandparent": parent_of(os.getppid()),
    "group": os.getpgrp() == os.getpid(), "folder": os.getcwd(),
    "arguments": sys.argv, "variable": os.environ.get("MINE"), "name": __name__,
    "torch": "torch" in sys.modules, "random": random.random(),
}
if "ray" in sys.modules:
    from ray import ObjectID
    facts["id"] = ObjectID.from_random().hex()
    facts["job"] = os.environ.get("RAY_JOB_ID")
print("heard", flush=True)
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(facts, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with forkserver.server_ahead("llama"):
        stays = start_what_stays(tmp_path_factory.mktemp("stays"), {})
        yield {forkclient.ADDRESS: os.environ[forkclient.ADDRESS]}
        assert lives(stays)
    wait_for(lambda: not lives(stays))
    assert forkclient.ADDRESS not in os.environ


def start_what_stays(folder: Path, variables: dict[str, str]) -> int:
    """Have a process started that hangs, as one of Ray's may; its id."""
    script, told = folder / "worker.py", folder / "pid"
    script.write_text(
        f"import os, time; open({str(told)!r}, 'w').write(f'{{os.getpid()}}.'); time.sleep(1e6)"
    )
    nowhere = subprocess.DEVNULL
    subprocess.run(
        [*CLIENT, str(script)],
        env=os.environ | variables,
        stdin=nowhere,
        stdout=nowhere,
        stderr=nowhere,
        timeout=PATIENCE_S,
    )
    wait_for(lambda: told.exists() and told.read_text().endswith("."))
    return int(told.read_text()[:-1])


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
    wait_for(told.exists)
    return json.loads(told.read_text()), done.stdout + done.stderr


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
    assert one["parent"] == other["parent"], "the job's server"
    assert one["random"] != other["random"]
    assert one["id"] != other["id"], "two objects of one id would be one object"


def test_the_jobs_of_a_node_share_what_knows_nothing_of_ray(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    """Ray reads its job's id from the environment as it is imported."""
    one, other = (
        start(folder, address | {"RAY_JOB_ID": job})[0]
        for folder, job in zip(folders, ("01000000", "02000000"), strict=True)
    )
    assert (one["job"], other["job"]) == ("01000000", "02000000")
    assert one["parent"] != other["parent"], "each job's server"
    assert one["grandparent"] == other["grandparent"], "the node's"
    assert one["id"] != other["id"]


def test_the_jobs_of_a_node_find_one_server_and_other_environments_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["default_worker.py", "--raylet-name=/tmp/raylet"]
    monkeypatch.delenv(forkclient.ADDRESS, raising=False)
    found = set()
    for job in ("01000000", "02000000"):
        monkeypatch.setenv("RAY_JOB_ID", job)
        found.add(forkclient._address(asked))
    assert len(found) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert forkclient._address(asked) not in found


def test_a_worker_is_known_for_one_of_the_raylet_that_its_driver_started(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    """Faults are for the workers of one cluster; a driver starts the servers and the raylet."""
    worker = start_what_stays(folders[0], address)
    stays = [sys.executable, "-c", "import time; time.sleep(1e6)"]
    starts = f"import subprocess, sys; p = subprocess.Popen({stays!r}); print(p.pid, flush=True); "
    with (
        subprocess.Popen(stays) as raylet,
        subprocess.Popen(
            [sys.executable, "-c", starts + "p.wait()"], stdout=subprocess.PIPE
        ) as other_driver,
    ):
        assert other_driver.stdout is not None
        other_raylet = int(other_driver.stdout.readline())
        try:
            signal_ray_worker(worker, 0, raylet.pid)
            with pytest.raises(ProcessLookupError):
                signal_ray_worker(worker, 0, other_raylet)
        finally:
            for pid in (raylet.pid, other_raylet):
                os.kill(pid, signal.SIGKILL)


def test_what_it_prints_goes_where_the_clients_goes(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    assert "heard" in start(folders[0], address)[1]


def test_python_without_a_users_packages_forks_too(
    address: dict[str, str], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray passes -s on; where the environment says it too, the server has it."""
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    for context in ([], [PLAIN]):
        facts, printed = start_as_a_raylet(folders[0], *context, flags=["-s"])
        assert "Python with -s" in printed and facts["parent"] == os.getpid()
        script = "setup_worker.py" if context else "default_worker.py"
        assert facts["arguments"][0] == str(folders[0] / script)
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    for context in ([], [PLAIN]):
        facts, printed = start_as_a_raylet(folders[0], *context, flags=["-s"])
        assert facts["parent"] != os.getpid(), printed
        assert facts["arguments"][0] == str(folders[0] / "default_worker.py")


def test_what_moves_objects_for_all_jobs_is_no_fork(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    facts, printed = start_as_a_raylet(folders[0], more=["--worker-type=SPILL_WORKER"])
    assert printed == "heard\n" and facts["parent"] == os.getpid()
    told = [str(folders[0] / name) for name in ("default_worker.py", "told.json")]
    assert facts["arguments"] == [*told, "--worker-type=SPILL_WORKER"]


PLAIN = {
    "command_prefix": [],
    "env_vars": {"MINE": "of the environment"},
    "py_executable": sys.executable,
    "override_worker_entrypoint": None,
    "java_jars": [],
}


def test_an_environment_of_variables_needs_no_set_up_of_rays(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    facts, printed = start_as_a_raylet(folders[0], PLAIN)
    assert facts["parent"] != os.getpid(), printed
    assert facts["variable"] == "of the environment"
    assert facts["arguments"] == [
        str(folders[0] / "default_worker.py"),
        str(folders[0] / "told.json"),
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"command_prefix": ["cd", "/somewhere", "&&"]},
        {"py_executable": "another python"},
        {"env_vars": {"MINE": "$HOME/here"}},
        {"env_vars": {"PYTHONPATH": "/somewhere"}},
        {"what_a_later_ray_adds": "yes"},
    ],
)
def test_one_of_more_is_left_to_ray(
    address: dict[str, str], folders: tuple[Path, Path], more: dict[str, Any]
) -> None:
    facts, printed = start_as_a_raylet(folders[0], PLAIN | more)
    assert "not forked" in printed
    assert facts["parent"] == os.getpid() and facts["arguments"][0].endswith("setup_worker.py")
    assert facts["variable"] == folders[0].name, "Ray sets the variables itself"


def start_as_a_raylet(
    folder: Path,
    *contexts: dict[str, Any],
    flags: Sequence[str] = (),
    more: Sequence[str] = (),
) -> tuple[dict[str, Any], str]:
    """Have a worker process started by a raylet that runs the client in place of Ray's set-up.

    Args:
        contexts: the process's environment; none where it needs none.
        flags: Python's, which a raylet's command has between the two scripts.
        more: arguments.

    Returns:
        what it told, and what was printed.
    """
    told = folder / "told.json"
    for name in ("setup_worker.py", "default_worker.py"):
        (folder / name).write_text(WORKER.replace("sys.argv[1]", repr(str(told))))
    command = [sys.executable, forkclient.__file__, *flags, str(folder / "default_worker.py")]
    command += [str(told), *more, "--language=PYTHON"]
    for context in contexts:
        command.append(f"--serialized-runtime-env-context={json.dumps(context)}")
    done = subprocess.run(
        command,
        env=os.environ | {"MINE": folder.name},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    wait_for(told.exists)
    return json.loads(told.read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_a_local_ray_forks_its_workers_and_has_no_autoscaler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an environment of their own, as Ray Train gives its own, and without."""
    import ray

    from tst_ray.config import load_config
    from tst_ray.session import ray_session

    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def facts() -> tuple[bool, bool, str | None]:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        is_ready = "transformers" in sys.modules  # else it was forked to become another
        return b"tst_ray.forkserver" in parent, is_ready, os.environ.get("MINE")

    def commands() -> str:
        found = (entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline"))
        return b"\n".join(found).decode(errors="replace")

    with ray_session(load_config(None, []), None):
        node = Path(ray._private.worker._global_node.get_session_dir_path()).name
        assert node in commands()
        assert not re.search(rf"/monitor.py\0.*{node}", commands())
        task = ray.remote(num_cpus=0)(facts)
        with_variables = task.options(runtime_env={"env_vars": {"MINE": "yes"}})
        told = ray.get([task.remote(), with_variables.remote()], timeout=PATIENCE_S)
    assert told == [(True, True, None), (True, True, "yes")]


def test_without_a_server_the_client_is_the_process(folders: tuple[Path, Path]) -> None:
    facts, printed = start(folders[0], {"TST_RAY_FORK_SERVER": "/nowhere/at/all"})
    assert "not forked" in printed and "heard" in printed
    assert facts["arguments"][0] == str(folders[0] / "worker.py") and not facts["torch"]
    assert facts["parent"] == os.getpid()


def test_a_node_without_this_package_starts_its_own_python(tmp_path: Path) -> None:
    """The one of the environment that its Ray is from; else its `python`, as `PATH` has it."""
    command = forkserver.job_environment(None, {}, "llama")["py_executable"]
    elsewhere = command.replace(forkclient.__file__, "/not/on/this/node.py")
    assert elsewhere != command
    for place in ("path", "venv/bin"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "python").write_text(f'#!/bin/sh\necho {place} with "$@"\n')
        (tmp_path / place / "python").chmod(0o755)

    def started(worker: str) -> str:
        return subprocess.run(
            ["bash", "-c", f"exec {elsewhere} {worker} 'an argument'"],
            env={"PATH": f"{tmp_path}/path:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        ).stdout

    assert started("worker.py") == "path with worker.py an argument\n"
    worker = f"{tmp_path}/venv/lib/python3.11/site-packages/ray/_private/workers/worker.py"
    assert started(worker) == f"venv/bin with {worker} an argument\n"


def test_a_path_too_long_for_a_socket_leaves_files_as_they_were(tmp_path: Path) -> None:
    """The process goes on without a server, and others read what it writes."""
    with pytest.raises(OSError, match="too long"):
        forkclient.listen(str(tmp_path / ("x" * 120)))
    (tmp_path / "file").write_text("")
    before = os.umask(0)
    os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~before
    assert before != 0o077


def test_it_is_given_what_a_raylet_gave_its_client(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import json, resource, signal, sys, os\n"
        "facts = [open('/proc/self/oom_score_adj').read().strip(), \n"
        "    resource.getrlimit(resource.RLIMIT_NOFILE)[0], \n"
        "    signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())]\n"
        "open(sys.argv[1] + '.part', 'w').write(json.dumps(facts))\n"
        "os.rename(sys.argv[1] + '.part', sys.argv[1])\n"
    )

    def as_a_raylet_does() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit[0] - 7, limit[1]))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    told = folders[0] / "told.json"
    (folders[0] / "worker.py").write_text(script)
    subprocess.run(
        [*CLIENT, str(folders[0] / "worker.py"), str(told)],
        env=os.environ | address,
        preexec_fn=as_a_raylet_does,
        timeout=PATIENCE_S,
        check=True,
    )
    wait_for(told.exists)
    assert json.loads(told.read_text()) == ["1000", limit[0] - 7, True]


def test_a_client_that_is_killed_costs_nothing_but_itself(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    """Whether it had asked or not; the same server serves the next."""
    before = start(folders[0], address)[0]["parent"]
    for asks in (b"", b"\x00" * 8, len(b"{}").to_bytes(8, "big") + b"{}"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address["TST_RAY_FORK_SERVER"])
            if asks:
                socket.send_fds(client, [asks], [0, 1, 2])
    assert start(folders[1], address)[0]["parent"] == before


def test_a_server_that_does_not_answer_is_done_without(
    address: dict[str, str], folders: tuple[Path, Path]
) -> None:
    server = start(folders[0], address)[0]["parent"]
    os.kill(server, signal.SIGSTOP)
    try:
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tst_ray import forkclient as f; "
            "f._ANSWER_S = 0.2; f.start(sys.argv[1:])"
        )
        told = folders[1] / "told.json"
        (folders[1] / "worker.py").write_text(WORKER)
        with (folders[1] / "printed").open("w") as printed:  # a pipe would wait for the server
            subprocess.run(
                [sys.executable, "-c", code, str(folders[1] / "worker.py"), str(told)],
                env=os.environ | address, stdout=printed, stderr=printed, timeout=PATIENCE_S,
            )  # fmt: skip
    finally:
        os.kill(server, signal.SIGCONT)
    assert "not forked" in (folders[1] / "printed").read_text()
    assert json.loads(told.read_text())["parent"] == os.getpid()
    told.unlink()
    assert start(folders[0], address)[0]["parent"] == server
    assert not told.exists(), "what was asked for in vain is not done later"


def run_server(code: str) -> str:
    """Run code in a process like a server's; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_server_whose_children_would_be_alike_does_not_serve() -> None:
    asks = "from tst_ray import forkserver as f; {}; print(f._why_alike(), f._why_not_fork())"
    assert run_server(asks.format("f._import_for_a_job()")) == "None None"
    alike = run_server(asks.format("import ray; ray.ObjectID.from_random()"))
    assert "same random numbers" in alike


def test_no_import_of_a_server_opens_a_gpu() -> None:
    """As far as torch lets it be told: a forked process could not use what its parent opened."""
    code = (
        "import os; from tst_ray import forkserver as f; {}; "
        "print(os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'])"
    )
    for imports in ("f._FOR_THE_NODE = (); f._import_for_the_node()", "f._import_for_a_job()"):
        assert run_server(code.format(imports)) == "1"


def test_a_thread_that_is_ending_is_no_reason_not_to_serve() -> None:
    """OpenBLAS ends its threads at a fork, and the kernel lists them for a moment longer."""
    code = (
        "import threading, time; from tst_ray import forkserver as f; "
        "threading.Thread(target=time.sleep, args=(0.2,)).start(); print(f._why_not_fork())"
    )
    assert run_server(code) == "None"


def test_a_server_with_threads_does_not_serve() -> None:
    code = (
        "import threading; from tst_ray import forkserver as f; stop = threading.Event(); "
        "threading.Thread(target=stop.wait).start(); print(f._why_not_fork()); stop.set()"
    )
    assert "it has threads" in run_server(code)


def test_a_server_ends_with_its_parent_and_when_nobody_needs_it(tmp_path: Path) -> None:
    code = (
        "import sys; from tst_ray import forkserver as f; "
        "f.serve(f.forkclient.listen(sys.argv[1]).detach(), int(sys.argv[2]), {}, lambda: None)"
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
        wait_for(lambda pid=pid: not lives(pid))  # type: ignore[misc]
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
    assert sys.executable in plain["py_executable"]
    assert plain["env_vars"] == {"A": "1", "TST_RAY_MODEL_TYPE": "llama"}


def test_a_submitted_job_keeps_what_it_says_itself() -> None:
    submitted = json.dumps({"runtime_env": {"env_vars": {"A": "2"}, "working_dir": "gcs://x"}})
    assert forkserver.job_environment(submitted, {"A": "1", "B": "1"}, "llama")["env_vars"] == {
        "B": "1",
        "TST_RAY_MODEL_TYPE": "llama",
    }
    submitted = json.dumps({"runtime_env": {"pip": ["x"]}})
    assert "py_executable" not in forkserver.job_environment(submitted, {}, "llama")


def test_a_server_that_must_not_be_forked_says_so_to_every_client(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    """At once, and without another round of imports for each."""
    address = str(tmp_path / "socket")
    code = (
        "import sys; from tst_ray import forkserver as f; "
        "f.serve(f.forkclient.listen(sys.argv[1]).detach(), int(sys.argv[2]), 60, lambda: 'no')"
    )
    with (tmp_path / "printed").open("w") as printed:
        command = [sys.executable, "-c", code, address, str(os.getpid())]
        server = subprocess.Popen(command, stdout=printed, stderr=printed)
    try:
        wait_for(Path(address).exists)
        for folder in folders:
            facts, said = start(folder, {"TST_RAY_FORK_SERVER": address})
            assert "not forked" in said and facts["parent"] == os.getpid()
        assert server.poll() is None
        assert (tmp_path / "printed").read_text().count("fork server: no") == 1
    finally:
        server.kill()
        server.wait()
