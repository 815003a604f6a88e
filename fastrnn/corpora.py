"""Corpora: text files, standard input, AG News CSV files, and three corpora that need no file; and the split for
validation.

A corpus is a str (one stream of text) or a list of str (documents, or lines). `load_corpus` says which source gives
which.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import sys
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from .news import write_news

__all__ = [
    "NAMED",
    "CorpusError",
    "as_documents",
    "load_corpus",
    "python_docs",
    "read_ag_news",
    "split",
    "unicode_names",
]

NAMED = ("unicode-names", "python-docs", "news")
_BOMS = {"utf-8": b"\xef\xbb\xbf", "utf-16": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


class CorpusError(ValueError):
    """A corpus cannot be read or is too small for what is asked."""


def load_corpus(source: str | Path, *, encoding: str = "utf-8", limit: int | None = None) -> str | list[str]:
    r"""The corpus of a source.

    - "unicode-names", "news": list of str (lines; documents). "python-docs": str.
    - a path that ends in .csv: AG News rows (class, title, description): list of str, one document each.
    - any other path, or "-" for standard input: str. \r\n and \r become \n; a byte order mark at the start is dropped.

    limit: first so many documents, or characters of a str. A file named like a named corpus is reached as "./news".
    Raises FileNotFoundError, CorpusError (not in the encoding, empty, not AG News).
    """
    if limit is not None and limit < 1:
        raise CorpusError(f"limit must be at least 1, got {limit}")
    corpus: str | list[str]
    if source == "news":
        return write_news(limit or 10_000)
    if source == "unicode-names":
        corpus = unicode_names()
    elif source == "python-docs":
        corpus = python_docs()
    elif str(source).lower().endswith(".csv"):
        corpus = [text for _, text in read_ag_news(source, encoding=encoding)]
    else:
        corpus = _read_text(source, encoding)
        if not corpus.strip():
            what = "holds white space only" if corpus else "is empty"
            raise CorpusError(f"{_name(source)} {what}; a corpus needs text to learn from")
    return corpus if limit is None else corpus[:limit]


def _name(source: str | Path) -> str:
    return "standard input" if source == "-" else str(source)


def _read_text(source: str | Path, encoding: str) -> str:
    """Decode a file, or say where and why it cannot be."""
    if source == "-":
        data = sys.stdin.buffer.read()
    else:
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError:
            known = ", ".join(NAMED)
            raise FileNotFoundError(f"there is no file {source}; a corpus is a path, '-', or one of {known}") from None
    try:
        text = data.decode(encoding)
    except LookupError:
        raise CorpusError(f"Python knows no encoding {encoding!r}; try utf-8, utf-16, latin-1 or cp1252") from None
    except UnicodeDecodeError as error:
        guess = next((name for name, bom in _BOMS.items() if data.startswith(bom)), "latin-1")
        guess = guess if guess != encoding else "latin-1"
        raise CorpusError(
            f"{_name(source)} is not {encoding}: byte {error.start} is 0x{data[error.start]:02X} ({error.reason}); "
            f"name its encoding, for example encoding={guess!r} (--encoding {guess}), or convert it: "
            f"iconv -f {guess.upper()} -t UTF-8"
        ) from None
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def read_ag_news(path: str | Path, *, encoding: str = "utf-8") -> list[tuple[int, str]]:
    """Rows of a CSV file in the form of AG News: class (1 to 4), title, description, each quoted; a header line is
    skipped.

    Returns (class, "title description") pairs, the text as torchtext made it. Raises CorpusError naming the row that
    does not fit.
    """
    rows = csv.reader(io.StringIO(_read_text(path, encoding), newline=""), strict=True)
    news: list[tuple[int, str]] = []
    try:
        for i, row in enumerate(rows):
            if not row or (i == 0 and len(row) == 3 and not row[0].strip().isdigit()):
                continue
            if len(row) != 3 or not row[0].strip().isdecimal():
                raise CorpusError(
                    f"{_name(path)}, line {rows.line_num}: AG News rows are class,title,description, class a number; "
                    f"got {len(row)} columns, first {row[0][:40]!r}; to read it as plain text, name the file .txt"
                )
            news.append((int(row[0]), f"{row[1]} {row[2]}"))
    except csv.Error as error:
        raise CorpusError(f"{_name(path)}, line {rows.line_num}: not CSV: {error}") from None
    if not news:
        raise CorpusError(f"{_name(path)} has no rows; AG News rows are class,title,description")
    return news


def unicode_names() -> list[str]:
    """The names of Unicode's characters, as this Python's `unicodedata` knows them, in the order of their code points.

    Left out: names that are computed (ideographs by code point, Hangul syllables) or that end in a running number of
    three digits or more (hieroglyphs by catalogue), for they have nothing to learn. Python 3.11: 28 863 names, 38
    characters.
    """
    names = []
    # Planes 4 to 13 hold no characters and 15 and 16 are for private use, so they have no names.
    for code in chain(range(0x40000), range(0xE0000, 0xF0000)):
        name = unicodedata.name(chr(code), "")
        computed = name.endswith(f"-{code:04X}") or name.startswith("HANGUL SYLLABLE ")
        if name and not computed and not re.search(r"\d{3}", name):
            names.append(name)
    return names


def python_docs() -> str:
    """The language reference that `help()` shows (`pydoc_data.topics`): about 465 000 characters of prose in Python
    3.11."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(
            "this Python came without pydoc_data.topics, which 'python-docs' is made of; install Python's full "
            "standard library or name another corpus, such as 'unicode-names'"
        ) from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def as_documents(corpus: str | Sequence[str]) -> list[str]:
    """The lines of a str that are not blank, without their line ends; a list as it is."""
    return [line for line in corpus.split("\n") if line.strip()] if isinstance(corpus, str) else list(corpus)


def split(
    corpus: str | Sequence[str], fraction: float = 0.1, *, seed: int = 0
) -> tuple[str | list[str], str | list[str]]:
    """(training, validation) parts of a corpus; `fraction` of the characters or documents is for validation, 0 for
    none.

    A str is cut by position: its end is for validation. Of documents, those with the smallest hash of (seed, text)
    are: the choice does not depend on their order, equal documents stay on one side, and both sides keep the order.
    Each side gets at least one character or document. Raises CorpusError when that cannot be.
    """
    if not 0 <= fraction < 1:
        raise CorpusError(f"the validation fraction must be from 0 to below 1, got {fraction}")
    if isinstance(corpus, str):
        count = _held_out(len(corpus), fraction, "characters")
        return corpus[: len(corpus) - count], corpus[len(corpus) - count :]
    key = int(seed).to_bytes(8, "little", signed=True)
    hashes = [
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest() for text in corpus
    ]
    distinct = sorted(set(hashes))
    chosen = set(distinct[: _held_out(len(distinct), fraction, "distinct documents")])
    train = [text for text, mark in zip(corpus, hashes, strict=True) if mark not in chosen]
    return train, [text for text, mark in zip(corpus, hashes, strict=True) if mark in chosen]


def _held_out(total: int, fraction: float, what: str) -> int:
    if fraction == 0:
        return 0
    if total < 2:
        raise CorpusError(f"a corpus of {total} {what} cannot be split; give more text or a validation fraction of 0")
    return min(max(1, round(total * fraction)), total - 1)
