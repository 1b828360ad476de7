"""The `.metadata` file of a checkpoint: a pickle that torch.distributed.checkpoint (DCP) writes.

Reading a pickle calls whatever it names, so a file in shared storage could run any code. Here only
the names that DCP itself writes are known; a file with another one is refused.

    problem    what is wrong with a file, without torch and without making any of its objects
    load       the object that DCP needs
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Callable, Collection
from typing import Any

from pipelines.errors import one_line

METADATA = ".metadata"

_DTYPES = """
    bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64
    complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu
"""
_DCP = """
    Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata
    ChunkStorageMetadata TensorProperties _MEM_FORMAT_ENCODING
"""
_ALLOWED = {
    "torch": {"Size", *_DTYPES.split()},
    "torch.serialization": {"_get_layout"},  # gives one of torch's layouts by its name
    "torch.distributed.checkpoint.metadata": set(_DCP.split()),
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},  # where it was written
    "pathlib._local": {"PosixPath"},  # the same, by Python 3.13
}

# Older versions kept the optimizer's settings so. Nothing reads them.
_OLD_VALUES = "optimizer.param_groups."


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_ALLOWED` only.

    Args:
        find: gives what an allowed name stands for.
    """

    def __init__(self, content: bytes, find: Callable[[str, str], Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(
                f"{METADATA} asks for {module}.{name}, which no checkpoint needs: it was not "
                "written by a run, and is not to be trusted"
            )
        return self._find(module, name)


def _read(content: bytes, find: Callable[[str, str], Any]) -> Any:
    try:
        return _Unpickler(content, find).load()
    except ValueError:
        raise
    except Exception as error:  # a pickle that is cut or altered raises anything
        raise ValueError(f"{METADATA} is damaged ({one_line(error)})") from error


def load(content: bytes) -> Any:
    """The `Metadata` that a file holds.

    Raises:
        ValueError: it is damaged, or names what is not allowed.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    loaded = _read(content, lambda module, name: getattr(importlib.import_module(module), name))
    if not isinstance(loaded, Metadata):
        raise ValueError(f"{METADATA} holds no metadata of a checkpoint")
    return loaded


class _StandIn:
    """Takes the place of what a pickle names: made of anything, it does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def problem(content: bytes, files: Collection[str]) -> str | None:
    """What is wrong with a file; None if nothing is.

    Args:
        files: the names of the checkpoint's files, of which alone it may speak.
    """
    kinds: dict[str, type] = {}

    def stand_in(module: str, name: str) -> type:
        return kinds.setdefault(name, type(name, (_StandIn,), {}))

    try:
        metadata = _read(content, stand_in)
        is_metadata = type(metadata) is kinds.get("Metadata")
        if not is_metadata:
            return f"{METADATA} holds no metadata of a checkpoint"
        for name, entry in metadata.state_dict_metadata.items():
            is_tensor = type(entry) is kinds.get("TensorStorageMetadata")
            if not is_tensor and not name.startswith(_OLD_VALUES):
                return f"{METADATA} has {name}, which is no tensor"
        for place in metadata.storage_data.values():
            if place.relative_path not in files:
                return f"{METADATA} speaks of {place.relative_path!r}, no file of the checkpoint"
    except ValueError as error:
        return str(error)
    except (AttributeError, TypeError) as error:
        return f"{METADATA} is damaged ({one_line(error)})"
    return None
