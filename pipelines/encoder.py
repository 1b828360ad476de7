"""A tokenizer as it encodes plain text: the same tokens each time, and no text is a special one.

plain_encoder   the tokenizers library's Tokenizer, made so from a tokenizer.json
within          a call's result, or TimeoutError after some seconds of computing
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

T = TypeVar("T")
_NONCHARACTER = "\U0010ffff"  # which Unicode keeps out of texts


@lru_cache(maxsize=1)
def plain_encoder(tokenizer_json: str, eot_token: int) -> Tokenizer:
    """The tokenizer for plain text: nothing added, cut or drawn, and no text is a special token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(
        json.dumps(_for_plain_text(json.loads(tokenizer_json), eot_token))
    )
    tokenizer.encode_special_tokens = True
    return tokenizer


def _for_plain_text(content: dict[str, Any], eot_token: int) -> dict[str, Any]:
    """A tokenizer.json without what adds, cuts and draws, whose special tokens no text spells.

    `encode_special_tokens` keeps the library from looking for special tokens in a text. But they
    are in the model's vocabulary as well, and a Unigram model, one of whole words, or one with such
    merges finds them there. So there they get names that no text has; their numbers stay.
    """
    model = {**content["model"]}
    if model.get("dropout"):
        model["dropout"] = None  # otherwise two preparations would differ
    added = [
        {**token, "special": token["special"] or token["id"] == eot_token}
        for token in content.get("added_tokens") or ()
    ]
    names = {
        token["content"]: f"{_NONCHARACTER}{token['id']}{_NONCHARACTER}"
        for token in added
        if token["special"] and not (model.get("byte_fallback") and _is_byte(token["content"]))
    }
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    else:  # Unigram's, in the order of its tokens' numbers
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [pair for pair in model["merges"] if not _special(pair, names)]
    return {
        **content,
        "model": model,
        "added_tokens": [{**token, "content": names.get(token["content"], token["content"])}
                         for token in added],
        "truncation": None,
        "padding": None,
        "post_processor": None,
    }  # fmt: skip


def _is_byte(name: str) -> bool:
    """Whether a token is that of a byte, which a model with byte_fallback looks for by its name."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", name) is not None


def _special(pair: str | list[str], names: dict[str, str]) -> bool:
    """Whether a merge makes a special token, or makes more of one."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left + right in names or left in names or right in names


def within(limit_s: float, call: Callable[[], T]) -> T:
    """What a call gives, or raises. Raises TimeoutError when it has computed for too long.

    The tokenizers library cannot be interrupted: its thread is left behind, and ends with the
    process. A process that had no time to compute, as one that was stopped, gets it.
    """
    outcome: list[Callable[[], T]] = []

    def run() -> None:
        try:
            result = call()
        except Exception as error:
            outcome.append(_raising(error))
        except BaseException as panic:  # what Rust code raises of a defect is no Exception
            outcome.append(_raising(RuntimeError(str(panic))))
        else:
            outcome.append(lambda: result)

    started = time.process_time()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    while thread.is_alive() and (left_s := limit_s - (time.process_time() - started)) > 0:
        thread.join(max(left_s, 0.05))
    if thread.is_alive():
        raise TimeoutError(f"not done after {limit_s:.0f} s")
    return outcome[0]()


def _raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail
