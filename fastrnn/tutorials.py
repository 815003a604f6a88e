"""Five published text-generation tutorials, as data: what each trains on, with what, how it generates, and its traps.

`fastrnn.recipes` runs them. A tutorial has three modes: "quick" (a look in seconds; what is smaller is stated),
"default" (minutes on a laptop) and "as-written" (every number as its author printed it, however long that takes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from .config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Draw:
    """One text to generate: ``prompt`` is text or token ids; ``state`` replaces how the network remembers."""

    label: str
    prompt: str | tuple[int, ...]
    tokens: int
    temperature: float = 1.0  # 0 = greedy
    mode_of: int = 1
    state: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """One network to train and generate with.

    corpus       names for `load_corpus`, joined by newlines; ``text`` is used in their place where given
    limit        characters (or documents) of the corpus to train on; the vocabulary is that of all of it
    tokens       options of `build_tokenizer`;  network: fields of `NetworkConfig` but vocab_size
    initial      standard deviation of all initial weights, with zero biases (one trained a layer); None: torch's
    min_windows  documents with fewer windows are skipped
    epoch_valid  validate on the training set after each epoch
    changes      what differs from the tutorial, one sentence each
    """

    network: dict[str, Any]
    train: TrainConfig
    draws: tuple[Draw, ...]
    tokens: dict[str, Any]
    corpus: tuple[str, ...] = ("python-docs",)
    text: str | None = None
    label: str = ""
    limit: int | None = None
    initial: float | None = None
    min_windows: int = 1
    epoch_valid: bool = False
    changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tutorial:
    """A tutorial: its title, what it is, its traps with how each is handled, and its plans for a mode."""

    title: str
    about: str
    traps: tuple[str, ...]
    plans: Callable[[str], tuple[Plan, ...]]


def _train(**fields: Any) -> TrainConfig:
    """A run as the tutorials have it: torch's own Adam moments, no clipping, no validation unless asked for."""
    return TrainConfig(**{"clip": 0.0, "beta2": 0.999, "valid_fraction": 0.0, "eval_every": 0, **fields})


# 000


def _pytorch_lstm(mode: str) -> tuple[Plan, ...]:
    quick = mode == "quick"
    hidden, lr = (64, 0.01) if quick else (128, 0.003)
    length = {"quick": {"max_steps": 200}, "default": {"max_steps": 1500}, "as-written": {"max_epochs": 2}}[mode]
    limit = {"quick": "200 steps", "default": "1,500 steps", "as-written": "2 passes over all windows"}[mode]
    changes = (
        f"it gives no numbers, so these are ours: one-hot input, 2 layers of {hidden}, Adam at {lr}, batches of 64 "
        f"windows, {limit}",
        "it names no text, so this trains on Python's own documentation",
    )
    network = {"input": "onehot", "cell": "lstm", "hidden_size": hidden, "num_layers": 2, "head": "last"}

    def plan(label: str, steps: int, tokens: dict[str, Any], prompt: str, count: int) -> Plan:
        return Plan(
            label=label, network=network, tokens=tokens, changes=(*changes, f"{label} tokens, windows of {steps}"),
            train=_train(batching="windows", batch_size=64, seq_len=steps, lr=lr,
                         log_every=20 if quick else 100, **length),
            draws=tuple(Draw(f"T = {t}", prompt, count, t) for t in (0.5, 1.0)),
        )  # fmt: skip

    return (
        plan("character", 15 if quick else 40, {"kind": "char"}, "The ", 200),
        plan("word", 6 if quick else 12, {"kind": "word", "vocab_size": 2000, "lowercase": True}, "the", 40),
    )


# 001


def _theano(mode: str) -> tuple[Plan, ...]:
    steps = {"quick": 100, "default": 3000, "as-written": None}[mode]
    length = {"max_steps": steps} if steps else {"max_epochs": 100}
    changes = ("it names no text: Python's documentation and the names of Unicode's characters have 10,000 words",)
    if steps:
        changes += (f"{steps} steps in place of 100 epochs",)
    if mode == "quick":
        changes += ("trains on the first 200,000 characters",)

    def plan(optimizer: str) -> Plan:
        return Plan(
            label=optimizer, changes=changes, corpus=("python-docs", "unicode-names"), initial=0.01,
            limit=200_000 if mode == "quick" else None,
            network={"input": "onehot", "cell": "rnn_tanh", "hidden_size": 128, "head": "last"},
            tokens={"kind": "word", "vocab_size": 10_000, "lowercase": True},
            train=_train(batching="windows", batch_size=32, seq_len=4, lr=0.01, optimizer=optimizer,
                         log_every=20 if mode == "quick" else 200, **length),
            draws=(
                Draw("the whole seed [1, 2, 3, 4] is read", (1, 2, 3, 4), 20),
                Draw("as written: only the last id of the seed is read", (4,), 20),
            ),
        )  # fmt: skip

    return (plan("sgd"),) if mode == "as-written" else (plan("sgd"), plan("adam"))


# 002

# The prompt that the notebook continues, 184 characters.
SHAKESPEARE_PROMPT = """ROMEO:
Tut, I have lost myself; I am not here;
This is not Romeo, he's some other where.

BENVOLIO:
Tell me in sadness, who is that you love.

ROMEO:
What, shall I groan and tell thee?"""


def _shakespeare(mode: str) -> tuple[Plan, ...]:
    # layers, units, dropout, steps of a window, rows of a batch, learning rate, characters to generate
    layers, hidden, dropout, steps, batch, lr, count = {
        "quick": (4, 48, 0.225, 50, 64, 1e-3, 100),
        "default": (2, 128, 0.1, 40, 128, 3e-3, 1000),
        "as-written": (4, 256, 0.225, 100, 128, 1e-3, 1000),
    }[mode]
    length = {"quick": {"max_steps": 120}, "default": {"max_time": 240.0}, "as-written": {"max_epochs": 40}}[mode]
    changes = ("the text is Python's documentation unless you name one: --data shakespeare.txt",)
    if mode == "quick":
        changes += (
            "60,000 characters of it, 4 layers of 48 in place of 256, batches of 64 windows of 50 in place of 128 of "
            "100, 120 steps in place of 40 epochs, 100 characters in place of 1,000",
        )
    if mode == "default":
        changes += (
            "2 layers of 128 in place of 4 of 256, windows of 40 in place of 100, Adam at 0.003, dropout 0.1, and 4 "
            "minutes in place of 40 epochs: one core takes seconds for one step of the tutorial's network",
        )
    if mode != "as-written":
        changes += ("validates on the last 5 % of the text, which training does not see",)
    train = _train(batching="windows", batch_size=batch, seq_len=steps, lr=lr, reduction="sum",
                   valid_fraction=0.0 if mode == "as-written" else 0.05, eval_batches=0 if mode == "as-written" else 20,
                   log_every=12 if mode == "quick" else 100, **length)  # fmt: skip
    draw = Draw("window: the last 184 characters are run again for each new one, as written", SHAKESPEARE_PROMPT, count,
                1.1, mode_of=80)  # fmt: skip
    carried = dataclasses.replace(draw, label="carried: the state goes on from character to character", state="carried")
    return (
        Plan(
            network={"input": "scalar", "cell": "lstm", "hidden_size": hidden, "num_layers": layers, "dropout": dropout,
                     "head": "last", "state": "window", "window": len(SHAKESPEARE_PROMPT)},
            tokens={"kind": "char"}, train=train, draws=(draw, carried), changes=changes,
            limit=60_000 if mode == "quick" else None, epoch_valid=mode == "as-written",
        ),
    )  # fmt: skip


# 003


def _gru(mode: str) -> tuple[Plan, ...]:
    return (
        Plan(
            text="hello world hello world", tokens={"kind": "char"},
            network={"input": "embedding", "embedding_dim": 16, "cell": "gru", "hidden_size": 32},
            train=_train(batching="random", batch_size=1, seq_len=5, lr=0.01, max_steps=200, log_every=20),
            draws=(Draw("T = 1, as written", "hell", 40), Draw("greedy", "hell", 40, 0.0)),
            changes=("nothing is smaller: the whole of it takes seconds",),
        ),
    )  # fmt: skip


# 004


def _news(mode: str) -> tuple[Plan, ...]:
    steps = {"quick": 100, "default": 2000, "as-written": 9999}[mode]
    changes = (
        "the text is a built-in stand-in of 10,000 invented news items unless you name AG News: --data train.csv",
    )
    if mode != "as-written":
        changes += (f"{steps} documents in place of 10,000",)
    size = 100 if mode == "quick" else 300
    if mode == "quick":
        changes += ("100 characters in place of 300 at each temperature",)
    soft = (Draw(f"Temperature = {t}", "Today ", size, t) for t in (0.3, 0.8, 1.0, 1.3, 1.8))
    return (
        Plan(
            corpus=("news",), tokens={"kind": "char", "order": "first-seen"}, min_windows=10, changes=changes,
            network={"input": "onehot", "cell": "lstm", "hidden_size": 64},
            train=_train(batching="document", seq_len=100, lr=0.01, max_steps=steps,
                         log_every=10 if mode == "quick" else 100, sample_every=0 if mode == "quick" else 1000,
                         sample_tokens=100, sample_temperature=0.0),
            draws=(Draw("greedy", "today ", 100, 0.0), *soft), limit=2 * steps if mode == "quick" else None,
        ),
    )  # fmt: skip


TUTORIALS = {
    "000": Tutorial(
        "Text generation with PyTorch (techblog, 2023)",
        "LSTMModel(input, hidden, layers, out): next token from the last step of a window, zero initial state",
        (
            "`device` is not defined there; here the state is made where the weights are",
            "it has no loop for training or generation; here are both, with its temperature",
        ),
        _pytorch_lstm,
    ),
    "001": Tutorial(
        "[python] Theano for text generation (2023)",
        "tanh RNN of 128 on one-hot words, V = 10,000, weights from N(0, 0.01), zero biases, batches of 32, lr 0.01",
        (
            "its text says LSTM and Adam, its code is a tanh RNN and plain SGD: as written is the code; the other "
            "modes train with SGD and with Adam",
            "`order`, the words that predict the next, is not defined: 4, the length of its seed",
            "its loop over `inputs` takes the rows of a batch for time steps; here rows are rows and steps are steps",
            "generation reads only the last id of the seed; here both ways are shown",
            "the product of a one-hot vector and a matrix of 10,000 columns is a gather of columns here: equal numbers",
            "torch's RNN has two biases where it has one: the second stays zero and does not train",
        ),
        _theano,
    ),
    "002": Tutorial(
        "LSTM Based Text Generation using PyTorch (notebook on Shakespeare)",
        "LSTM 4 x 256 on the number id/V, dropout 0.225, last step, all windows of 100, summed cross-entropy, Adam",
        (
            "`best_model = model.state_dict()` is an alias of the live weights, so it saves the last ones; here the "
            "best weights are copied",
            "its validation set is its training set: as written keeps that, the other modes hold text out",
            "it trains on windows of 100 but generates with a window as long as its prompt, 184, run again for each "
            "character: done exactly, and the carried state, which is another model of the text, is shown beside it",
            "it asks the GPU for 80 draws one by one; the mode of 80 draws at T = 1.1 is one call here",
            "its checkpoint `[state_dict, s2i]` is read by `LanguageModel.from_tutorial_002` and written with -o DIR",
        ),
        _shakespeare,
    ),
    "003": Tutorial(
        "4.6.4 Code Example: Generating Text with GRU",
        "embedding 16, GRU 32 on 'hello world hello world': 200 windows of 5 at random, one a step, Adam at 0.01",
        (
            "generation has no torch.no_grad(), so its graph grows with the text; here it has no graph",
            "no seed is set there; here the same --seed gives the same text",
            "the first characters of a window are ambiguous (l can precede l, o or d), so the loss cannot reach 0: no "
            "model has a mean below 0.101 nats on these windows",
        ),
        _gru,
    ),
    "004": Tutorial(
        "Generative networks (AG News, PyTorch)",
        "one-hot LSTM of 64; all windows of 100 of one document are one batch, Adam at 0.01; greedy, then temperatures",
        (
            "torchtext is archived: AG News is read from its CSV (class,title,description), text = title + ' ' + "
            "description",
            "`exp(logits / T)` overflows at a low temperature; here the draw is exact at any temperature",
            "its loop counts to 10,000 and stops before the last, so as written it trains on 9,999 documents; those "
            "with fewer than 110 characters are skipped, as there",
        ),
        _news,
    ),
}
