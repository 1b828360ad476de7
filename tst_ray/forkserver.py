"""A fork server on each node: Ray's processes start with their imports done.

    raylet ── starts ──> client: python forkserver.py <Ray's worker script> …        milliseconds
                           │ arguments, environment, working folder, standard streams
                           ▼
                         server: imported torch, transformers, Ray Data …, once
                           └── fork ──> the worker                                   milliseconds

A process of Ray spends its first seconds on imports, and with a worker group come ten of them: what
controls it, hands out data, reads and trains. Ray starts whatever the `py_executable` of the
runtime environment names; here that is the client. The first one on a node becomes the server, one
for each environment, since modules may take settings from it as they are imported. The driver of a
local Ray starts its server itself, ahead of Ray. A server ends with its parent, or a minute after
its last child. Python's own `multiprocessing.forkserver` is the same idea, for Python's children.

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
_ANSWER_S = 30.0  # a raylet gives up on a process after 60
_HARMLESS_THREADS = {"jemalloc_bg_thd"}  # Arrow's; it has its own handlers of forks
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
        here = [shlex.quote(path) for path in (sys.executable, os.path.abspath(__file__))]
        script = (
            '[ -x {0} ] && [ -f {1} ] && exec {0} -S -E {1} "$@"; exec python "$@"'  # other nodes
        ).format(*here)
        environment["py_executable"] = f"sh -c {shlex.quote(script)} sh"
    return environment


@contextlib.contextmanager
def server_ahead(model_type: str) -> Iterator[dict[str, str]]:
    """A server for a Ray on this machine, that imports while Ray starts; ends with the block.

    Yields:
        the environment variable that lets clients find it.
    """
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="tst-ray-", ignore_cleanup_errors=True) as folder:
        address = os.path.join(folder, "fork-server")
        try:
            with _listen(address) as listener:
                server = subprocess.Popen(
                    _server(listener, parent=os.getpid()),
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, _MODEL_TYPE: model_type},
                    pass_fds=[listener.fileno()],
                    start_new_session=True,  # Ctrl-C is for the driver
                )
        except OSError as error:  # a path too long for a socket, say: the first client will do
            print(f"no fork server ahead: {error}", file=sys.stderr)
            yield {}
            return
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
    body = json.dumps({"arguments": arguments, **_self_portrait()}).encode()
    with _connection(_address(arguments)) as server:
        _check_owner(server)
        server.settimeout(_ANSWER_S)
        socket.send_fds(server, [len(body).to_bytes(_LENGTH, "big")], [0, 1, 2])
        server.sendall(body)
        try:
            answer = server.recv(1)
        except TimeoutError:
            server.shutdown(socket.SHUT_RDWR)  # a child that comes from now on ends itself
            answer = server.recv(1)
        if not answer:
            raise ConnectionError("the server does not serve")


def _self_portrait() -> dict[str, Any]:
    """What a raylet gave this process, and a child of the server would otherwise not have."""
    import resource

    with open("/proc/self/oom_score_adj") as file:
        oom_score = file.read()
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "oom_score": oom_score,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    }


def _check_owner(server: socket.socket) -> None:
    """Tell the environment, with what secrets it has, to no other user's process."""
    peer = server.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if int.from_bytes(peer[4:8], sys.byteorder) != os.getuid():
        raise PermissionError("the server is another user's")


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

    lock = os.open(f"{address}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several first clients, one starts the server
        try:
            return _connect(address)
        except OSError:
            _start_server(address)
            return _connect(address)
    finally:
        os.close(lock)


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def _start_server(address: str) -> None:
    """Start a server; it can be connected to from now on, though it still imports.

    The parent, which the raylet started, becomes the server, so that all workers descend from it;
    this returns in the child, which goes on as the client.
    """
    listener, raylet = _listen(address), os.getppid()
    if os.fork() > 0:
        listener.set_inheritable(True)
        try:
            os.execv(sys.executable, _server(listener, parent=raylet))
        except OSError:
            os._exit(1)
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
    import warnings

    listener.settimeout(_LOOK_S)
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    # Looking for GPUs must not open them: a child could then not use them.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    kind = os.environ.get(_MODEL_TYPE)
    _import([*_AT_ONCE, *([f"transformers.models.{kind}.modeling_{kind}"] if kind else [])])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    ready, needed = False, time.monotonic()
    problem: str | None = None
    while os.getppid() == parent and time.monotonic() - needed < _IDLE_S:
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
        streams: list[int] = []
        with connection:
            try:
                request = _receive(connection, streams)
                if not ready:
                    os.environ.update(request["environment"])
                    _import_ray()
                    ready, problem = True, _why_alike() or _why_not_fork()
                    _tell(problem)
                if problem is None and os.fork() == 0:
                    listener.close()
                    return _become(request, streams, connection)
                needed = time.monotonic()
            except (OSError, ValueError) as error:  # the client was killed, or memory is short
                _tell(error)
            for stream in streams:
                os.close(stream)
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


def _why_not_fork() -> str | None:
    """What makes children of this process unsafe, if anything does."""
    threads = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as comm:
            threads.append(comm.read().strip())
    if len(others := [name for name in threads if name not in _HARMLESS_THREADS]) > 1:
        return f"not forked, since it has threads: {', '.join(others)}"
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            if (path := os.readlink(f"/proc/self/fd/{entry}")).startswith("/dev/nvidia"):
                return f"not forked, since {path} is open"
    return None


def _why_alike() -> str | None:
    """Whether children would draw the same ids from Ray's generator.

    It forks; OpenBLAS ends its threads then, and what is left is for `_why_not_fork` to see.
    """
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


def _receive(connection: socket.socket, streams: list[int]) -> dict[str, Any]:
    """A client's request; its standard streams are added to `streams`, whatever happens."""
    connection.settimeout(_LOOK_S)
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH, 3)
    streams += descriptors
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        piece = connection.recv(left - len(body))
        if not piece:
            raise ConnectionError("a client went away")
        body += piece
    request: dict[str, Any] = json.loads(body)
    return request


def _become(request: dict[str, Any], streams: list[int], connection: socket.socket) -> list[str]:
    """Take on what makes a process the one that a client was to be, tell the client, and go on.

    A child whose client has gone, and has become that process itself, ends.
    """
    import random
    import resource

    import numpy as np

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
        connection.send(b"1")
    except BaseException as error:
        _tell(error)
        os._exit(1)
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
