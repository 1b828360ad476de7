"""The files of a checkpoint: torch.distributed.checkpoint's, each rank its own, hashed on the way.

    Stager     a copy of the state in host memory, so that training can go on
    write      the copy into files, whose sizes and SHA-256 are known when it returns
    read       files into tensors, resharded to how these are laid out

Files hold tensors alone. DCP would keep any other value as a pickle, and reading a pickle runs
whatever it says; plain values are in meta.json. What makes a set of such files a checkpoint is
decided in `checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import socket
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor
from torch.serialization import set_crc32_options
from torch.utils._pytree import tree_leaves, tree_map

from tst_ray import dcp_metadata
from tst_ray.storage import Storage

log = logging.getLogger(__name__)

# A process alone saves and loads by itself here, as it is meant to; torch warns even if told so.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")

_SCRATCH = "tst-ray-checkpoint-"
_PIECE_BYTES = 16 << 20  # hashed at a time


class Stager:
    """Copies a state to host memory before it changes, each time into the same memory.

    New memory takes longer to get than to fill. It is pinned where there is a GPU to copy from.
    """

    def __init__(self) -> None:
        self._stager: BlockingAsyncStager | None = None
        self._reserving: threading.Thread | None = None

    def reserve(self, state: dict[str, Any]) -> None:
        """Begin to get the memory for copies from a GPU, in a thread.

        Pinning takes seconds, for which the first copy would have the loop wait: 8 s for the 6.7 GB
        of paper-600m on an H200.
        """
        # Not wherever a GPU is: pinning takes a context on it, and this may train on CPUs.
        if self._stager is None and _is_on_gpu(state):
            self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
            self._reserving = threading.Thread(
                target=self._reserve,
                args=(self._stager, state, torch.cuda.current_device()),
                name="pin",
            )
            self._reserving.start()

    @staticmethod
    def _reserve(stager: BlockingAsyncStager, state: dict[str, Any], device: int) -> None:
        try:
            # A thread begins on the first GPU, where pinning would take a context of 0.5 GB.
            with torch.cuda.device(device):
                stager.state_dict_cache = _pinned_like(state)
        except Exception as error:  # the stager gets its own at the first copy, or tells why not
            log.warning("no memory was pinned ahead: %s", error)

    def stage(self, state: dict[str, Any]) -> Any:
        """A copy, which the next call overwrites."""
        self.reserve(state)
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        if self._stager is None:
            self._stager = BlockingAsyncStager()
        staged = self._stager.stage(state)
        if not self._stager.cache_staged_state_dict:
            # On its own, the stager would only pin memory to keep, and that takes a GPU.
            self._stager.cache_staged_state_dict = True
            self._stager.state_dict_cache = staged
        return staged


def _is_on_gpu(state: Any) -> bool:
    if isinstance(state, dict):
        return any(map(_is_on_gpu, state.values()))
    return isinstance(state, torch.Tensor) and state.is_cuda


def _unpin(at: int) -> None:
    with contextlib.suppress(AssertionError):  # a GPU that has failed refuses, and says so anyway
        unpin_memory(at)


@torch.no_grad()
def _pinned_like(state: dict[str, Any]) -> Any:
    """Pinned host memory for a state, of any content.

    Registered, not allocated as pinned: torch's allocator of such memory rounds each tensor up to a
    power of two, and `BlockingAsyncStager` copies the whole state twice to make its own.
    """

    def host(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        made = torch.empty_like(value, device="cpu")
        local = made.to_local() if isinstance(made, DTensor) else made  # the same one each time
        if local.numel():
            at = local.data_ptr()
            pin_memory(at, local.untyped_storage().nbytes())
            weakref.finalize(local, _unpin, at).atexit = False  # the process's end unpins all
        return made

    return tree_map(host, state)


def write(staged: Any, folder: Path, group: Any = None) -> list[dict[str, Any]]:
    """Write this rank's files into a local folder; collective. They have reached the disk.

    Args:
        staged: tensors and DTensors by name; must not change meanwhile.
        folder: there already, and empty.
        group: the ranks that save together; None for this process alone, or the default group.

    Returns:
        each file's `name`, `bytes` and `sha256` (hex).

    Raises:
        OSError: on every rank, where any could not.
        TypeError: another value is among them.
    """
    if others := {type(v).__name__ for v in tree_leaves(staged) if not _is_tensor(v)}:
        raise TypeError(f"a checkpoint's files hold tensors alone, not {', '.join(others)}")
    files = _HashedFiles()
    writer = dcp.FileSystemWriter(
        folder,
        single_file_per_rank=True,
        overwrite=True,
        # All is in host memory. Where it sees a GPU, DCP would copy ahead on its stream all the
        # same, and wait there, every 10 MB, for whatever training has queued.
        per_thread_copy_ahead=0,
    )
    writer.fs = files
    with _ordinary_errors(), _without_crc32():
        dcp.save(staged, storage_writer=writer, process_group=group)
    return [files.entries[name] for name in sorted(files.entries)]


_writing = 0
_writing_lock = threading.Lock()


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Have torch make no CRC-32 of what it writes, which is hashed anyway; it takes a fifth of the
    time (160 MB, one thread). For the whole process: until the last of several is done.
    """
    global _writing
    with _writing_lock:
        _writing += 1
        set_crc32_options(False)
    try:
        yield
    finally:
        with _writing_lock:
            _writing -= 1
            set_crc32_options(not _writing)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def read(folder: Storage, state: dict[str, Any], group: Any = None) -> None:
    """Load files into `state`, tensors in place and laid out as they are here; collective.

    Raises:
        OSError: on every rank, where any could not.
    """
    with _ordinary_errors():
        dcp.load(
            state, storage_reader=_reader(folder), planner=_TensorPlanner(), process_group=group
        )


def read_full(folder: Storage, state: dict[str, Any]) -> None:
    """Load files into full tensors in one process, without a process group.

    Raises:
        OSError: a file could not be read.
    """
    with _ordinary_errors():
        dcp.load(state, storage_reader=_reader(folder), planner=_TensorPlanner(), no_dist=True)


class _TensorPlanner(dcp.DefaultLoadPlanner):
    """Loads tensors alone; DCP's own planner unpickles every other entry, whatever it does."""

    def create_local_plan(self) -> Any:
        """What this rank reads. Raises ValueError if it is to be no tensor."""
        known = self.metadata.state_dict_metadata if self.metadata else {}
        for name in self.state_dict:
            if not isinstance(known.get(name), TensorStorageMetadata):
                raise ValueError(f"the checkpoint has no tensor {name}")
        return super().create_local_plan()

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Refuse an entry that is no tensor."""
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor in the checkpoint")


class _SafeMetadata:
    """A reader whose `.metadata` cannot run code."""

    fs: Any
    path: Any
    load_id: Any

    def read_metadata(self) -> Any:
        """The checkpoint's metadata. Raises ValueError if it is damaged or not to be trusted."""
        where = self.fs.concat_path(self.path, dcp_metadata.METADATA)
        with self.fs.create_stream(where, "rb") as stream:
            metadata = dcp_metadata.load(stream.read())
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _LocalReader(_SafeMetadata, dcp.FileSystemReader):  # type: ignore[misc]
    """Reads a local folder."""


class _RemoteReader(_SafeMetadata, FsspecReader):  # type: ignore[misc]
    """Reads a folder of any filesystem that fsspec knows."""


def num_bytes(state: Any) -> int:
    """Bytes of this rank's tensors in a state; what it writes is little more."""
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size()
    return sum(map(num_bytes, state.values())) if isinstance(state, dict) else 0


def make_scratch(num_bytes: int, memory: Path = Path("/dev/shm")) -> Path:
    """A folder for files that are sent on at once: in memory, where there is room for them.

    What processes left that were killed in the middle of a save is removed first. Ray keeps its
    objects in the same memory, and a machine that runs out of it there loses more than a save: half
    of what is free stays so, were all of a node's workers to save to memory and to storage at once.
    A container's may be far smaller than the machine's.

    Args:
        num_bytes: what this worker is going to write.
        memory: a folder in memory.
    """
    disk = Path(tempfile.gettempdir())
    ours = f"{_SCRATCH}{socket.gethostname()}-"  # other hosts' processes may share the folder
    for left in [*memory.glob(f"{ours}*"), *disk.glob(f"{ours}*")]:
        if not Path(f"/proc/{left.name.removeprefix(ours).partition('-')[0]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    at_once = 2 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * num_bytes
    fits = os.access(memory, os.W_OK) and 2 * at_once < shutil.disk_usage(memory).free
    root = memory if fits else disk
    return Path(tempfile.mkdtemp(prefix=f"{ours}{os.getpid()}-", dir=root))


class _HashedFiles(FileSystem):
    """Local files as DCP writes them, and what each came to.

    Attributes:
        entries: the bytes and SHA-256 of each file written, by its name.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        """A file to write, or to read."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _HashedFile(path) as file:
            yield file
        name = Path(path).name
        self.entries[name] = {"name": name, **file.result()}

    def rename(self, path: Any, new_path: Any) -> None:
        """Give a file its final name."""
        super().rename(path, new_path)
        name = Path(new_path).name
        self.entries[name] = {**self.entries.pop(Path(path).name), "name": name}


class _HashedFile(io.BufferedWriter):
    """A file to write, which a thread behind the writer reads and hashes.

    So hashing passes while the rest is written, and while the disk takes it. What the thread reads
    is what the file has, not what the writer meant.
    """

    def __init__(self, path: Any) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._digest = hashlib.sha256()
        self._handed_over = 0
        self._behind = io.FileIO(path)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._pieces: list[Future[None]] = []

    def write(self, data: Any) -> int:
        """Add bytes, and pass on what makes a whole piece."""
        written = super().write(data)
        if self.tell() - self._handed_over >= _PIECE_BYTES:
            self._hand_over()
        return written

    def close(self) -> None:
        """Pass on what is left, and close; once closed, nothing."""
        if self.closed:
            return
        try:
            self._hand_over()
        finally:
            self._thread.shutdown()  # behind the file's end by now, or at its first error
            self._behind.close()
            super().close()

    def result(self) -> dict[str, Any]:
        """The closed file's bytes and sha256; raises what its thread met."""
        for piece in self._pieces:
            piece.result()
        return {"bytes": self._handed_over, "sha256": self._digest.hexdigest()}

    def _hand_over(self) -> None:
        self.flush()
        num_bytes, self._handed_over = self.tell() - self._handed_over, self.tell()
        self._pieces.append(self._thread.submit(self._hash, num_bytes))

    def _hash(self, num_bytes: int) -> None:
        """In the thread: hash the file's next bytes."""
        while num_bytes:
            content = self._behind.read(min(num_bytes, 1 << 20))
            if not content:
                raise OSError(f"{self.name}: ended {num_bytes} bytes early")
            self._digest.update(content)
            num_bytes -= len(content)


@contextlib.contextmanager
def _ordinary_errors() -> Iterator[None]:
    """DCP's own exception is a BaseException, which passes by every `except Exception`."""
    try:
        yield
    except CheckpointException as error:
        causes = [str(cause) for cause, _ in error.failures.values()]
        raise OSError(causes[0] if causes else "the checkpoint failed") from error


def _reader(folder: Storage) -> Any:
    return _LocalReader(folder.path) if folder.is_local else _RemoteReader(folder.url)
