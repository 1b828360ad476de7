"""A fork server on each node: Ray's processes start with their imports done.

    raylet ── starts ──> client (forkclient.py)                                milliseconds
                           │ arguments, environment, working folder, standard streams
                           ▼
                         node's server: imported torch, transformers …, once
                           └── fork ──> job's server: imported Ray Train, Ray Data …, once a job
                                          └── fork ──> the worker                    milliseconds

A process of Ray spends its first seconds on imports, and with a worker group come ten of them: what
controls it, hands out data, reads and trains. Ray starts whatever the `py_executable` of the
runtime environment names; here that is the client. The first one on a node becomes its server, one
for each environment, since modules may take settings from it as they are imported. Each job has a
server of its own, since Ray takes its job from the environment as it is imported; what takes
longest is there when the next run begins. A server ends with its parent, or ten minutes (a job's:
one) after its last child. Python's own `multiprocessing.forkserver` is the same idea, for Python's
children.

The driver of a local Ray starts the server itself, ahead of Ray, and has that run the client in
place of its own setup_worker.py (session.py), which imports Ray before each process that has a
runtime environment: 0.5 s, and a worker group waits for four of them, one after the other.

Where anything goes wrong, or takes too long, the client becomes an ordinary worker process, so
nothing depends on this. A server that cannot be forked safely (it has other threads, it has opened
a GPU, which no child could use, or its children would draw the same random numbers) does not serve.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tst_ray import forkclient

_MODEL_TYPE = "TST_RAY_MODEL_TYPE"
_FOR_THE_NODE = (
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers",
)
_FOR_A_JOB = (
    "ray.train.torch",
    "ray.data",
    "pipelines.tokenize",
    "tst_ray.worker",
    "tst_ray.group",
    "tst_ray.memory",
    "tst_ray.export",
)
_OWN_INTERPRETER = ("pip", "uv", "conda", "container", "image_uri", "py_executable")
_LOOK_S = 1.0
_HARMLESS_THREADS = {"jemalloc_bg_thd"}  # Arrow's; it has its own handlers of forks
_NODE_IDLE_S, _JOB_IDLE_S = 600.0, 60.0


# -- the driver's side -----------------------------------------------------------------------------


def job_environment(
    submitted: str | None, variables: dict[str, str], model_type: str
) -> dict[str, Any]:
    """What to give `ray.init` as the runtime environment of all of a run's processes.

    Args:
        submitted: the job's configuration, JSON, where this is a submitted job: its environment is
            merged with this one, and must not name the same things.
        variables: environment variables for all processes.
        model_type: transformers' name of the kind of model that is trained.

    Returns:
        the environment; the variables alone where the job brings an interpreter, which is then made
        on each node.
    """
    import shlex

    job = (json.loads(submitted or "{}").get("runtime_env")) or {}
    variables = {**variables, _MODEL_TYPE: model_type}
    own = job.get("env_vars", {})
    environment: dict[str, Any] = {
        "env_vars": {name: value for name, value in variables.items() if name not in own}
    }
    if not any(name in job for name in _OWN_INTERPRETER):
        # Without site-packages, which the client does not need: they cost more than all it does.
        here = [
            shlex.quote(path) for path in (sys.executable, os.path.abspath(forkclient.__file__))
        ]
        script = (
            '[ -x {0} ] && [ -f {1} ] && exec {0} -S -E {1} "$@"; '
            # Another node's: the one that has the Ray whose script this is, or what Ray would take.
            'own="${{1%/lib/python*}}/bin/python"; [ -x "$own" ] && exec "$own" "$@"; '
            'exec python "$@"'
        ).format(*here)
        environment["py_executable"] = f"sh -c {shlex.quote(script)} sh"
    return environment


@contextlib.contextmanager
def server_ahead(model_type: str) -> Iterator[None]:
    """A server for a Ray on this machine, that imports while Ray starts; ends with the block.

    Clients find it by the environment, which that Ray has from this process.
    """
    import subprocess
    import tempfile

    with (
        tempfile.TemporaryDirectory(prefix="tst-ray-", ignore_cleanup_errors=True) as folder,
        _variable(_MODEL_TYPE, model_type),
    ):
        address = os.path.join(folder, "fork-server")
        try:
            with forkclient.listen(address) as listener:
                server = subprocess.Popen(
                    forkclient.server_command(listener, parent=os.getpid()),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,  # Ctrl-C is for the driver
                )
        except OSError as error:  # a path too long for a socket, say: the first client will do
            print(f"no fork server ahead: {error}", file=sys.stderr)
            yield
            return
        try:
            with _variable(forkclient.ADDRESS, address):
                yield
        finally:
            _end_descendants(server.pid)
            server.kill()
            server.wait()


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, while the block runs."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _end_descendants(ancestor: int) -> None:
    """SIGKILL for what a server forked; Ray has ended, and what is still there hangs in its exit.

    One process of Ray 2.60 in a thousand or so stays for ever as it is taken apart: it waits for a
    lock that it holds (`~Publisher` posts to an event loop that is being shut down).
    """
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{int(entry)}/stat") as stat:
                _, its_parent, *_ = stat.read().rpartition(")")[2].split()
            if int(its_parent) == ancestor:
                _end_descendants(int(entry))
                os.kill(int(entry), signal.SIGKILL)


# -- the server -----------------------------------------------------------------------------------


def main() -> None:
    """What `forkclient.server_command` runs: serve; then, in each child, be what it is to be."""
    import runpy
    import warnings

    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    _import_for_the_node()
    _, (job,) = serve(int(sys.argv[1]), int(sys.argv[2]), _NODE_IDLE_S, _why_not_fork)
    _import_for_a_job()
    sys.argv, _ = serve(job, os.getppid(), _JOB_IDLE_S, lambda: _why_not_fork() or _why_alike())
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve(
    listener_fd: int, parent: int, idle_s: float, why_not: Callable[[], str | None]
) -> tuple[list[str], list[int]]:
    """Fork a child for each client until the parent is gone, or none has come for a while.

    Args:
        listener_fd: the socket that clients connect to, as `forkclient.listen` makes it.
        parent: the process id of the parent.
        idle_s: how long it serves without a child, in case another is wanted.
        why_not: what makes children of this process unsafe, if anything does; asked once.

    Returns:
        in each child, and nowhere else: what it is to run, and no descriptor; or nothing, and that
        of the socket where it is to serve a job.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    problem = why_not()
    _tell(problem)
    needed = time.monotonic()
    with socket.socket(fileno=listener_fd) as listener:
        listener.settimeout(_LOOK_S)
        while os.getppid() == parent and time.monotonic() - needed < idle_s:
            if _has_children():
                needed = time.monotonic()
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # no descriptor is free, say
                _tell(error)
                time.sleep(_LOOK_S)
                continue
            descriptors: list[int] = []
            with connection:
                try:
                    request = _receive(connection, descriptors)
                    if problem is None and os.fork() == 0:
                        listener.close()
                        return _become(request, descriptors, connection)
                    needed = time.monotonic()
                except (OSError, ValueError) as error:  # the client was killed, memory is short
                    _tell(error)
                for descriptor in descriptors:
                    os.close(descriptor)
        os.unlink(listener.getsockname())
    sys.exit()


def _tell(problem: object) -> None:
    if problem:
        print(f"fork server: {problem}", file=sys.stderr, flush=True)


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _import_for_the_node() -> None:
    """Import what knows nothing of Ray."""
    kind = os.environ.get(_MODEL_TYPE)
    _import([*_FOR_THE_NODE, *([f"transformers.models.{kind}.modeling_{kind}"] if kind else [])])


def _import_for_a_job() -> None:
    """Import Ray and what is built on it, without a random number of Ray's own.

    Ray's generator is seeded once a process, at first use: from then on all children would draw the
    same numbers, and two would give two objects one id. An actor class draws one as it is defined.
    """
    from unittest import mock

    import ray.actor
    from ray import ActorClassID

    class FromTheSystem:
        @staticmethod
        def from_random() -> Any:
            return ActorClassID(os.urandom(ActorClassID.size()))

    with mock.patch.object(ray.actor, "ActorClassID", FromTheSystem):
        _import(_FOR_A_JOB)


def _import(names: Iterable[str]) -> None:
    """Import what any process may need; what cannot be imported now will say so when it is used."""
    import gc
    import importlib

    # Looking for GPUs must not open them: a child could then not use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    gc.disable()  # looking again and again at what is here to stay is a fifth of the imports' time
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name} is not imported ahead: {error}", file=sys.stderr, flush=True)
    gc.enable()
    gc.collect()
    gc.freeze()  # nor need it be looked at, or its memory copied, in each child


def _why_not_fork() -> str | None:
    """What makes children of this process unsafe, if anything does.

    It forks; OpenBLAS ends its threads then, which are listed for a moment longer.
    """
    if os.fork() == 0:
        os._exit(0)
    deadline = time.monotonic() + _LOOK_S
    while len(threads := _threads()) > 1:
        if time.monotonic() > deadline:
            return f"not forked, since it has threads: {', '.join(threads)}"
        time.sleep(0.001)
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            if (path := os.readlink(f"/proc/self/fd/{entry}")).startswith("/dev/nvidia"):
                return f"not forked, since {path} is open"
    return None


def _threads() -> list[str]:
    """The names of this process's threads, but for those that are no matter in a fork."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
            names.append(comm.read().strip())
    return [name for name in names if name not in _HARMLESS_THREADS]


def _why_alike() -> str | None:
    """Whether children would draw the same ids from Ray's generator."""
    if len(ids := _ids_of_a_child() + _ids_of_a_child()) == len(set(ids)) > 0:
        return None
    return "not forked, since two children would draw the same random numbers"


def _ids_of_a_child() -> list[bytes]:
    """Two ids that a child draws: in its main thread, and in another."""
    import threading

    from ray import ObjectID

    out, into = os.pipe()
    if os.fork() == 0:
        try:
            draw = lambda: os.write(into, ObjectID.from_random().binary())  # noqa: E731
            draw()
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as drawn:
        content = drawn.read()
    half = len(content) // 2
    return [content[:half], content[half:]]


def _receive(connection: socket.socket, descriptors: list[int]) -> dict[str, Any]:
    """A client's request; what came with it is added to `descriptors`, whatever happens.

    Those are its standard streams or, where it asks for a job's server, that one's socket.
    """
    connection.settimeout(_LOOK_S)
    head, received, _, _ = socket.recv_fds(connection, forkclient.LENGTH, 3)
    descriptors += received
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        piece = connection.recv(left - len(body))
        if not piece:
            raise ConnectionError("a client went away")
        body += piece
    request: dict[str, Any] = json.loads(body)
    return request


def _become(
    request: dict[str, Any], descriptors: list[int], connection: socket.socket
) -> tuple[list[str], list[int]]:
    """Take on what makes a process the one that a client was to be, tell the client, and go on.

    A child whose client has gone, and has become that process itself, ends. A job's server serves
    other clients too, and goes on.
    """
    import random
    import resource

    import numpy as np

    arguments: list[str] = request["arguments"]
    streams, sockets = (descriptors, []) if arguments else ([], descriptors)
    try:
        os.setpgid(0, 0)  # a raylet ends a worker with its whole process group
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        with contextlib.suppress(OSError, ValueError):  # only root may lower or raise some
            resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write(request["oom_score"])
        random.seed()
        np.random.seed()
        if arguments:
            connection.send(b"1")
    except BaseException as error:
        _tell(error)
        os._exit(1)
    return arguments, sockets
