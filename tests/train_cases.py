"""What the tests of training share: a small model with its data and settings."""

import torch

from fastrnn.config import TrainConfig
from fastrnn.metrics import read_metrics
from fastrnn.prepare import prepare
from fastrnn.train import train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 40
LINES = [
    f"{first} {second}" for first in "red green blue pale dark".split() for second in "fox hen cow dog".split()
] * 8

SMALL = {"batch_size": 4, "seq_len": 8, "max_steps": 10, "eval_every": 5, "log_every": 2, "eval_batches": 3, "lr": 0.01}


def make(corpus=TEXT, network=None, **changes):
    """A small model, its data and its settings."""
    config = TrainConfig(**{**SMALL, **changes})
    network = {"hidden_size": 12, "embedding_dim": 6, **(network or {})}
    prepared = prepare(corpus, config, head=network.get("head", "all"))
    torch.manual_seed(config.seed)
    return prepared.model(**network), prepared, config


def run(model, prepared, config, **options):
    options = {"valid": prepared.valid, "chars_per_token": prepared.chars_per_token, **options}
    return train(model, prepared.train, config, **options)


def timeless(path):
    """The records of a metrics file without what a clock has measured."""
    return [{k: v for k, v in r.items() if k not in ("tok_per_s", "elapsed")} for r in read_metrics(path)]
