"""Which kind of tokenizer a tokenizer.json is, judged by its parts, and the parts of the word kind."""
from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Regex, decoders, pre_tokenizers

from .textstream import WordStream, byte_symbols

WORD_PATTERN = r"\w+(?:[-'’]\w+)*|[^\w\s]|\n"


def kind_of(spec: dict[str, Any]) -> str:
    """Which of the kinds of `text` a parsed tokenizer.json is, judged by its parts; "other" for anything that they do
    not describe in full."""
    model, pre, decoder = spec["model"], spec.get("pre_tokenizer") or {}, spec.get("decoder") or {}
    normal = spec.get("normalizer")
    odd_added = any(t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"] for t in spec["added_tokens"])
    odd_post = (spec.get("post_processor") or {"type": "ByteLevel"})["type"] != "ByteLevel"
    if (
        odd_added
        or odd_post
        or spec.get("truncation")
        or spec.get("padding")
        or normal not in (None, {"type": "Lowercase"})
    ):
        return "other"
    added = {t["content"] for t in spec["added_tokens"]}
    if model["type"] == "BPE":
        if any(
            model.get(k)
            for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
        ):
            return "other"
        if pre.get("type") == "ByteLevel" == decoder.get("type") and not pre["add_prefix_space"]:
            if not set(byte_symbols()) <= set(model["vocab"]):
                return "other"
            return "bpe" if pre["use_regex"] else "other" if model["merges"] else "byte"
        one_char = all(len(p) == 1 for p in model["vocab"] if p not in added)
        return "char" if one_char and not pre and not model["merges"] and decoder == {"type": "Fuse"} else "other"
    if model["type"] == "WordLevel" and pre.get("type") == "Split" and "Regex" in pre["pattern"]:
        if pre == _as_json(word_split()) and decoder == _as_json(word_decoder()):
            return "word"
        if pre["behavior"] == "Isolated" and not pre["invert"] and decoder == {"type": "Fuse"}:
            return "regex"
    return "other"


def _as_json(part: Any) -> Any:
    return json.loads(part.__getstate__())


def word_split() -> Any:
    return pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True)


def word_decoder() -> Any:
    """Spaces between pieces, but none around a newline, before closing or after opening punctuation (`WordStream` has
    the same rules). The prefix is one that no piece can have, so that every piece but the first gets its space."""
    return decoders.Sequence(
        [
            decoders.WordPiece(prefix=" ", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
            decoders.Replace(Regex(rf" (?=[{re.escape(WordStream.CLOSING)}])"), ""),
            decoders.Replace(Regex(rf"(?<=[{re.escape(WordStream.OPENING)}]) "), ""),
        ]
    )
