"""What Ray starts instead of Python: a client, which has the node's fork server fork the process.

    python forkclient.py [Python's options] <Ray's worker script> … [its environment]

Only the standard library, and little of it: this file is read and compiled for every process of
Ray. Where anything goes wrong, or takes too long, the client becomes an ordinary worker process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import IO, Any

ADDRESS = "TST_RAY_FORK_SERVER"
"""The environment variable with the path of the server's socket, where a driver started it."""

LENGTH = 8
"""Bytes, big-endian, of the length that goes before a request."""

_JOB = "RAY_JOB_ID"
_SET_UP = "setup_worker.py"
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language=PYTHON"
_WORKER_TYPE = "--worker-type="
_READ_AT_THE_START = ("PYTHON", "LD_", "MALLOC_", "OMP_")  # for a fork it is too late then
_BACKLOG = 128
_ANSWER_S = 30.0  # a raylet gives up on a process after 60


def start(arguments: list[str]) -> None:
    """Have the server fork a process that runs `arguments`; where that fails, become it."""
    # One that moves objects is for no job, and would have a server of its own.
    if not any(argument.startswith(_WORKER_TYPE) for argument in arguments):
        try:
            return _ask(_prepared(arguments))
        except Exception as error:
            print(f"not forked: {error!r}", file=sys.stderr, flush=True)
    if any(argument.startswith(_CONTEXT) for argument in arguments):
        worker = next(argument for argument in arguments if not argument.startswith("-"))
        arguments = [os.path.join(os.path.dirname(worker), _SET_UP), *arguments]
    else:
        arguments = [argument for argument in arguments if argument != _LANGUAGE]
    os.execv(sys.executable, [sys.executable, *arguments])


def _prepared(arguments: list[str]) -> list[str]:
    """What the server is to run, this process's environment being set.

    Raises:
        ValueError: it can be no fork of a server.
    """
    for context in (a for a in arguments if a.startswith(_CONTEXT)):
        _set_up(json.loads(context.removeprefix(_CONTEXT)))
    arguments = [a for a in arguments if a != _LANGUAGE and not a.startswith(_CONTEXT)]
    if arguments[0] == "-s" and os.environ.get("PYTHONNOUSERSITE"):  # the server has it from there
        arguments = arguments[1:]
    if arguments[0].startswith("-"):
        raise ValueError(f"Python with {arguments[0]}")
    return arguments


def _set_up(context: dict[str, Any]) -> None:
    """Do for a runtime environment of variables what Ray's setup_worker.py would.

    Raises:
        ValueError: it is more than that, or has a variable that is read as a process starts.
    """
    variables = context.pop("env_vars")
    plain = {"py_executable": sys.executable}
    if (
        any(value and plain.get(name) != value for name, value in context.items())
        or any("$" in value for value in variables.values())
        or any(name.startswith(_READ_AT_THE_START) for name in variables)
    ):
        raise ValueError("its environment is more than variables")
    os.environ.update(variables)


def _ask(arguments: list[str]) -> None:
    with _connection(_address(arguments)) as server:
        _send(server, arguments, [0, 1, 2])
        try:
            answer = server.recv(1)
        except TimeoutError:
            server.shutdown(socket.SHUT_RDWR)  # a child that comes from now on ends itself
            answer = server.recv(1)
        if not answer:
            raise ConnectionError("the server does not serve")


def _send(server: socket.socket, arguments: list[str], descriptors: list[int]) -> None:
    """Ask a server for a process.

    Args:
        arguments: what it is to run; nothing for a job's server.
        descriptors: its standard streams; for a job's server, the socket that it is to listen to.
    """
    _check_owner(server)
    body = json.dumps({"arguments": arguments, **_self_portrait()}).encode()
    socket.send_fds(server, [len(body).to_bytes(LENGTH, "big")], descriptors)
    server.sendall(body)


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
    """The socket of the node's server: where the driver says, or beside the raylet's.

    There is one for each environment, but for what is the job's alone.
    """
    if ADDRESS in os.environ:
        return os.environ[ADDRESS]
    import hashlib

    raylet = next(a.partition("=")[2] for a in arguments if a.startswith("--raylet-name="))
    variables = sorted(item for item in os.environ.items() if item[0] != _JOB)
    environment = json.dumps([sys.executable, variables])
    return f"{raylet}.{hashlib.sha256(environment.encode()).hexdigest()[:8]}"


def _connection(node: str) -> socket.socket:
    """A connection to the job's server; what is not there yet is started.

    Args:
        node: the address of the node's server, which forks the job's.
    """
    job = f"{node}.{os.environ.get(_JOB, '')}"
    with _locked(job):
        try:
            return _connect(job)
        except OSError:
            with _locked(node):
                try:
                    server = _connect(node)
                except OSError:
                    _start_server(node)
                    server = _connect(node)
            with server, listen(job) as listener:
                _send(server, [], [listener.fileno()])
            return _connect(job)  # though the server still imports


def _locked(address: str) -> IO[bytes]:
    """A lock, until it is closed: of several first clients, one starts a server."""
    import fcntl

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    lock = os.fdopen(os.open(f"{address}.lock", flags, 0o600), "rb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_ANSWER_S)
    connection.connect(address)
    return connection


def _start_server(address: str) -> None:
    """Start a server; it can be connected to from now on, though it still imports.

    The parent, which the raylet started, becomes the server, so that all workers descend from it;
    this returns in the child, which goes on as the client.
    """
    listener, raylet = listen(address), os.getppid()
    if os.fork() > 0:
        listener.set_inheritable(True)
        try:
            os.execv(sys.executable, server_command(listener, parent=raylet))
        except OSError:
            os._exit(1)
    listener.close()


def listen(address: str) -> socket.socket:
    """A socket at a path, for this user alone; in place of what a killed server left there."""
    if os.path.exists(address):
        os.unlink(address)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o077)
    try:
        listener.bind(address)
    finally:  # a path can be too long for it, and the process goes on to write a run's files
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener


def server_command(listener: socket.socket, parent: int) -> list[str]:
    """What to run, with the socket's descriptor inherited, to serve it until `parent` is gone."""
    packages = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    code = f"import sys; sys.path[0] = {packages!r}; from tst_ray.forkserver import main; main()"
    return [sys.executable, "-c", code, str(listener.fileno()), str(parent)]


if __name__ == "__main__":
    start(sys.argv[1:])
