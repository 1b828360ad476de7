"""Signatures of checkpoints, by which a run knows its own in a bucket that others can write to.

What is signed is meta.json, which has the checksum of every file. The key stays in a file of its
own (`checkpoint.key_file`), which every node reads by itself.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from tst_ray.errors import RunError

MIN_KEY_BYTES = 16
SCHEME = "hmac-sha256"
_PURPOSE = b"tst_ray checkpoint\n"  # one key may sign other things elsewhere


def key_problem(path: str) -> str | None:
    """What is wrong with a key's file, and the remedy; None if nothing is."""
    try:
        key = _content(path)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        return f"cannot be read ({why}); give a file that every node can read"
    if len(key) < MIN_KEY_BYTES:
        return (
            f"holds {len(key)} bytes, and a key has at least {MIN_KEY_BYTES}; make one with "
            "`openssl rand -hex 32`"
        )
    return None


def read_key(path: str | None) -> bytes | None:
    """The key in a file; None without a file.

    Raises:
        RunError: the file cannot be read, or holds no key.
    """
    if path is None:
        return None
    if problem := key_problem(path):
        raise RunError(f"checkpoint.key_file = {path}: {problem}")
    return _content(path)


def signature(key: bytes, content: bytes) -> str:
    """The signature of a meta.json, as its marker has it."""
    return f"{SCHEME} {hmac.new(key, _PURPOSE + content, hashlib.sha256).hexdigest()}"


def signature_problem(key: bytes, content: bytes, found: str) -> str | None:
    """What is wrong with the signature found in a marker; None if nothing is."""
    if not found:
        return "it is not signed, and checkpoint.key_file is set"
    if not hmac.compare_digest(found.encode(), signature(key, content).encode()):
        return "its signature is not by the key in checkpoint.key_file"
    return None


def _content(path: str) -> bytes:
    return Path(path).expanduser().read_bytes().strip()
