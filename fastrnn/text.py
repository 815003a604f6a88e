"""Tokenizers: text to token ids and back, each of them a standard Hugging Face ``tokenizer.json``.

Five kinds, all built here and all readable by ``tokenizers.Tokenizer.from_file``, which gives the same ids:

========  =====================================================================  ======================
kind      one piece is                                                           decode(encode(text))
========  =====================================================================  ======================
``char``  one Unicode code point                                                 the text, exactly
``byte``  one byte of the UTF-8 form; never an unknown piece; id = byte          the text, exactly
``word``  a word, one punctuation mark, or a newline; other space is dropped     the text, spaces made regular
``regex`` one match of the user's pattern, or what lies between two matches      the text, exactly
``bpe``   byte-level byte-pair encoding (Sennrich 2016; GPT-2's pre-tokenizer)   the text, exactly
========  =====================================================================  ======================

Any other ``tokenizer.json`` loads too (kind ``other``) and then runs through the ``tokenizers`` library alone. The
first five kinds have faster paths of our own, tested equal to the library. Specials (``<unk> <bos> <eos> <pad>``)
follow the ordinary pieces, so that the id of a character is its rank. As in every ``tokenizer.json``, the literal text
of a special is encoded as that special. This module never imports torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from .textkinds import word_decoder, word_split
from .textstream import byte_symbols
from .tokenizer import ROLES, Tokenizer, TokenizerError, UnknownTextError, check_text

__all__ = ["KINDS", "Tokenizer", "TokenizerError", "UnknownTextError", "build_tokenizer", "from_vocabulary"]

KINDS = ("char", "byte", "word", "regex", "bpe")


def build_tokenizer(
    kind: str,
    corpus: str | Iterable[str],
    *,
    vocab_size: int | None = None,
    min_count: int = 1,
    lowercase: bool = False,
    pattern: str | None = None,
    specials: Sequence[str] = (),
    order: str | None = None,
) -> Tokenizer:
    """Build the vocabulary of a text, or of a list of documents; the same input gives the same ids on every machine.

    vocab_size: most pieces, specials included (the most frequent stay; bpe: the size to reach). min_count: pieces seen
    less often are left out (bpe: pairs). Where a limit leaves pieces out, an unk piece is added. specials: "unk",
    "bos", "eos", "pad" or their literal text, such as "<|endoftext|>"; they get the last ids. order of the ids:
    "codepoint" (char's default), "first-seen", "frequency" (word's and regex's default; ties by code point). pattern:
    the Oniguruma pattern of kind "regex". Raises TokenizerError.
    """
    specials = [ROLES[s][0] if s in ROLES else s for s in specials]
    _check_build(kind, vocab_size, min_count, pattern, order)
    documents = [corpus] if isinstance(corpus, str) else list(corpus)
    for document in documents:
        check_text(document)
    normalizer = normalizers.Lowercase() if lowercase else None
    if kind == "byte":
        return from_vocabulary(byte_symbols(), "byte", specials=specials, lowercase=lowercase)
    if not any(documents):
        raise TokenizerError(f"a {kind} tokenizer needs text to learn its pieces from, and the corpus is empty")
    if kind == "bpe":
        return _train_bpe(documents, vocab_size or 1024, min_count, normalizer, specials)
    counts = _count(kind, documents, normalizer, pattern)
    if not counts:
        raise TokenizerError("the corpus has white space only, so there is no word to learn; use kind='char'")
    kept = [p for p in counts if counts[p] >= min_count]
    room = len(kept) if vocab_size is None else vocab_size - len(specials)
    if (len(kept) < len(counts) or room < len(kept)) and ROLES["unk"][0] not in specials:
        specials = [ROLES["unk"][0], *specials]
        room -= vocab_size is not None
    if room < 1 or not kept:
        raise TokenizerError(
            f"vocab_size={vocab_size}, min_count={min_count} and the specials {specials} leave room for no piece; "
            "raise vocab_size or lower min_count"
        )
    kept = sorted(kept, key=lambda p: (-counts[p], p))[:room]
    order = order or ("codepoint" if kind == "char" else "frequency")
    if order == "codepoint":
        kept.sort()
    elif order == "first-seen":
        chosen = set(kept)
        kept = [p for p in counts if p in chosen]
    return from_vocabulary(kept, kind, specials=specials, pattern=pattern, lowercase=lowercase)


def from_vocabulary(
    vocabulary: Mapping[str, int] | Sequence[str],
    kind: str = "char",
    *,
    unk: str | None = None,
    specials: Sequence[str] = (),
    pattern: str | None = None,
    lowercase: bool = False,
) -> Tokenizer:
    """A char, byte, word or regex tokenizer with the given pieces: a list in the order of the ids or a mapping piece
    -> id (such as `s2i` of the Shakespeare notebook's checkpoint). Specials that it lacks follow at the end. unk: the
    piece or special for unknown text ("<unk>" is taken where it is one). Raises TokenizerError naming the piece that
    does not fit.
    """
    if kind not in KINDS or kind == "bpe":
        raise TokenizerError(f"a vocabulary makes a tokenizer of kind 'char', 'byte', 'word' or 'regex', got {kind!r}")
    specials = [ROLES[s][0] if s in ROLES else s for s in specials]
    vocab = _checked_vocabulary(vocabulary, kind, specials)
    unk = unk or next((u for u in ROLES["unk"] if u in specials), None)
    if unk is not None and unk not in vocab:
        raise TokenizerError(f"the unk piece {unk!r} is neither in the vocabulary nor a special")
    if kind == "byte":
        backend = Backend(models.BPE(vocab={p: i for p, i in vocab.items() if p not in specials}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    elif kind == "char":
        backend = Backend(
            models.BPE(vocab=vocab, merges=[], unk_token=unk) if unk else models.BPE(vocab=vocab, merges=[])
        )
        backend.decoder = decoders.Fuse()
    else:
        # WordLevel refuses unknown text when its unk_token is not in the vocabulary; no piece has this one's space.
        backend = Backend(models.WordLevel(vocab=vocab, unk_token=unk or " unk"))
        backend.pre_tokenizer = word_split() if kind == "word" else _regex_split(pattern)
        backend.decoder = word_decoder() if kind == "word" else decoders.Fuse()
    return _finish(backend, normalizers.Lowercase() if lowercase else None, specials)


def _checked_vocabulary(
    vocabulary: Mapping[str, int] | Sequence[str], kind: str, specials: list[str]
) -> dict[str, int]:
    """piece -> id with the specials added; every id from 0 on used once and every piece one that the kind can
    produce."""
    if isinstance(vocabulary, Mapping):
        vocab = {p: int(i) for p, i in vocabulary.items()}
    else:
        vocab = {p: i for i, p in enumerate(vocabulary)}
        if len(vocab) != len(vocabulary):
            twice = next(p for p, n in Counter(vocabulary).items() if n > 1)
            raise TokenizerError(f"the vocabulary lists {twice!r} twice; each piece has one id")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise TokenizerError(f"the ids of a vocabulary of {len(vocab)} pieces must be 0 to {len(vocab) - 1}, each once")
    for special in specials:
        check_text(special)
        if not special or special.split() != [special]:
            raise TokenizerError(f"a special must be text without white space, got {special!r}")
        if special not in vocab:
            vocab[special] = len(vocab)
        elif len(special) == 1:
            raise TokenizerError(
                f"{special!r} is an ordinary piece of this vocabulary; a special needs text of its own, such as '<eos>'"
            )
    words = word_split()
    for piece in vocab:
        check_text(piece)
        bad_word = kind == "word" and [word for word, _ in words.pre_tokenize_str(piece)] != [piece]
        if piece not in specials and (not piece or bad_word or (kind in ("char", "byte") and len(piece) != 1)):
            raise TokenizerError(
                f"{piece!r} cannot be a piece of a {kind} tokenizer; leave it out, name it in specials, "
                "or choose another kind"
            )
    if kind == "byte" and set(vocab) - set(specials) != set(byte_symbols()):
        raise TokenizerError("a byte vocabulary has the 256 byte symbols of byte-level BPE and specials, nothing else")
    return vocab


def _check_build(kind: str, vocab_size: int | None, min_count: int, pattern: str | None, order: str | None) -> None:
    if kind not in KINDS:
        raise TokenizerError(f"the kind of a tokenizer is one of {', '.join(KINDS)}, got {kind!r}")
    if (kind == "regex") != (pattern is not None):
        raise TokenizerError("kind 'regex' needs pattern=, for example r' ?\\w+|\\s'; no other kind takes one")
    if order not in (None, "codepoint", "first-seen", "frequency"):
        raise TokenizerError(f"order must be 'codepoint', 'first-seen' or 'frequency', got {order!r}")
    if order is not None and kind in ("byte", "bpe"):
        raise TokenizerError(f"the ids of a {kind} tokenizer have an order of their own; leave order out")
    if vocab_size is not None and (kind == "byte" or vocab_size < 1):
        raise TokenizerError(
            "kind 'byte' has 256 pieces and takes no vocab_size"
            if kind == "byte"
            else f"vocab_size must be at least 1, got {vocab_size}"
        )
    if min_count < 1:
        raise TokenizerError(f"min_count must be at least 1, got {min_count}")


def _regex_split(pattern: str | None) -> pre_tokenizers.PreTokenizer:
    if not pattern:
        raise TokenizerError("kind 'regex' needs pattern=, for example r' ?\\w+|\\s'")
    if not pattern.isascii() and not pattern.isprintable():
        raise TokenizerError(f"the pattern {pattern!r} has characters that do not print; write them as escapes")
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _count(
    kind: str, documents: list[str], normalizer: normalizers.Normalizer | None, pattern: str | None
) -> Counter[str]:
    """Pieces of the documents with their counts, in the order of first appearance."""
    if normalizer is not None:
        documents = [normalizer.normalize_str(d) for d in documents]
    counts: Counter[str] = Counter()
    split = None if kind == "char" else word_split() if kind == "word" else _regex_split(pattern)
    for document in documents:
        counts.update(document if split is None else (p for p, _ in split.pre_tokenize_str(document)))
    return counts


def _train_bpe(
    documents: list[str],
    vocab_size: int,
    min_count: int,
    normalizer: normalizers.Normalizer | None,
    specials: list[str],
) -> Tokenizer:
    if vocab_size < 256 + len(specials):
        raise TokenizerError(
            f"byte-level BPE starts from 256 bytes, so with {len(specials)} specials vocab_size must be at least "
            f"{256 + len(specials)}, got {vocab_size}"
        )
    backend = Backend(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        min_frequency=max(2, min_count),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(documents, trainer)
    return _finish(backend, normalizer, specials)


def _finish(backend: Backend, normalizer: normalizers.Normalizer | None, specials: Sequence[str]) -> Tokenizer:
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return Tokenizer(backend)
