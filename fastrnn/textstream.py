"""Token ids to text as they come: what is certain at once, never half a code point (the decoders of
`tokenizer.Tokenizer`)."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence


def byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE files (GPT-2's table): a byte that Latin-1 prints
    stands for itself, each other one, in order, for the next code point from U+0100 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printed else next(others)) for b in range(256)]


class PieceStream:
    """Pieces are whole code points: each is certain at once."""

    def __init__(self, pieces: Sequence[str], hidden: Collection[int]) -> None:
        self._pieces, self._hidden = pieces, hidden

    def push(self, token: int) -> str:
        """Text of the next id."""
        return "" if token in self._hidden else self._pieces[token]

    def flush(self) -> str:
        """Nothing is ever held back."""
        return ""


class WordStream(PieceStream):
    """A space before each piece, except at the start, around newlines, before closing and after opening punctuation."""

    CLOSING = ".,;:!?%)]}…"
    OPENING = "([{$#"

    def __init__(self, pieces: Sequence[str], hidden: Collection[int]) -> None:
        super().__init__(pieces, hidden)
        self._last = ""

    def push(self, token: int) -> str:
        """Text of the next id with the space that belongs before it."""
        piece, last = super().push(token), self._last
        if not piece:
            return ""
        self._last = piece
        joined = not last or "\n" in (last, piece) or piece[0] in self.CLOSING or last[-1] in self.OPENING
        return piece if joined else " " + piece


class ByteStream:
    """Pieces are bytes: text comes when a code point is whole; what can never become one is U+FFFD, one per maximal
    part (Unicode 3.9)."""

    def __init__(self, pieces: Sequence[bytes], hidden: Collection[int]) -> None:
        self._pieces, self._hidden = pieces, hidden
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that the bytes of the next id complete."""
        return "" if token in self._hidden else self._decoder.decode(self._pieces[token])

    def flush(self) -> str:
        """The cut code point at the end, if any, as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class TextStream:
    """Any tokenizer: decode all ids so far and show what is new, but hold back while the text ends in U+FFFD
    (quadratic; the fallback for tokenizers whose decoder is not one of ours)."""

    def __init__(self, hidden: Collection[int], decode: Callable[[list[int]], str]) -> None:
        self._hidden, self._decode = hidden, decode
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Text that the next id makes certain."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or not text.startswith(self._shown):
            return ""
        fresh, self._shown = text[len(self._shown) :], text
        return fresh

    def flush(self) -> str:
        """The text held back, U+FFFD for bytes that are no text."""
        text = self._decode(self._ids)[len(self._shown) :]
        self._ids, self._shown = [], ""
        return text
