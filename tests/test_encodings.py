"""Text in any Unicode encoding, told by its mark or its NUL bytes."""

import io

import pytest

from pipelines.encodings import HEAD_BYTES, as_utf8, encoding_of

TEXTS = {
    "plain": "Some words,\r\nand\tmore.\n",
    "german": "Grüße aus Köln, für 5 €\n" * 9,
    "russian": "Привет, как дела?\n" * 9,
    "chinese": "你好,世界。\n" * 9,
    "emoji": "😀 smile\n" * 9,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_an_encoding_is_told(name: str, encoding: str, mark: str) -> None:
    stored = (mark + TEXTS[name]).encode(encoding)
    assert encoding_of(stored) == encoding
    stream, is_text = as_utf8(io.BytesIO(stored))
    assert is_text and stream.read() == TEXTS[name].encode()


@pytest.mark.parametrize(
    "head",
    [
        b"one NUL \0 in a text",
        b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0\1\0\0\0",
        b"\0" * 100,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"".join((i * 7919 % 65536).to_bytes(2, "little") for i in range(400)),
        b"".join(i.to_bytes(2, "little") for i in range(200)),
    ],
)
def test_what_is_no_text_is_told(head: bytes) -> None:
    assert encoding_of(head) is None
    stream, is_text = as_utf8(io.BytesIO(head))
    assert not is_text and stream.read() == head


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-be"])
def test_a_long_text_is_read_in_small_parts(encoding: str) -> None:
    text = "".join(f"{i} ünd 😀\n" for i in range(HEAD_BYTES))
    stream, _ = as_utf8(io.BytesIO(text.encode(encoding)))
    parts = iter(lambda: stream.read(999), b"")
    assert b"".join(parts) == text.encode()


@pytest.mark.parametrize("stored", [TEXTS["plain"].encode("utf-16")[:-1], b"\xff\xfe\x00\xd8a\0"])
def test_a_text_that_does_not_decode_is_an_error(stored: bytes) -> None:
    stream, _ = as_utf8(io.BytesIO(stored))
    with pytest.raises(OSError, match="not UTF-16-LE after byte"):
        while stream.read(64):
            pass


def test_text_in_utf8_stays_as_it_is() -> None:
    for text in (b"", b"\xff latin", "\ufeffmarked".encode(), "grün".encode()):
        stream, is_text = as_utf8(io.BytesIO(text))
        assert is_text and stream.read() == text
