"""Tokenizers as Hugging Face folders: trained on the corpus, or taken from an id or a folder.

Every prepared folder carries its own copy, and all is done with that copy as it loads again: so
the shards, a trained model's folder and the fingerprint always speak of the same tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from pipelines.errors import BadInput, DataError, one_line
from pipelines.storage import locate, read_bytes, write_atomically

if TYPE_CHECKING:
    from pipelines.manifest import Manifest

TRAIN = "train"
END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256
# Training takes time with the square of a word's length, and text without spaces is one word. On
# the standard library, whose longest word has 124 characters, the tokenizer stays what it was.
MAX_WORD_CHARS = 256
_NAME_ANOTHER = "name a Hugging Face id or a folder, or train one with data.tokenizer=train"
_RESTORE = "run `tst-ray prepare` again, or restore that folder from a copy"
# The files of a folder that make its tokenizer (a model's folder also holds gigabytes of weights).
_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab.*|merges\.txt|.*\.model"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of `vocab_size` tokens whose end-of-text token is <|endoftext|>.

    The same texts give the same tokenizer. Raises BadInput if the vocabulary cannot even hold the
    bytes and the end-of-text token.
    """
    if vocab_size <= NUM_BYTES:
        raise BadInput(
            f"data.vocab_size = {vocab_size}: must be at least {NUM_BYTES + 1}, "
            "for the bytes and the end-of-text token"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    short = pre_tokenizers.FixedLength(MAX_WORD_CHARS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, short])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = words
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name: str, remedy: str = _NAME_ANOTHER) -> Any:
    """The Hugging Face tokenizer of an id, a folder, or a folder's address.

    Raises DataError if there is none (with the remedy), or one without the `tokenizers` back end or
    without an end-of-text (eos) token: BadInput for what a user named, which has no other remedy.
    """
    from transformers import AutoTokenizer

    is_named = remedy == _NAME_ANOTHER
    refused, what = (BadInput, "data.tokenizer =") if is_named else (DataError, "tokenizer")
    try:
        with _local_copy(name) as folder:
            if _lacks_sentencepiece(folder):  # else transformers would ask for tiktoken
                remedy = "pip install sentencepiece, or name a tokenizer with a tokenizer.json"
                raise ImportError("its tokenizer.model needs the package sentencepiece")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json is a bare Exception of its library
        why = one_line(error)
        if "trust_remote_code" in str(error):
            why = "it needs code of its own (auto_map), which is not run here"
        raise refused(f"{what} {name}: cannot be loaded ({why}); {remedy}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise refused(f"{what} {name}: has no fast version (tokenizer.json); choose another")
    if tokenizer.eos_token_id is None:
        raise refused(
            f"{what} {name}: has no end-of-text token to put between documents; "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def check_tokenizer_name(name: str) -> None:
    """Refuse the name of a folder that is not there, without loading anything. Raises BadInput."""
    if _is_missing(name):
        raise BadInput(
            f"data.tokenizer = {name}: cannot be loaded (no such folder); {_NAME_ANOTHER}"
        )


def _is_missing(name: str) -> bool:
    """Whether a name is that of a folder on this machine which is not there."""
    is_path = "://" not in name and name.startswith(("/", ".", "~"))
    return is_path and not os.path.isdir(os.path.expanduser(name))


def _lacks_sentencepiece(folder: str) -> bool:
    """Whether a folder has a tokenizer of sentencepiece only, and that package is not here.

    Of an id, whose files are not known yet, this says no.
    """
    if importlib.util.find_spec("sentencepiece") or not os.path.isdir(folder):
        return False
    names = os.listdir(folder)
    models = [f"{folder}/{name}" for name in names if name.endswith(".model")]
    return "tokenizer.json" not in names and any(map(_is_protobuf, models))


def _is_protobuf(path: str) -> bool:
    """Whether a model file is one of sentencepiece; tiktoken's are lines of base64."""
    with open(path, "rb") as file:
        return file.read(1) == b"\n"


@contextmanager
def _local_copy(name: str) -> Iterator[str]:
    """A tokenizer's id or folder as Hugging Face takes it: an address is fetched first."""
    if "://" not in name:
        expanded = os.path.expanduser(name)
        if _is_missing(name):
            raise FileNotFoundError("no such folder")
        if os.path.isdir(inner := f"{expanded}/tokenizer") and os.path.isfile(
            f"{expanded}/manifest.json"
        ):
            raise IsADirectoryError(f"a folder of shards, whose tokenizer is {inner}")
        yield expanded
        return
    filesystem, root = locate(name)
    with tempfile.TemporaryDirectory() as folder:
        for info in filesystem.get_file_info(pafs.FileSelector(root)):
            if info.type == pafs.FileType.File and _TOKENIZER_FILES.fullmatch(info.base_name):
                with open(f"{folder}/{info.base_name}", "wb") as copy:
                    copy.write(read_bytes(filesystem, info.path))
        yield folder


def save_tokenizer(tokenizer: Any, folder: str) -> None:
    """Write a tokenizer as a Hugging Face folder, also to an address. Raises DataError."""
    filesystem, root = locate(folder)
    with tempfile.TemporaryDirectory() as local:
        tokenizer.save_pretrained(local)
        for parent, _, names in os.walk(local):
            for name in names:
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    target = f"{root}/{os.path.relpath(path, local)}"
                    write_atomically(filesystem, target, file.read())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    return _sha256(tokenizer.backend_tokenizer)


def _sha256(backend: Any) -> str:
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id: what embedding and head must hold."""
    return max(tokenizer.get_vocab().values()) + 1


def text_vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that a text, or its end, becomes.

    Special tokens are no text, whatever is written there, but for the one that ends it.
    """
    added = tokenizer.added_tokens_decoder
    special = {token for token, known in added.items() if known.special}
    ids = {*tokenizer.get_vocab().values()} - special
    return max(ids | {tokenizer.eos_token_id}) + 1


def tokenizer_identity(name: str, vocab_size: int) -> dict[str, Any]:
    """What tells one choice of tokenizer from another without loading or training it."""
    if name == TRAIN:
        return {"train": vocab_size}
    folder = os.path.abspath(os.path.expanduser(name))
    if "://" in name or not os.path.isdir(folder):
        return {"name": name}
    digest = hashlib.sha256()
    for file in sorted(filter(_TOKENIZER_FILES.fullmatch, os.listdir(folder))):
        if os.path.isfile(path := f"{folder}/{file}"):
            with open(path, "rb") as stream:
                digest.update(f"{file}\n".encode() + hashlib.sha256(stream.read()).digest())
    return {"name": folder, "files": digest.hexdigest()}


def is_whole(folder: str, fingerprint: str, eot_token: int) -> bool:
    """Whether a folder holds the tokenizer of that fingerprint, which ends texts with that token.

    As a rule its files alone tell, without transformers, whose import takes seconds; a token that
    only its configuration adds, such as one for padding, is in no text.
    """
    from tokenizers import Tokenizer

    try:
        filesystem, root = locate(folder)
        plain = Tokenizer.from_buffer(read_bytes(filesystem, f"{root}/tokenizer.json"))
        eos = json.loads(read_bytes(filesystem, f"{root}/tokenizer_config.json"))["eos_token"]
        eos = eos["content"] if isinstance(eos, dict) else eos
        if plain.token_to_id(eos) == eot_token and _sha256(plain) == fingerprint:
            return True
    except Exception:  # the library's own, of a damaged file, is a bare one
        pass
    try:
        own = load_tokenizer(folder)
    except DataError:
        return False
    return tokenizer_fingerprint(own) == fingerprint and own.eos_token_id == eot_token


def check_tokenizer(manifest: Manifest, name: str | None = None) -> Any:
    """The tokenizer of a prepared folder, once it has proved to be the one its shards speak.

    With `name`, that tokenizer must be the same one. Raises DataError, with both fingerprints.
    """
    folder = manifest.tokenizer_folder
    own = load_tokenizer(folder, _RESTORE)
    if not is_whole(folder, manifest.tokenizer_fingerprint, manifest.eot_token):
        _check_same(manifest, folder, own, _RESTORE)
        raise DataError(
            f"tokenizer {folder} ends texts with token {own.eos_token_id}, but the shards in "
            f"{manifest.folder} with {manifest.eot_token}; {_RESTORE}"
        )
    if name not in (None, TRAIN):
        remedy = "use the tokenizer of the shards, or prepare them again with this one"
        _check_same(manifest, name, load_tokenizer(name), remedy)
    return own


def _check_same(manifest: Manifest, where: str, tokenizer: Any, remedy: str) -> None:
    found = tokenizer_fingerprint(tokenizer)
    if found != manifest.tokenizer_fingerprint:
        raise DataError(
            f"tokenizer {where} has fingerprint {found[:12]}…, but the shards in "
            f"{manifest.folder} were made with {manifest.tokenizer_fingerprint[:12]}…; {remedy}"
        )
