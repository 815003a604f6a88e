"""What the tests of the command line share: a small trained model, and a way to run a command in this process."""

import json
import os
import sys

import pytest
import torch

from fastrnn.__main__ import main
from fastrnn.config import TrainConfig
from fastrnn.prepare import prepare
from fastrnn.train import train

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs.\n" * 30
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
COMMAND = [sys.executable, "-m", "fastrnn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained model, its text and files of requests."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text(TEXT)
    config = TrainConfig(batch_size=4, seq_len=16, max_steps=40, lr=0.02, seed=3)
    prepared = prepare(TEXT, config)
    torch.manual_seed(3)
    model = prepared.model(hidden_size=16, embedding_dim=8)
    train(model, prepared.train, config, valid=prepared.valid, out=place / "model")
    return place


@pytest.fixture
def model(folder):
    return str(folder / "model")


def fastrnn(capsys, *arguments):
    """Run a command in this process: (exit code, stdout, stderr)."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
