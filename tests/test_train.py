"""Training: what the options mean, that it learns, and when it ends."""

import math

import pytest
import torch
from train_cases import LINES, TEXT, make, run

from fastrnn.checkpoint import load_checkpoint
from fastrnn.config import TrainConfig, parse_duration
from fastrnn.data import CorpusError
from fastrnn.metrics import read_metrics
from fastrnn.train import CHECKPOINT, METRICS, TrainingError, evaluate
from fastrnn.trainer import make_optimizer

# --- learning ---


@pytest.mark.parametrize("batching", ["stream", "windows", "random", "document", "lines"])
def test_the_loss_falls(batching):
    documents = [TEXT[:200] + str(number) for number in range(20)]
    corpus = {"lines": LINES, "document": documents}.get(batching, TEXT)
    options = {"stride": 3} if batching == "windows" else {"max_rows": 8} if batching == "document" else {}
    records = []
    model, prepared, config = make(corpus, batching=batching, max_steps=60, lr=0.02, log_every=5, **options)
    result = run(model, prepared, config, on_event=lambda record: records.append(record) and None)
    losses = [record["nll"] for record in records if record["event"] == "train"]
    assert result.step == 60
    assert losses[-1] < 0.8 * losses[0]


def test_a_network_that_predicts_the_last_step_only():
    model, prepared, config = make(network={"head": "last", "input": "scalar", "embedding_dim": None},
                                   batching="windows", stride=5, reduction="sum", max_steps=6)  # fmt: skip
    result = run(model, prepared, config)
    assert result.best["loss"] == pytest.approx(result.best["nll"] * result.best["tokens"])
    with pytest.raises(ValueError, match=r"head='last'.*windows, random or document"):
        make(network={"head": "last"}, batching="stream")


def test_one_update_is_that_of_torch():
    """One step of Adam with clipping, against the same written out with torch.nn."""
    model, prepared, config = make(max_steps=1, clip=0.05)
    batch = next(iter(prepared.train))
    prepared.train.position = 0
    emb = torch.nn.Embedding(*model.embedding.weight.shape)
    rnn = torch.nn.LSTM(6, 12, batch_first=True)
    head = torch.nn.Linear(12, model.config.vocab_size)
    parts = {"embedding": emb, "rnn": rnn, "head": head}
    for name, part in parts.items():
        part.load_state_dict(getattr(model, name).state_dict())
    weights = [w for part in parts.values() for w in part.parameters()]
    optimizer = torch.optim.Adam(weights, lr=config.lr, betas=(0.9, config.beta2))
    logits = head(rnn(emb(batch.inputs))[0])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(weights, config.clip)
    optimizer.step()
    run(model, prepared, config, valid=None)
    for name, part in parts.items():
        for key, weight in part.state_dict().items():
            torch.testing.assert_close(getattr(model, name).state_dict()[key], weight)


def test_sum_is_mean_times_the_tokens():
    """Without clipping, plain SGD on the sum is plain SGD on the mean with a rate larger by the number of tokens."""
    ends = []
    for reduction, lr in (("mean", 0.32), ("sum", 0.01)):
        model, prepared, config = make(optimizer="sgd", reduction=reduction, lr=lr, clip=0.0, max_steps=3)
        run(model, prepared, config, valid=None)
        ends.append(model.state_dict())
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name])


def test_optimizers():
    model, _, config = make(optimizer="sgd", momentum=0.9)
    assert make_optimizer(model, config).defaults["momentum"] == 0.9
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)):
        assert type(make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.1))) is kind


def test_schedules():
    constant = TrainConfig(lr=1.0, warmup_steps=4)
    assert [constant.lr_at(step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = TrainConfig(lr=1.0, min_lr=0.1, schedule="cosine")
    assert [cosine.lr_at(9, share) for share in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert TrainConfig(lr=1.0, schedule="linear").lr_at(9, 0.25) == 0.75
    step = TrainConfig(lr=1.0, schedule="step", decay_every=10, decay_factor=0.1, min_lr=0.05)
    assert [step.lr_at(at, 0.0) for at in (9, 10, 25)] == pytest.approx([1.0, 0.1, 0.05])
    assert TrainConfig(lr=1.0, schedule="plateau").lr_at(9, 0.0, scale=0.25) == 0.25


def test_plateau_decays_when_validation_stands_still():
    model, prepared, config = make(
        schedule="plateau", lr=1e-30, decay_patience=1, decay_factor=0.5, eval_every=1, log_every=1, max_steps=6
    )  # such a rate changes no weight, so every validation after the first is one without progress
    rates = []
    run(model, prepared, config, on_event=lambda r: rates.append(r["lr"]) if r["event"] == "train" else None)
    assert rates == pytest.approx([1e-30, 1e-30, 1e-30, 5e-31, 5e-31, 2.5e-31], rel=1e-9, abs=0)


def test_perplexity_and_bits_per_char():
    model, prepared, _ = make()
    record = evaluate(model, prepared.valid, chars_per_token=2.0)
    assert record["perplexity"] == pytest.approx(math.exp(record["nll"]))
    assert record["bits_per_char"] == pytest.approx(record["nll"] / math.log(2) / 2)
    assert record == evaluate(model, prepared.valid, chars_per_token=2.0), "validation starts from the beginning"
    assert prepared.chars_per_token == 1.0


def test_validation_is_that_of_one_long_run():
    """Carried from batch to batch, validation in pieces of 8 steps is validation in one piece."""
    model, prepared, _ = make()
    rows = next(iter(prepared.valid)).inputs.shape[0]
    prepared.valid.position = 0
    inputs, targets = (torch.cat([getattr(b, name) for b in prepared.valid], 1) for name in ("inputs", "targets"))
    with torch.no_grad():
        logits, _ = model.eval()(inputs)
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert rows > 1
    assert evaluate(model, prepared.valid)["nll"] == pytest.approx(float(whole), rel=1e-6)


# --- ends ---


def test_early_stop_and_the_best_weights_are_copies():
    """With a rate that wrecks the weights, the best are those of the first validation, not an alias of the last."""
    seen = {}
    model, prepared, config = make(lr=1e-4, eval_every=1, patience=3, max_steps=200, log_every=1)

    def wreck(record):
        if record["event"] == "valid" and record["best"]:
            seen.clear()
            seen.update({name: weight.clone() for name, weight in model.state_dict().items()})
        if record["step"] >= 4:
            for weight in model.parameters():
                weight.data.mul_(1.5)

    result = run(model, prepared, config, on_event=wreck)
    assert result.reason == "early stop"
    assert result.step < 200
    assert result.best["step"] <= result.step - 3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, seen[name]), f"{name} is not the best"
    assert evaluate(model, prepared.valid, limit=3)["nll"] == result.best["nll"]


def test_time_budget():
    model, prepared, config = make(max_steps=None, max_time="0.3s", eval_every=0)
    result = run(model, prepared, config, valid=None)
    assert result.reason == "max_time"
    assert result.elapsed >= 0.3
    assert result.step > 1


def test_epochs():
    model, prepared, config = make(max_steps=None, max_epochs=2)
    result = run(model, prepared, config)
    assert (result.reason, result.step) == ("max_epochs", 2 * len(prepared.train))


def test_samples_while_training_change_nothing(tmp_path):
    ends = []
    for every in (0, 2):
        model, prepared, config = make(sample_every=every, sample_tokens=5, sample_prompt="the ")
        run(model, prepared, config, out=tmp_path / str(every))
        ends.append(model.state_dict())
    samples = [r for r in read_metrics(tmp_path / "2" / METRICS) if r["event"] == "sample"]
    assert len(samples) == 5
    assert all(len(record["text"]) == 5 for record in samples)
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


def test_a_loss_that_is_not_finite_stops(tmp_path):
    model, prepared, config = make(log_every=4)
    model.head.bias.data[0] = math.nan
    with pytest.raises(TrainingError, match=r"loss is nan at step 4: lower lr \(now 0.01\), or set clip"):
        run(model, prepared, config, out=tmp_path, valid=None)
    assert not (tmp_path / CHECKPOINT).exists()


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    model, prepared, config = make(save_every=2, log_every=4)

    def spoil(record):
        model.head.weight.data.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"weights are not finite at step 4: lower lr"):
        run(model, prepared, config, out=tmp_path, valid=None, on_event=spoil)
    tensors, state = load_checkpoint(tmp_path / CHECKPOINT)
    assert state["step"] == 2
    assert all(weight.isfinite().all() for weight in tensors.values() if weight.is_floating_point())


# --- wrong settings ---


@pytest.mark.parametrize(
    "field, value, text",
    [
        ("lr", 0.0, "lr must be above 0, got 0.0"),
        ("lr", math.nan, "lr must be above 0, got nan"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("seq_len", 2.5, "seq_len must be a whole number, got 2.5"),
        ("optimizer", "adma", "optimizer must be one of adam, adamw, sgd, got 'adma'"),
        ("valid_fraction", 1.0, "valid_fraction must be at least 0 and below 1"),
        ("min_lr", 1.0, "min_lr must be between 0 and lr"),
        ("max_time", "soon", "a duration is seconds or like 60s"),
        ("sample_temperature", -1.0, "sample_temperature must be at least 0"),
    ],
)
def test_wrong_settings(field, value, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**{field: value})


def test_wrong_names_and_missing_limits():
    with pytest.raises(ValueError, match="no such training option: learning_rate; the options are batching"):
        TrainConfig.from_dict({"learning_rate": 1})
    model, prepared, config = make(max_steps=None)
    with pytest.raises(ValueError, match="training has no end: set max_steps"):
        run(model, prepared, config)
    model, prepared, config = make(patience=2)
    with pytest.raises(ValueError, match="no validation data"):
        run(model, prepared, config, valid=None)


def test_durations():
    assert [parse_duration(text) for text in ("60", "60s", "1.5m", "2h", "1h30m", 5)] == [60, 60, 90, 7200, 5400, 5]
    for text in ("", "0s", "-1", "1d", "s", "1m1h"):
        with pytest.raises(ValueError, match="duration"):
            parse_duration(text)


@pytest.mark.parametrize("corpus", ["", [], "ab", ["a"]])
def test_a_corpus_that_is_too_small(corpus):
    with pytest.raises(CorpusError, match=r"empty|give more text|smaller batch|too small"):
        make(corpus, batching="stream" if isinstance(corpus, str) else "lines")
