"""A long document's token ids, though the tokenizer never sees it whole.

    Part, Part, … ── Seams.encode ──> ids that together are those of the whole document

The parts of a document are encoded one by one, each with the end of the part before: so both of
them have the tokens of that overlap. Near its middle, far from where either text was cut, these
are as in the whole document: what is put before a first word, or depends on what follows, is at the
edges. There the two are joined, if they agree: the same tokens at the same places throughout the
middle. Otherwise the overlap grows, up to the whole part before. If they never agree, the document
is ended at the cut, and what follows is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

OVERLAP_CHARS, MAX_CHARS = 2**12, 2**21
_GROWTH = 8
Encode = Callable[[Sequence[str], bool], Sequence[Any]]


@dataclass(frozen=True)
class Part:
    """Text of one document, and whether the document ends with it."""

    text: str
    ends: bool = True


@dataclass(frozen=True)
class _Window:
    """A part's tokens: ids, and where each stands, counted from the end of the part's text.

    A window begins with so many characters of the part before. It may be that of a document from
    its beginning. So many of its tokens are left of the seam: the part before has given them.
    """

    text: str
    overlap: int
    ids: list[int]
    spans: list[tuple[int, int]]
    is_first: bool
    num_given: int = 0

    @property
    def left(self) -> list[int]:
        """The ids that are not given yet."""
        return self.ids[self.num_given :]

    @classmethod
    def of(cls, text: str, overlap: int, encoding: Any, *, is_first: bool) -> _Window:
        length = len(text)
        spans = [(start - length, stop - length) for start, stop in encoding.offsets]
        return cls(text, overlap, encoding.ids, spans, is_first)


class Seams:
    """Encodes documents that come in parts, one after the other.

    Args:
        encode: the tokenizer's encodings of some texts, with the tokens' places if so asked.
        eot_token: what ends each document.
        overlap: how many characters of a part the next one is encoded with, at first.
        max_chars: how many characters are encoded at once to find a seam, at most.
    """

    def __init__(
        self,
        encode: Encode,
        eot_token: int,
        overlap: int = OVERLAP_CHARS,
        max_chars: int = MAX_CHARS,
    ) -> None:
        self._encode, self._eot = encode, eot_token
        self._overlap, self._max_chars = overlap, max_chars
        self._open: _Window | None = None  # the document's last part: its tokens are not given yet

    def encode(self, parts: Sequence[Part]) -> list[list[int]]:
        """For each part the ids that are sure by then; those of a document that ends are all."""
        windows = self._windows(parts)
        given = []
        for part, window in zip(parts, windows, strict=True):
            ids, self._open = self._joined(window) if self._open else ([], window)
            if part.ends:
                ids = [*ids, *self._open.left, self._eot]
                self._open = None
            given.append(ids)
        return given

    def _windows(self, parts: Sequence[Part]) -> list[_Window]:
        """Each part encoded with the end of the part before; whole documents all at once."""
        texts, overlaps = [], []
        before = self._open.text if self._open else None
        for part in parts:
            overlap = (before or "")[-self._overlap :]
            texts.append(overlap + part.text)
            overlaps.append(None if before is None else len(overlap))
            before = None if part.ends else texts[-1]
        whole = [n for n, part in enumerate(parts) if part.ends and overlaps[n] is None]
        others = [n for n in range(len(parts)) if not (parts[n].ends and overlaps[n] is None)]
        windows: dict[int, _Window] = {}
        for n, encoding in zip(whole, self._encode([texts[n] for n in whole], False), strict=True):
            windows[n] = _Window(texts[n], 0, encoding.ids, [], is_first=True)
        for n, encoding in zip(others, self._encode([texts[n] for n in others], True), strict=True):
            first = overlaps[n] is None
            windows[n] = _Window.of(texts[n], overlaps[n] or 0, encoding, is_first=first)
        return [windows[n] for n in range(len(parts))]

    def _joined(self, window: _Window) -> tuple[list[int], _Window]:
        """The ids of the open part up to the seam, and the window from there on."""
        assert self._open is not None
        before = self._open
        part = window.text[window.overlap :]
        while True:
            if before.is_first and window.overlap == len(before.text):
                return [], replace(window, is_first=True)  # the document from its beginning
            if seam := _seam(before, window, len(part)):
                left, right = seam
                return before.ids[before.num_given : left], replace(window, num_given=right)
            most = min(len(before.text), self._max_chars - len(part))
            overlap = min(window.overlap * _GROWTH, most)
            if overlap <= window.overlap:
                break
            window = self._window(before.text[-overlap:] + part, overlap)
        return [*before.left, self._eot], self._window(part, 0, is_first=True)

    def _window(self, text: str, overlap: int, *, is_first: bool = False) -> _Window:
        return _Window.of(text, overlap, self._encode([text], True)[0], is_first=is_first)


def _seam(before: _Window, window: _Window, part_chars: int) -> tuple[int, int] | None:
    """How many tokens of one window and of the next are left of their seam; None without one.

    Args:
        part_chars: the length of the next window's own text: so much later do its places end.
    """
    margin = window.overlap // 4
    start, stop = margin - window.overlap, -margin
    left = _between(before.spans, start, stop)
    right = _between(window.spans, start - part_chars, stop - part_chars)
    if len(left) != len(right) or len(left) < 2:
        return None
    for one, other in zip(left, right, strict=True):
        moved = tuple(place + part_chars for place in window.spans[other])
        if before.ids[one] != window.ids[other] or before.spans[one] != moved:
            return None
    middle = len(left) // 2
    for n in sorted(range(1, len(left)), key=lambda n: abs(n - middle)):
        at = left[n]
        is_whole = before.spans[at - 1][1] <= before.spans[at][0]  # not within a character
        if is_whole and at >= before.num_given:
            return at, right[n]
    return None


def _between(spans: Sequence[tuple[int, int]], start: int, stop: int) -> range:
    """The tokens that lie between two places, all of them or none."""
    inside = [n for n, (first, last) in enumerate(spans) if start <= first and last <= stop]
    if not inside or inside[-1] - inside[0] + 1 != len(inside):
        return range(0)
    return range(inside[0], inside[-1] + 1)
