"""A document that is tokenized in parts has the ids of the whole, whatever the tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pipelines.encoder import plain_encoder
from pipelines.seams import Part, Seams

EOT = 2
SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [
    f"the number {i} is a word of {i * 7} letters, import return def ÀÉ ﬁne\n" for i in range(300)
]


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def _bpe(size: int = 400, alphabet: Sequence[str] = (), **parts: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=list(alphabet),
        show_progress=False, max_token_length=12,
    )  # fmt: skip
    return _trained(models.BPE(unk_token="<unk>"), trainer, **parts)


def _unigram(**parts: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return _trained(models.Unigram(), trainer, **parts)


def _metaspace(scheme: str, *, split: bool = True) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def _byte_level(**options: Any) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _bpe(500, alphabet, pre_tokenizer=pre_tokenizers.ByteLevel(**options))


def _llama() -> Tokenizer:
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _bpe(normalizer=marks)


def _llama_of_bytes() -> Tokenizer:
    """What has no token of its own is spelt in bytes, whose tokens are called special here."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator([line.strip() for line in WORDS], trainer)
    return tokenizer


def _word_piece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return _trained(
        models.WordPiece(unk_token="<unk>"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
    )


def _with_added() -> Tokenizer:
    """Runs of spaces are tokens of their own, looked for before anything else."""
    tokenizer = _byte_level(add_prefix_space=False)
    tokenizer.add_tokens([" " * n for n in range(2, 9)])
    return tokenizer


_NFKC = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC(), normalizers.Lowercase()])
_DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+(?!\S)|\s+|[^\s\p{N}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
    ]
)
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: _byte_level(add_prefix_space=False),
    "bytes, a space before": lambda: _byte_level(add_prefix_space=True),
    "bytes, no pattern": lambda: _byte_level(add_prefix_space=False, use_regex=False),
    "digits by three": lambda: _bpe(
        500, pre_tokenizers.ByteLevel.alphabet(), pre_tokenizer=_DIGITS
    ),
    "llama": _llama,
    "llama of bytes": _llama_of_bytes,
    "metaspace always": lambda: _bpe(pre_tokenizer=_metaspace("always")),
    "metaspace first": lambda: _bpe(pre_tokenizer=_metaspace("first")),
    "metaspace never": lambda: _bpe(pre_tokenizer=_metaspace("never")),
    "metaspace, one word": lambda: _bpe(pre_tokenizer=_metaspace("first", split=False)),
    "unigram always": lambda: _unigram(pre_tokenizer=_metaspace("always")),
    "unigram first": lambda: _unigram(pre_tokenizer=_metaspace("first")),
    "unigram, one word": lambda: _unigram(pre_tokenizer=_metaspace("always", split=False)),
    "unigram, NFKC": lambda: _unigram(normalizer=_NFKC, pre_tokenizer=_metaspace("always")),
    "word piece": _word_piece,
    "stripped, NFKC": lambda: _bpe(normalizer=_NFKC, pre_tokenizer=_metaspace("always")),
    "added tokens": _with_added,
}  # fmt: skip


def encoding(tokenizer: Tokenizer) -> Any:
    """The tokenizer as preparations use it, and how it encodes texts."""
    plain = plain_encoder(tokenizer.to_str(), EOT)

    def encode(texts: Sequence[str], with_places: bool) -> Sequence[Any]:
        method = plain.encode_batch if with_places else plain.encode_batch_fast
        return method(list(texts), add_special_tokens=False)

    return plain, encode


def random_text(draw: random.Random, length: int) -> str:
    pieces = ["word", " ", "  ", "    ", "\n", "\n\n", "the", "import", "12345", "é", "e\u0301",
              "ﬁ", "😀", "漢字", "\t", "</s>", "<s>", ".", "a" * 25, " " * 20, "\r\n"]  # fmt: skip
    text = ""
    while len(text) < length:
        text += draw.choice(pieces)
    return text


def random_cuts(draw: random.Random, text: str, num_cuts: int) -> list[Part]:
    places = [0, *sorted(draw.sample(range(1, len(text)), num_cuts)), len(text)]
    return [Part(text[a:b], ends=b == len(text)) for a, b in pairwise(places)]


def encoded(encode: Any, parts: Sequence[Part], batch: int, overlap: int = 256) -> list[int]:
    seams = Seams(encode, EOT, overlap)
    given = [seams.encode(parts[n : n + batch]) for n in range(0, len(parts), batch)]
    return [token for group in given for ids in group for token in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_parts_has_the_ids_of_the_whole(kind: str) -> None:
    plain, encode = encoding(KINDS[kind]())
    draw = random.Random(kind)
    for number in range(12):
        text = random_text(draw, 4_000)
        whole = [*plain.encode(text, add_special_tokens=False).ids, EOT]
        parts = random_cuts(draw, text, 5)
        assert encoded(encode, parts, 1 + number % 3) == whole, repr(text)


@pytest.mark.parametrize("kind", ["bytes", "llama", "unigram first"])
def test_parts_may_be_tiny_or_empty(kind: str) -> None:
    plain, encode = encoding(KINDS[kind]())
    draw = random.Random(1)
    text = random_text(draw, 1_500)
    whole = [*plain.encode(text, add_special_tokens=False).ids, EOT]
    parts = [Part(text[n : n + 20], ends=False) for n in range(0, len(text), 20)] + [Part("")]
    assert encoded(encode, parts, 4) == whole
    assert encoded(encode, [Part("")], 1) == [EOT]


def test_documents_follow_one_another() -> None:
    plain, encode = encoding(KINDS["llama"]())
    draw = random.Random(2)
    parts, expected = [], []
    for number in range(9):
        text = random_text(draw, 900)
        parts += random_cuts(draw, text, 2) if number % 3 else [Part(text)]
        expected += [*plain.encode(text, add_special_tokens=False).ids, EOT]
    for batch in (1, 2, 5, 99):
        assert encoded(encode, parts, batch) == expected


def test_a_document_whose_cut_cannot_be_proven_is_ended_there() -> None:
    """Here what a token is depends on how far it is from the document's beginning."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "abc": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(3)
    plain, encode = encoding(tokenizer)
    text = "abc" * 1_000
    bounds = list(pairwise([0, 1_001, 2_000, 3_000]))
    seams = Seams(encode, EOT, overlap=100, max_chars=1_000)
    given = seams.encode([Part(text[a:b], ends=b == len(text)) for a, b in bounds])
    assert [token for ids in given for token in ids] == [
        token
        for start, stop in bounds
        for token in [*plain.encode(text[start:stop], add_special_tokens=False).ids, EOT]
    ]


def test_only_the_overlap_is_encoded_twice() -> None:
    _, encode = encoding(KINDS["bytes"]())
    lengths: list[int] = []

    def counted(texts: Sequence[str], with_places: bool) -> Any:
        lengths.extend(map(len, texts))
        return encode(texts, with_places)

    text = random_text(random.Random(3), 20_000)
    parts = [Part(text[n : n + 2_000], ends=False) for n in range(0, len(text), 2_000)]
    encoded(counted, parts, 3)
    assert sum(lengths) == len(text) + 256 * (len(parts) - 1)
    assert max(lengths) <= 2_256


# ── special text ─────────────────────────────────────────────────────────────────────────────────


def _words() -> Tokenizer:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _merged() -> Tokenizer:
    """Merges that spell a special token, as training on text with one in it gives."""
    tokens = [*SPECIAL, "<", "/", "s", ">", "a", "b", " ", "</", "s>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}

    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.mark.parametrize("kind", [*KINDS, "words", "merged", "not called special"])
def test_no_text_is_a_special_token(kind: str) -> None:
    made: dict[str, Callable[[], Tokenizer]] = {
        **KINDS, "words": _words, "merged": _merged, "not called special": _merged}  # fmt: skip
    tokenizer = made[kind]()
    if kind == "not called special":
        content = json.loads(tokenizer.to_str())
        content["added_tokens"][EOT]["special"] = False
        tokenizer = Tokenizer.from_str(json.dumps(content))
    plain, _ = encoding(tokenizer)
    for text in ("</s>", "a </s> b", "a</s>b", "<s>", " <s> </s>"):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert ids and not {1, EOT} & set(ids), (text, ids)
    assert plain.get_vocab_size() == tokenizer.get_vocab_size()
    ordinary = "the number 12\nis a word of 漢字 letters"
    assert plain.encode(ordinary).ids == tokenizer.encode(ordinary, add_special_tokens=False).ids


def test_nothing_is_drawn_or_added() -> None:
    tokenizer = _byte_level(add_prefix_space=False)
    expected = tokenizer.encode("the number of letters" * 9).ids
    tokenizer.model.dropout = 0.5
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.enable_truncation(5)
    plain, _ = encoding(tokenizer)
    for _ in range(5):
        assert plain.encode("the number of letters" * 9).ids == expected
