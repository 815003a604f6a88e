"""From a corpus and a `TrainConfig` to what `train` takes: a tokenizer, and batches for training and for validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .config import TrainConfig
from .data import Batches, CorpusError, as_documents, batches, split
from .models import LanguageModel
from .network import NetworkConfig
from .text import Tokenizer, build_tokenizer


@dataclasses.dataclass
class Prepared:
    """A corpus made ready for `train`.

    Attributes:
        valid: None where ``valid_fraction`` is 0.
        chars_per_token: of the validation text (else of the training text), a line's end counted as one character where
            the tokens have one; what bits per character needs.
        start_token_id: the token before the first of each line, in batching "lines"; None elsewhere.
    """

    tokenizer: Tokenizer
    train: Batches
    valid: Batches | None
    chars_per_token: float
    start_token_id: int | None = None

    def model(self, **network: Any) -> LanguageModel:
        """A new model for these tokens; ``network`` holds the other fields of `NetworkConfig`."""
        model = LanguageModel(NetworkConfig(self.tokenizer.vocab_size, **network), self.tokenizer)
        model.generation_config.start_token_id = self.start_token_id
        return model


def default_batching(corpus: str | Sequence[str]) -> str:
    """ "stream" for one text; "lines" for a list of lines or documents."""
    return "stream" if isinstance(corpus, str) else "lines"


def prepare(
    corpus: str | Sequence[str],
    config: TrainConfig,
    *,
    tokenizer: Tokenizer | None = None,
    kind: str = "char",
    head: str = "all",
    **tokenizer_options: Any,
) -> Prepared:
    """Split, tokenize and batch ``corpus``.

    Args:
        corpus: one text, or a list of lines or documents, as `load_corpus` gives it.
        tokenizer: a ready one; otherwise one of ``kind`` is built from the whole corpus, so that the validation text
            has no piece unknown to it, with an end-of-sequence token where the corpus has lines or documents.
        head: the network's; "last" needs batches of windows, whose target is the one token after them.

    Raises:
        CorpusError: the text is too short for the batches, or for the split.
        ValueError: the batching does not fit the head.
        TokenizerError: ``tokenizer_options`` do not fit, or the text has pieces that ``tokenizer`` lacks.
    """
    if head == "last" and config.batching in ("stream", "lines"):
        raise ValueError(
            "a network with head='last' predicts one token a window, so it needs batching windows, random or document, "
            f"got {config.batching!r}"
        )
    if config.batching in ("lines", "document"):
        corpus = as_documents(corpus)
    if not corpus:
        raise CorpusError("the corpus is empty; training needs text to learn from")
    if tokenizer is None:
        specials = () if isinstance(corpus, str) else ("eos",)
        tokenizer = build_tokenizer(kind, corpus, specials=specials, **tokenizer_options)
    parts = split(corpus, config.valid_fraction, seed=config.seed)
    train = _batches(parts[0], tokenizer, config, head)
    valid = None
    if config.valid_fraction:
        try:
            valid = _batches(parts[1], tokenizer, config, head, validation=True)
        except CorpusError as problem:
            raise CorpusError(
                f"the validation part ({config.valid_fraction:g} of the corpus) is too small: {problem}; "
                "or choose another valid_fraction (0 = none)"
            ) from problem
    start = None
    if config.batching == "lines":
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return Prepared(tokenizer, train, valid, _chars_per_token(parts[1] or parts[0], tokenizer, config), start)


def _batches(
    corpus: str | Sequence[str], tokenizer: Tokenizer, config: TrainConfig, head: str, validation: bool = False
) -> Batches:
    """The batches of one part; those of the validation part come in one order and are at most as many rows as fit."""
    mode, steps, rows = config.batching, config.seq_len, config.batch_size
    if mode in ("lines", "document"):
        documents = [tokenizer.encode_array(text) for text in corpus]
        if mode == "document":
            return batches(mode, documents, steps=steps, max_rows=config.max_rows, target=head, seed=config.seed,
                           shuffle=not validation)  # fmt: skip
        eos = _eos(tokenizer)
        rows = min(rows, len(documents)) if validation else rows
        return batches(mode, documents, batch=rows, steps=steps, eos=eos, bos=tokenizer.bos_id, seed=config.seed,
                       shuffle=not validation)  # fmt: skip
    ids, starts = _joined(corpus, tokenizer)
    if mode == "stream":
        rows = max(1, min(rows, len(ids) // (steps + 1))) if validation else rows
        return batches(mode, ids, batch=rows, steps=steps, starts=starts, seed=config.seed)
    if mode == "windows":
        return batches(mode, ids, batch=rows, steps=steps, stride=config.stride, target=head, seed=config.seed)
    count = config.batches_per_epoch
    return batches(mode, ids, batch=rows, steps=steps, per_epoch=count, target=head, seed=config.seed)


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise ValueError("lines and documents end with an eos token, and this tokenizer has none: build it with one")
    return tokenizer.eos_id


def _joined(corpus: str | Sequence[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray | None]:
    """One sequence of ids, and for documents where each starts; each document ends with eos."""
    if isinstance(corpus, str):
        return tokenizer.encode_array(corpus), None
    parts = [np.append(tokenizer.encode_array(text), _eos(tokenizer)) for text in corpus]
    ends = np.cumsum([len(part) for part in parts])
    starts = np.zeros(int(ends[-1]), dtype=bool)
    starts[np.concatenate([[0], ends[:-1]])] = True
    return np.concatenate(parts), starts


def _chars_per_token(corpus: str | Sequence[str], tokenizer: Tokenizer, config: TrainConfig) -> float:
    if isinstance(corpus, str):
        return len(corpus) / len(tokenizer.encode_array(corpus))
    ends = 0 if config.batching == "document" else 1
    chars = sum(len(text) + ends for text in corpus)
    return chars / sum(len(tokenizer.encode_array(text)) + ends for text in corpus)
