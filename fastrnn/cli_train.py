"""``fastrnn train``: options, a config file and a checkpoint become one run; its records become lines on the screen."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from .cli import UsageError
from .config import TrainConfig

NETWORK = ("input", "embedding_dim", "cell", "hidden_size", "num_layers", "dropout", "head", "state", "window",
           "tie_weights")  # fmt: skip
TOKENIZER = ("tokens", "vocab_size", "min_count", "pattern", "lowercase")
CORPUS = ("encoding", "limit")
TRAINING = tuple(field.name for field in dataclasses.fields(TrainConfig))


def run(options: argparse.Namespace) -> int:
    """Train as the options say; 0, or 128 + the signal that ended the run."""
    given = _given(options)
    if options.out is None:
        raise UsageError("-o DIR is needed: the folder for the model and its checkpoint")
    if options.file is None and not options.resume:
        raise UsageError("FILE is needed: a text file, '-', unicode-names, python-docs or news")
    from .devices import set_up

    device = set_up(options.device, options.threads)
    start = _resumed if options.resume else _fresh
    model, prepared, config, extra = start(options, given)
    return _train(options, model.to(device), prepared, config, extra)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that the config file and then the command line set, by name."""
    known = {*NETWORK, *TOKENIZER, *CORPUS, *TRAINING}
    values: dict[str, Any] = {}
    if options.config:
        values = _read_toml(options.config)
        if unknown := sorted(set(values) - known):
            raise UsageError(f"{options.config}: no such option: {', '.join(unknown)}; see `fastrnn train --help`")
    return {**values, **{name: value for name, value in vars(options).items() if name in known}}


def _read_toml(path: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise UsageError("--config needs Python 3.11 or newer, whose standard library reads TOML; "
                         "give the options on the command line instead") from None  # fmt: skip
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path} is not TOML: {problem}") from problem
    if tables := [name for name, value in values.items() if isinstance(value, dict)]:
        raise UsageError(f"{path}: options stand by name at the top, without the table [{tables[0]}]")
    return values


def _config(values: dict[str, Any]) -> TrainConfig:
    chosen = {name: value for name, value in values.items() if name in TRAINING}
    try:
        return TrainConfig.from_dict(chosen)
    except (ValueError, TypeError) as problem:
        raise UsageError(str(problem)) from problem


def _fresh(options: argparse.Namespace, given: dict[str, Any]) -> tuple[Any, Any, TrainConfig, dict[str, Any]]:
    """A new network and its data."""
    import torch

    from .data import load_corpus
    from .prepare import default_batching, prepare
    from .train import CHECKPOINT

    if (Path(options.out) / CHECKPOINT).exists() and not options.overwrite:
        raise UsageError(f"{options.out} holds a run: continue it with --resume, replace it with --overwrite, "
                         "or choose another folder")  # fmt: skip
    corpus_options = {name: given[name] for name in CORPUS if name in given}
    corpus = load_corpus(options.file, **corpus_options)
    given.setdefault("batching", default_batching(corpus) if given.get("head", "all") == "all" else "windows")
    if not any(given.get(name) for name in ("max_steps", "max_epochs", "max_time", "patience")):
        given["max_epochs"] = 10
    config = _config(given)
    network = {name: given[name] for name in NETWORK if name in given}
    if network.get("state") == "window":
        network.setdefault("window", config.seq_len)
    tokenizer = {name: given[name] for name in TOKENIZER if name in given and name != "tokens"}
    prepared = prepare(corpus, config, kind=given.get("tokens", "char"), head=network.get("head", "all"), **tokenizer)
    torch.manual_seed(config.seed)
    return prepared.model(**network), prepared, config, {"source": options.file, **corpus_options}


def _resumed(options: argparse.Namespace, given: dict[str, Any]) -> tuple[Any, Any, TrainConfig, dict[str, Any]]:
    """The network and data of the checkpoint; options given now must be the same, limits apart."""
    from .checkpoint import read_state
    from .data import load_corpus
    from .prepare import prepare
    from .text import Tokenizer
    from .train import CHECKPOINT

    folder = Path(options.out)
    saved = read_state(folder / CHECKPOINT)
    network, extra = saved["network"], dict(saved["extra"])
    for name in (*NETWORK, *TOKENIZER, *CORPUS):
        before = {**network, **extra}.get(name)
        if name in given and name not in TOKENIZER and given[name] != before:
            raise UsageError(f"cannot resume with another --{name.replace('_', '-')}: it was {before!r}, "
                             f"now {given[name]!r}; drop it, or train into a new folder")  # fmt: skip
    config = _config({**saved["config"], **given})
    source = options.file if options.file is not None else extra.pop("source", None)
    if source is None:
        raise UsageError("FILE is needed: the checkpoint does not know where its text came from")
    extra.pop("source", None)
    corpus = load_corpus(source, **extra)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    prepared = prepare(corpus, config, tokenizer=tokenizer, head=network["head"])
    del network["vocab_size"]
    return prepared.model(**network), prepared, config, {"source": source, **extra}


def _train(options: argparse.Namespace, model: Any, prepared: Any, config: TrainConfig, extra: dict[str, Any]) -> int:
    from .train import METRICS, plot_losses, train

    weights = sum(weight.numel() for weight in model.parameters())
    _say(f"{weights:,} weights, {prepared.tokenizer.vocab_size} tokens; {len(prepared.train)} batches an epoch, "
         f"{config.batching}, {config.batch_size} x {config.seq_len}")  # fmt: skip
    with Progress(config) as progress:
        result = train(model, prepared.train, config, valid=prepared.valid, out=options.out, resume=options.resume,
                       on_event=progress.show, chars_per_token=prepared.chars_per_token, extra=extra)  # fmt: skip
    if options.plot:
        try:
            _say(f"losses drawn in {plot_losses(Path(options.out) / METRICS, options.plot)}")
        except ModuleNotFoundError:
            _say(f"no plot: matplotlib is not installed (`pip install matplotlib`); the numbers are in {METRICS}")
    if result.signal is not None:
        _say(f"interrupted at step {result.step}; a checkpoint is in {options.out}, --resume continues it")
        return 128 + result.signal
    best = f", best {describe(result.best)} at step {result.best['step']}" if result.best else ""
    _say(f"{result.reason} after {result.step} steps and {result.elapsed:.1f} s{best}; the model is in {options.out}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(record: dict[str, Any]) -> str:
    """A validation record in words."""
    char = f", {record['bits_per_char']:.3f} bits/char" if "bits_per_char" in record else ""
    return f"loss {record['loss']:.4f}, perplexity {record['perplexity']:.3f}{char}"


class Progress:
    """Shows the records of a run: samples on stdout; on stderr a bar with tokens/s and the time left, or plain lines
    where stderr is no terminal."""

    def __init__(self, config: TrainConfig) -> None:
        from tqdm import tqdm

        self.config, self.done = config, 0
        total = config.max_steps
        form = None if total else "{desc}: {n_fmt} steps [{elapsed}, {postfix}]"
        self.bar = tqdm(total=total, unit="step", desc="training", bar_format=form, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def show(self, record: dict[str, Any]) -> None:
        """Show one record; the callback of `train`."""
        if record["event"] == "train":
            self._advance(record)
        elif record["event"] == "valid":
            star = " *" if record["best"] else ""
            self._line(f"step {record['step']}: validation {describe(record)}{star}")
        elif record["event"] == "sample":
            with self.bar.external_write_mode(file=sys.stdout):
                print(record["prompt"] + record["text"], flush=True)

    def _advance(self, record: dict[str, Any]) -> None:
        speed = f"{record['tok_per_s']:,} tok/s"
        if self.bar.disable:
            self._line(
                f"step {record['step']}: loss {record['loss']:.4f}, lr {record['lr']:.2g}, {speed}{self._left(record)}"
            )
        self.bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}{self._left(record)}", refresh=False)
        self.bar.update(record["step"] - self.done)
        self.done = record["step"]

    def _left(self, record: dict[str, Any]) -> str:
        """The time left, as far as the limits tell."""
        config, left = self.config, []
        if config.max_time:
            left.append(config.max_time - record["elapsed"])
        if config.max_steps:
            left.append((config.max_steps - record["step"]) * record["elapsed"] / record["step"])
        return f", {max(min(left), 0):.0f} s left" if left else ""

    def _line(self, text: str) -> None:
        if self.bar.disable:
            _say(text)
        else:
            self.bar.write(text, file=sys.stderr)
