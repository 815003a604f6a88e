"""Small language models with text in, for the tests of generation, scores and files."""

import torch

from fastrnn.models import LanguageModel
from fastrnn.network import NetworkConfig
from fastrnn.results import Generation
from fastrnn.text import build_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog.\nTHE END!"


def make(kind: str = "char", specials: tuple[str, ...] = (), corpus: str = TEXT, **options) -> LanguageModel:
    tokenizer = build_tokenizer(kind, corpus, specials=specials)
    torch.manual_seed(2)
    config = NetworkConfig(tokenizer.vocab_size, **{"hidden_size": 12, "embedding_dim": 5, "cell": "gru", **options})
    model = LanguageModel(config, tokenizer).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model


def outcome(result: Generation) -> tuple:
    return result.text, result.token_ids, result.logprobs, result.finish_reason
