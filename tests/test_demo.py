"""The demo: it trains, writes, checks and races; and its check fails when what it checks is wrong."""

import argparse
import math

import pytest
import torch

from fastrnn import demo
from fastrnn.config import TrainConfig
from fastrnn.models import LanguageModel
from fastrnn.prepare import prepare
from fastrnn.train import METRICS, read_metrics


def test_quick(tmp_path, capsys):
    """Everything the full demo does, at a size of seconds."""
    assert demo.run(argparse.Namespace(quick=True, out=str(tmp_path), seed=0)) == 0
    out = capsys.readouterr().out
    losses = [record["nll"] for record in read_metrics(tmp_path / METRICS) if record["event"] in ("train", "valid")]
    assert losses[-1] < 0.9 * math.log(39), "it has learned more than how many symbols there are"
    names = (tmp_path / demo.NAMES).read_text().splitlines()
    assert len(names) == 200
    assert len(set(names)) > 150
    for text in (
        "bits/char on names it has not seen",
        "wrote 200 names",
        "tokens are those of nn.GRU",
        "times as fast",
    ):
        assert text in out
    assert LanguageModel.from_pretrained(tmp_path).generate("CAT", max_new_tokens=3, seed=1).token_ids


@pytest.fixture(scope="module")
def generated():
    """A small model of lines, and names that it has written."""
    lines = [f"{a} {b}" for a in "RED GREEN BLUE".split() for b in "FOX HEN COW DOG".split()]
    prepared = prepare(lines, TrainConfig(batching="lines", batch_size=2, valid_fraction=0.2, max_steps=1))
    torch.manual_seed(1)
    model = prepared.model(cell="gru", hidden_size=24, embedding_dim=8).eval()
    return model, model.generate("", num_return_sequences=20, max_new_tokens=30, seed=7)


def test_the_check_passes_what_is_right(generated):
    model, outputs = generated
    drawn, difference = demo.check(model, demo.PlainModel(model), outputs, 7)
    assert drawn == sum(len(output.token_ids) for output in outputs)
    assert 0 <= difference < 1e-4


def test_the_check_finds_wrong_tokens_seeds_and_weights(generated):
    model, outputs = generated
    plain = demo.PlainModel(model)
    with pytest.raises(demo.DemoError, match=r"tokens are not those of nn\.GRU"):
        demo.check(model, plain, outputs, 8)
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    try:
        with pytest.raises(demo.DemoError, match=r"logits differ by [0-9.]+e-0[34] from float64"):
            demo.check(model, plain, outputs, 7)
    finally:
        with torch.no_grad():
            model.head.bias[0] -= 1e-3


def test_the_race_counts_names(generated):
    model, _ = generated
    scale = demo.Scale(steps=1, train_time=1, names=1, slices=1, batch=4, checked=1, raced=8)
    assert demo.race(demo.PlainModel(model), scale, model, 1) > 0
