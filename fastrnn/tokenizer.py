"""The Tokenizer class: a ``tokenizers.Tokenizer`` with exact errors, fast paths and streaming. `text` builds them and
has the prose.

This module never imports torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers

from .textkinds import WORD_PATTERN, kind_of
from .textstream import ByteStream, PieceStream, TextStream, WordStream, byte_symbols

ROLES = {
    "unk": ("<unk>", "[UNK]"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|startoftext|>"),
    "eos": ("<eos>", "</s>", "[EOS]", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]"),
}

# What the ByteLevel pre-tokenizer splits at (GPT-2's pattern), written for text that is ASCII alone.
_ASCII_BPE = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
_ASCII_WORD = re.compile(WORD_PATTERN, re.ASCII)
_SHORT = 4096  # characters below which the library alone is quicker than a table of distinct pieces


class TokenizerError(ValueError):
    """A tokenizer cannot be built, read or used as asked."""


class UnknownTextError(TokenizerError):
    """The text has pieces that the vocabulary lacks; ``pieces`` maps each to its positions (code points from the
    start)."""

    def __init__(self, pieces: dict[str, list[int]], vocab_size: int, unk: str | None) -> None:
        self.pieces = pieces
        shown = []
        for piece, places in list(pieces.items())[:10]:
            code = f" (U+{ord(piece):04X})" if len(piece) == 1 else ""
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            shown.append(f"{piece!r}{code} at {', '.join(map(str, places[:3]))}{more}")
        rest = f"; and {len(pieces) - 10} more unknown pieces" if len(pieces) > 10 else ""
        ways = "unk='skip' drops them" + (f", unk='unk' reads them as {unk!r}" if unk else "")
        super().__init__(
            f"the text has pieces that the vocabulary of {vocab_size} lacks: {'; '.join(shown)}{rest}; "
            f"change the text, or choose: {ways}"
        )


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with exact errors, fast paths and streaming; made by `build_tokenizer`,
    `from_vocabulary`, `from_file`.

    Attributes: ``kind``; ``pieces`` (list, id -> str, "" where an id is unused); ``specials`` (set of ids); ``unk_id
    bos_id eos_id pad_id`` (int or None); ``backend`` (the ``tokenizers.Tokenizer``).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        spec = json.loads(backend.to_str())
        vocab = backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise TokenizerError("the tokenizer has no pieces; build it from text that is not empty")
        self.backend = backend
        self.kind = kind_of(spec)
        self.vocab_size = max(vocab.values()) + 1
        self.pieces = [""] * self.vocab_size
        for piece, i in vocab.items():
            self.pieces[i] = piece
        self.specials = {t["id"] for t in spec["added_tokens"] if t["special"]}
        added = sorted((t["content"] for t in spec["added_tokens"]), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._vocab = vocab
        unk = spec["model"].get("unk_token")
        self.unk_id = vocab.get(unk) if isinstance(unk, str) else None
        self.bos_id, self.eos_id, self.pad_id = (
            next((vocab[s] for s in ROLES[role] if vocab.get(s) in self.specials), None)
            for role in ("bos", "eos", "pad")
        )
        self._prepare()

    def _prepare(self) -> None:
        """Build the tables of the fast paths: code point -> id, or byte -> id; id -> bytes; id -> is it no special."""
        self._shown = np.array([i not in self.specials for i in range(self.vocab_size)])
        if self.kind == "char":
            chars = {ord(p): i for p, i in self._vocab.items() if len(p) == 1}
            self._table = np.full(max(chars, default=0) + 2, -1, np.int32)
            self._table[list(chars)] = list(chars.values())
        elif self.kind in ("byte", "bpe"):
            symbols = byte_symbols()
            self._table = np.array([self._vocab.get(symbols[b], -1) for b in range(256)], np.int32)
            of = {s: bytes([b]) for b, s in enumerate(symbols)}
            self._bytes = [
                p.encode() if i in self.specials else b"".join(of.get(c, c.encode()) for c in p)
                for i, p in enumerate(self.pieces)
            ]

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        specials = [self.pieces[i] for i in sorted(self.specials)]
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, specials={specials})"

    def id(self, piece: str) -> int | None:
        """Id of a piece or special, None when the vocabulary lacks it."""
        return self._vocab.get(piece)

    # Encoding

    def encode(self, text: str, *, unk: str | None = None) -> list[int]:
        """Token ids of `text`. `unk` says what an unknown piece does: "error" raises UnknownTextError, "skip" drops
        it, "unk" gives the id of the unk piece; None is "unk" where the vocabulary has an unk piece and "error"
        elsewhere."""
        return self.encode_array(text, unk=unk).tolist()

    def encode_array(self, text: str, *, unk: str | None = None) -> np.ndarray:
        """`encode` as an int32 array of shape (tokens,), the form for corpora."""
        unk = self._unk_rule(unk)
        check_text(text)
        if self.kind == "other":
            return self._encode_other(text, unk)
        if self._added is not None and self._added.search(text):
            ids = np.concatenate([self._encode_part(part, special) for _, part, special in self._parts(text)])
        else:
            ids = self._encode_part(text, False)
        if (ids >= 0).all():
            return ids
        if unk == "error":
            raise UnknownTextError(self._unknown(text), self.vocab_size, self._unk_piece())
        return ids[ids >= 0] if unk == "skip" else np.where(ids < 0, np.int32(self.unk_id), ids)

    def _parts(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """(position, part, is it a special) of the text cut at the literal text of specials."""
        at = 0
        for match in self._added.finditer(text) if self._added else ():
            yield at, text[at : match.start()], False
            yield match.start(), match[0], True
            at = match.end()
        yield at, text[at:] if at else text, False

    def _unk_piece(self) -> str | None:
        return None if self.unk_id is None else self.pieces[self.unk_id]

    def _unk_rule(self, unk: str | None) -> str:
        if unk is None:
            return "error" if self.unk_id is None else "unk"
        if unk not in ("error", "skip", "unk"):
            raise TokenizerError(f"unk must be 'error', 'skip' or 'unk', got {unk!r}")
        if unk == "unk" and self.unk_id is None:
            raise TokenizerError(
                "unk='unk' needs a vocabulary with an unk piece and this one has none; build it with specials=('unk',)"
            )
        return unk

    def _encode_part(self, text: str, special: bool) -> np.ndarray:
        """Ids of one part, -1 for an unknown piece."""
        if special or not text:
            return np.array([self._vocab[text]] if special else [], np.int32)
        text = self._normal(text)
        if self.kind == "byte":
            return self._table[np.frombuffer(text.encode(), np.uint8)]
        if self.kind == "bpe":
            return self._encode_bpe(text)
        if self.kind == "char":
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            return self._table[np.minimum(codes, len(self._table) - 1)]
        if self.kind == "word" and text.isascii():
            pieces = _ASCII_WORD.findall(text)
        else:
            pieces = [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        get = self._vocab.get
        return np.fromiter((get(piece, -1) for piece in pieces), np.int32, len(pieces))

    def _normal(self, text: str) -> str:
        return text if self.backend.normalizer is None else self.backend.normalizer.normalize_str(text)

    def _unknown(self, text: str) -> dict[str, list[int]]:
        """Each unknown piece with its positions, in order of appearance."""
        found: dict[str, list[int]] = {}
        for at, part, special in self._parts(text):
            part = self._normal(part)
            if special:
                continue
            if self.kind == "char":
                pieces = enumerate(part)
            else:
                pieces = ((start, piece) for piece, (start, _) in self.backend.pre_tokenizer.pre_tokenize_str(part))
            for start, piece in pieces:
                if piece not in self._vocab:
                    found.setdefault(piece, []).append(at + start)
        return found

    def _encode_bpe(self, text: str) -> np.ndarray:
        """Merge each distinct piece once when the text is long ASCII; else leave all to the library."""
        encode = self.backend.encode_batch_fast
        if len(text) < _SHORT or not text.isascii():
            # A cut before a space that follows a non-space is a piece boundary whatever surrounds it.
            cuts = [0, *(m.end(1) for m in re.finditer(r"(?s).{65536,}?(\S)(?= )", text)), len(text)]
            chunks = [text[a:b] for a, b in pairwise(cuts)]
            return np.concatenate([np.array(e.ids, np.int32) for e in encode(chunks, add_special_tokens=False)])
        pieces = _ASCII_BPE.findall(text)
        distinct = list(dict.fromkeys(pieces))
        ids = {piece: e.ids for piece, e in zip(distinct, encode(distinct, add_special_tokens=False), strict=True)}
        return np.fromiter(chain.from_iterable(map(ids.__getitem__, pieces)), np.int32)

    def _encode_other(self, text: str, unk: str) -> np.ndarray:
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if unk == "unk" or self.unk_id is None or not (ids == self.unk_id).any():
            return ids
        if unk == "skip":
            return ids[ids != self.unk_id]
        unknown: dict[str, list[int]] = {}
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i == self.unk_id:
                unknown.setdefault(text[start:end], []).append(start)
        raise UnknownTextError(unknown, self.vocab_size, self._unk_piece())

    # Decoding

    def decode(self, ids: Iterable[int], *, skip_specials: bool = True) -> str:
        """Text of a sequence of ids (list, numpy array or CPU tensor); bytes that are not UTF-8 become U+FFFD, one per
        maximal part."""
        array = self._checked(ids)
        if skip_specials and self.specials:
            array = array[self._shown[array]]
        listed: list[int] = array.tolist()
        if self.kind in ("byte", "bpe"):
            return b"".join(map(self._bytes.__getitem__, listed)).decode("utf-8", "replace")
        if self.kind in ("char", "regex"):
            return "".join(map(self.pieces.__getitem__, listed))
        if self.kind == "word":
            stream = WordStream(self.pieces, set())
            return "".join(map(stream.push, listed))
        return self.backend.decode(listed, skip_special_tokens=skip_specials)

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
        if array.size == 0:
            return np.empty(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TokenizerError(
                f"decode needs one flat sequence of integer ids, got shape {array.shape} of {array.dtype}"
            )
        if array.min() < 0 or array.max() >= self.vocab_size:
            bad = array[(array < 0) | (array >= self.vocab_size)][0]
            raise TokenizerError(f"decode needs ids from 0 to {self.vocab_size - 1}, got {bad}")
        return array

    def stream_decoder(self, *, skip_specials: bool = True) -> PieceStream | ByteStream | WordStream | TextStream:
        """An object whose push(id) returns the text that has become certain (never half a code point) and flush() what
        is left; the texts joined equal `decode` of the ids."""
        hidden = self.specials if skip_specials else set()
        if self.kind in ("byte", "bpe"):
            return ByteStream(self._bytes, hidden)
        if self.kind in ("char", "regex"):
            return PieceStream(self.pieces, hidden)
        if self.kind == "word":
            return WordStream(self.pieces, hidden)
        return TextStream(hidden, lambda ids: self.backend.decode(ids, skip_special_tokens=False))

    # Files

    def to_str(self) -> str:
        """The text of tokenizer.json."""
        return self.backend.to_str(pretty=True)

    def to_file(self, path: str | Path) -> None:
        """Write tokenizer.json in one step: readers see the old file or the whole new one."""
        part = Path(f"{path}.part")
        part.write_text(self.to_str(), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def from_str(cls, text: str, *, origin: str = "the text given") -> Tokenizer:
        """Read the text of a tokenizer.json; TokenizerError when it is none."""
        try:
            spec = json.loads(text)
        except json.JSONDecodeError as error:
            raise TokenizerError(f"{origin} is not a whole tokenizer.json: {error}; copy or save it again") from None
        model = spec.get("model") if isinstance(spec, dict) else None
        if not isinstance(model, dict) or "vocab" not in model:
            raise TokenizerError(f"{origin} is JSON but no tokenizer.json: it needs an object with model.vocab")
        return cls(tokenizers.Tokenizer.from_str(text))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read any tokenizer.json."""
        data = Path(path).read_bytes()
        try:
            return cls.from_str(data.decode("utf-8"), origin=str(path))
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is no tokenizer.json: byte {error.start} is not UTF-8") from None


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"the text to encode must be str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at position {error.start}, "
            "which no UTF-8 file can hold; decode its source with errors='replace'"
        ) from None
