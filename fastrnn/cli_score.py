"""``fastrnn score``: how probable a model finds a text."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .cli import UsageError


def run(options: argparse.Namespace) -> int:
    """Print nll (nats), perplexity and bits per character of a text, or of each line and of all."""
    from .data import load_corpus
    from .devices import set_up
    from .models import LanguageModel

    model = LanguageModel.from_pretrained(options.model, device=set_up(options.device, options.threads))
    if model.tokenizer is None:
        raise UsageError(f"{options.model} has no tokenizer, so it cannot read text")
    corpus = load_corpus(options.file)
    by_line = model.generation_config.start_token_id is not None and model.tokenizer.id("\n") is None
    by_line = by_line or options.lines  # a model of lines reads a text line by line
    if isinstance(corpus, list):
        texts = corpus
    else:
        texts = [line for line in corpus.split("\n") if line] if by_line else [corpus]
    scores = model.score(texts, unk=options.unk)
    total = _facts(scores.total)
    if options.lines:
        for text, score in zip(texts, scores, strict=True):
            facts = _facts(score)
            print(
                json.dumps({"text": text, **facts}, ensure_ascii=False) if options.json else f"{_words(facts)}\t{text}"
            )
    if options.json:
        print(json.dumps({"total": total} if options.lines else total))
    else:
        print(_words(total) + ("\t(all)" if options.lines else ""))
    return 0


def _facts(score: Any) -> dict[str, Any]:
    return {
        "nll": score.nll, "perplexity": score.perplexity, "bits_per_char": score.bits_per_char, "tokens": score.tokens,
        "chars": score.chars,
    }  # fmt: skip


def _words(facts: dict[str, Any]) -> str:
    return (f"nll {facts['nll']:.3f}  perplexity {facts['perplexity']:.3f}  bits/char {facts['bits_per_char']:.4f}  "
            f"tokens {facts['tokens']}  chars {facts['chars']}")  # fmt: skip
