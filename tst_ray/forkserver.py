"""A fork server on each node: Ray's processes start with their imports done.

    raylet ── starts ──> client: python forkserver.py <Ray's worker script> …        milliseconds
                           │ arguments, environment, working folder, standard streams
                           ▼
                         server: imported torch, transformers, Ray Data …, once
                           └── fork ──> the worker                                   milliseconds

A process of Ray spends its first seconds on imports, and with a worker group come ten of them: what
controls it, hands out data, reads and trains. Ray starts whatever the `py_executable` of the
runtime environment names; here that is the client. The first one on a node becomes the server. The
driver of a local Ray starts it itself, ahead of Ray. It ends with its parent, or a minute after its
last child. Python's own `multiprocessing.forkserver` is the same idea, for Python's children.

Where anything goes wrong the client becomes an ordinary worker process, so nothing depends on this.
A server that cannot be forked safely (it has other threads of Python, or has opened a GPU, which no
child could use) does not serve. Modules may take settings from the environment as they are
imported, so there is one server for each environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

_MODEL_TYPE = "TST_RAY_MODEL_TYPE"
# What knows nothing of Ray is imported at once; the rest with the environment of the first client,
# since Ray takes its raylet and its job from the environment as it is imported.
_AT_ONCE = (
    "numpy",
    "pandas",
    "pyarrow.parquet",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers",
)
_WITH_RAY = (
    "ray.train.torch",
    "ray.data",
    "pipelines.tokenize",
    "tst_ray.worker",
    "tst_ray.group",
    "tst_ray.memory",
    "tst_ray.export",
)
_OWN_INTERPRETER = ("pip", "uv", "conda", "container", "image_uri", "py_executable")
_ADDRESS = "TST_RAY_FORK_SERVER"
_SERVE = "--serve"
_LENGTH = 8
_BACKLOG = 128
_LOOK_S = 1.0
_IDLE_S = 60.0


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
        client = f"{shlex.quote(sys.executable)} -S -E {shlex.quote(os.path.abspath(__file__))}"
        environment["py_executable"] = client
    return environment


@contextlib.contextmanager
def server_ahead(model_type: str) -> Iterator[dict[str, str]]:
    """A server for a Ray on this machine, that imports while Ray starts; ends with the block.

    Yields:
        the environment variable that lets clients find it.
    """
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tst-ray-") as folder:
        address = os.path.join(folder, "fork-server")
        with _listen(address) as listener:
            server = subprocess.Popen(
                _server(listener, parent=os.getpid()),
                stdin=subprocess.DEVNULL,
                env={**os.environ, _MODEL_TYPE: model_type},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the driver
            )
        try:
            yield {_ADDRESS: address}
        finally:
            server.kill()
            server.wait()


# -- the client: only the standard library, and little of it ---------------------------------------


def start(arguments: list[str]) -> None:
    """Have the server fork a process that runs `arguments`; where that fails, become it."""
    try:
        _ask(arguments)
    except Exception as error:
        print(f"not forked: {error!r}", file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, *arguments])


def _ask(arguments: list[str]) -> None:
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    body = json.dumps(request).encode()
    with _connection(_address(arguments)) as server:
        socket.send_fds(server, [len(body).to_bytes(_LENGTH, "big")], [0, 1, 2])
        server.sendall(body)
        if not server.recv(1):
            raise ConnectionError("the server does not serve")


def _address(arguments: list[str]) -> str:
    """The server's socket: where the driver says, or beside the raylet's, one an environment."""
    if _ADDRESS in os.environ:
        return os.environ[_ADDRESS]
    import hashlib

    raylet = next(a.partition("=")[2] for a in arguments if a.startswith("--raylet-name="))
    environment = json.dumps([sys.executable, sorted(os.environ.items())])
    return f"{raylet}.{hashlib.sha256(environment.encode()).hexdigest()[:8]}"


def _connection(address: str) -> socket.socket:
    """A connection to the server, which is started if there is none."""
    import fcntl

    with open(f"{address}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several first clients, one starts the server
        try:
            return _connect(address)
        except OSError:
            _start_server(address)
            return _connect(address)


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def _start_server(address: str) -> None:
    """Start a server; returns in a child of it, that can connect while the server still imports.

    The process that the raylet started becomes the server, so that all workers descend from it.
    """
    listener = _listen(address)
    if os.fork() > 0:
        listener.set_inheritable(True)
        os.execv(sys.executable, _server(listener, parent=os.getppid()))
    listener.close()


def _listen(address: str) -> socket.socket:
    if os.path.exists(address):
        os.unlink(address)  # that of a server which was killed
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o077)  # for this user alone
    listener.bind(address)
    os.umask(before)
    listener.listen(_BACKLOG)
    return listener


def _server(listener: socket.socket, parent: int) -> list[str]:
    file = os.path.abspath(__file__)
    return [sys.executable, file, _SERVE, str(listener.fileno()), str(parent)]


# -- the server -----------------------------------------------------------------------------------


def serve(listener: socket.socket, parent: int) -> list[str]:
    """Import, then fork a child for each client until the parent is gone, or none is left.

    Returns:
        in each child, and nowhere else: what it is to run.
    """
    listener.settimeout(_LOOK_S)
    # Looking for GPUs must not open them: a child could then not use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    kind = os.environ.get(_MODEL_TYPE)
    _import([*_AT_ONCE, *([f"transformers.models.{kind}.modeling_{kind}"] if kind else [])])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    served, needed = 0, time.monotonic()
    while os.getppid() == parent and time.monotonic() - needed < _IDLE_S:
        if _has_children():
            needed = time.monotonic()
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        with connection:
            try:
                request, streams = _receive(connection)
            except (OSError, ValueError):
                continue  # the client was killed
            if not served:
                os.environ.update(request["environment"])
                _import_ray()
            if problem := _why_not_fork(served):
                sys.exit(f"no fork server: {problem}")
            if os.fork() == 0:
                listener.close()
                return _become(request, streams)
            served, needed = served + 1, time.monotonic()
            for stream in streams:
                os.close(stream)
            connection.send(b"1")
    sys.exit()


def _has_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True


def _import_ray() -> None:
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
        _import(_WITH_RAY)


def _import(names: Iterable[str]) -> None:
    """Import what any process may need; what cannot be imported now will say so when it is used."""
    import gc
    import importlib

    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name} is not imported ahead: {error}", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # what is here to stay need not be looked at, nor its memory copied, in each child


def _why_not_fork(served: int) -> str | None:
    """What makes children of this process unsafe, if anything does."""
    import threading

    if threading.active_count() > 1:
        return f"threads: {[thread.name for thread in threading.enumerate()]}"
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            if (path := os.readlink(f"/proc/self/fd/{entry}")).startswith("/dev/nvidia"):
                return f"{path} is open"
    if not served and _random_in_a_child() & _random_in_a_child():
        return "two children would draw the same random numbers"
    return None


def _random_in_a_child() -> set[bytes]:
    """Random ids that a child draws from Ray's generator: in its main thread, and in another."""
    import threading

    from ray import ObjectID

    out, into = os.pipe()
    if os.fork() == 0:
        os.write(into, ObjectID.from_random().binary())
        thread = threading.Thread(target=lambda: os.write(into, ObjectID.from_random().binary()))
        thread.start()
        thread.join()
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as drawn:
        content = drawn.read()
    half = len(content) // 2
    return {content[:half], content[half:]}


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    connection.settimeout(_LOOK_S)
    head, streams, _, _ = socket.recv_fds(connection, _LENGTH, 3)
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        piece = connection.recv(left - len(body))
        if not piece:
            raise ConnectionError("cut short")
        body += piece
    return json.loads(body), streams


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Take on what makes a process the one that a client wanted to be."""
    import random

    import numpy as np

    os.setpgid(0, 0)  # a raylet ends a worker with its whole process group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    np.random.seed()
    arguments: list[str] = request["arguments"]
    return arguments


if __name__ == "__main__":
    if sys.argv[1] == _SERVE:
        sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        arguments = serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
        import runpy

        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        start(sys.argv[1:])
