"""Run the tutorials of `fastrnn.tutorials`: train their networks with our layers, and generate as they do.

Everything a recipe says about itself goes to ``log`` (stderr), the texts that it generates to ``emit`` (stdout).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig
from .data import Batches, CorpusError, as_documents, batches, load_corpus, split
from .models import LanguageModel
from .network import NetworkConfig
from .text import Tokenizer, UnknownTextError, build_tokenizer
from .train import CHECKPOINT, TrainResult, train
from .tutorials import TUTORIALS, Draw, Plan

Say = Callable[[str], object]
Corpus = str | list[str]


@dataclasses.dataclass
class Outcome:
    """What one network of a recipe came to.

    losses     nats per token, one for every ``log_every`` steps: the means of those steps
    texts      label of a draw -> the whole text, prompt included;  token_ids: the new ids alone
    trained    how training ended, with its steps, targets and seconds
    """

    label: str
    model: LanguageModel
    losses: list[float]
    trained: TrainResult
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    token_ids: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    @property
    def first_loss(self) -> float:
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        return self.losses[-1]

    @property
    def tokens_per_second(self) -> float:
        return self.trained.tokens / max(self.trained.elapsed, 1e-9)


@dataclasses.dataclass
class Result:
    """A recipe's outcomes, one a network, and its seconds in all; ``signal`` is set where a signal ended it early."""

    name: str
    mode: str
    outcomes: list[Outcome]
    seconds: float
    signal: int | None = None


def run(
    name: str, *, quick: bool = False, as_written: bool = False, data: str | Path | None = None,
    out: str | os.PathLike[str] | None = None, seed: int = 0, device: str | torch.device = "cpu",
    log: Say | None = None, emit: Say | None = None,
) -> Result:  # fmt: skip
    """Run recipe ``name`` ("000" to "004"): train, then generate.

    Args:
        quick: seconds in place of minutes; what is smaller is said.  as_written: every number as the author has it.
        data: a corpus in place of the recipe's own, as `load_corpus` reads it; 004 takes AG News as a .csv file.
        out: a folder for the model, metrics.jsonl and samples.txt (a folder for each network where there are two; for
            002 also the notebook's own single-char.pth).
        log, emit: called with a line, or with a text; by default they print to stderr and to stdout.

    Raises:
        ValueError: no such recipe, or both modes at once.
        CorpusError, FileNotFoundError: ``data`` cannot be read or is too short.
    """
    if name not in TUTORIALS:
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(TUTORIALS)}")
    if quick and as_written:
        raise ValueError("quick and as_written exclude each other")
    log = log or functools.partial(print, file=sys.stderr, flush=True)
    emit = emit or functools.partial(print, flush=True)
    mode = "quick" if quick else "as-written" if as_written else "default"
    tutorial, start = TUTORIALS[name], time.monotonic()
    log(f"recipe {name}, {mode}: {tutorial.about}\nafter: {tutorial.title}")
    for trap in tutorial.traps:
        log(f"  trap: {trap}")
    plans = tutorial.plans(mode)
    result = Result(name, mode, [], 0.0)
    folders = [None if out is None else Path(out) / (plan.label if len(plans) > 1 else "") for plan in plans]
    if taken := [folder for folder in folders if folder and (folder / CHECKPOINT).exists()]:
        raise ValueError(f"{taken[0]} holds a run already; choose another folder or remove it")
    given = None if data is None else load_corpus(data)
    for plan, folder in zip(plans, folders, strict=True):
        outcome, prompts = _train(plan, given, folder, seed, torch.device(device), log)
        result.outcomes.append(outcome)
        if outcome.trained.signal is not None:
            result.signal = outcome.trained.signal
            break
        _generate(outcome, plan, prompts, seed, log, emit)
        if folder:
            _save_texts(outcome, folder, notebook=name == "002")
    result.seconds = time.monotonic() - start
    log(f"recipe {name}: {'interrupted' if result.signal else 'done'} after {result.seconds:.0f} s")
    return result


def _train(
    plan: Plan, given: Corpus | None, folder: Path | None, seed: int, device: torch.device, log: Say
) -> tuple[Outcome, list[list[int]]]:
    """Build the network of a plan and train it; also the prompts of its draws, which are checked before."""
    log(f"\n== {plan.label or 'training'}")
    for change in plan.changes:
        log(f"  differs: {change}")
    corpus = _corpus(plan, given)
    tokenizer = build_tokenizer(corpus=corpus, **plan.tokens)
    prompts = [_prompt(draw, tokenizer, corpus, log) for draw in plan.draws]
    config = dataclasses.replace(plan.train, seed=seed, sample_prompt=tokenizer.decode(prompts[0]))
    training, valid, config = _data(plan, corpus, tokenizer, config)
    torch.manual_seed(seed)
    model = LanguageModel(NetworkConfig(tokenizer.vocab_size, **plan.network), tokenizer)
    if plan.initial is not None:
        _set_initial(model, plan.initial)
    model.to(device)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    source = "its own text" if plan.text is not None else " and ".join(plan.corpus)
    source = source if given is None else "the text given"
    log(
        f"  V = {tokenizer.vocab_size} {plan.tokens['kind']} tokens of {source}; {weights:,} weights to train on "
        f"{device}; {len(training)} batches make an epoch"
    )
    outcome = Outcome(plan.label, model, [], TrainResult("", 0, 0, 0.0))

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "train":
            outcome.losses.append(event["nll"])
        if line := _line(event):
            log(line)

    trained = outcome.trained = train(model, training, config, valid=valid, out=folder, on_event=note)
    model.eval()
    losses = f", loss {outcome.first_loss:.3f} -> {outcome.last_loss:.3f} nats a token" if outcome.losses else ""
    log(f"  {trained.step} steps in {trained.elapsed:.1f} s, {outcome.tokens_per_second:,.0f} targets/s{losses}")
    return outcome, prompts


def _line(event: dict[str, Any]) -> str:
    """A record of training as a line of text."""
    if event["event"] == "train":
        return f"  step {event['step']:6d}  loss {event['nll']:.4f}  {event['tok_per_s']:,} targets/s"
    if event["event"] == "valid":
        return f"  step {event['step']:6d}  validation loss {event['nll']:.4f}" + "  (best)" * bool(event["best"])
    return f"  step {event['step']:6d}  {event['prompt']}{event['text']}"


def _corpus(plan: Plan, given: Corpus | None) -> Corpus:
    """The text of a plan, or its documents where a batch is a document; ``given`` replaces the plan's own."""
    if given is None:
        parts = [load_corpus(source) for source in plan.corpus] if plan.text is None else [plan.text]
    else:
        parts = [given]
    if plan.train.batching == "document":
        return [document for part in parts for document in as_documents(part)]
    return "\n".join(part if isinstance(part, str) else "\n".join(part) for part in parts)


def _data(
    plan: Plan, corpus: Corpus, tokenizer: Tokenizer, config: TrainConfig
) -> tuple[Batches, Batches | None, TrainConfig]:
    """Batches for training and for validation, and the configuration with the validation that the plan asks for."""
    make = functools.partial(_batches, plan, tokenizer=tokenizer, seed=config.seed)
    parts = split(corpus[: plan.limit], config.valid_fraction, seed=config.seed)
    training = make(parts[0])
    if plan.epoch_valid:
        return training, make(parts[0]), dataclasses.replace(config, eval_every=len(training))
    return training, make(parts[1]) if config.valid_fraction else None, config


def _batches(plan: Plan, part: Corpus, *, tokenizer: Tokenizer, seed: int) -> Batches:
    config, target = plan.train, plan.network.get("head", "all")
    options: dict[str, Any] = {"steps": config.seq_len, "target": target, "seed": seed}
    if config.batching == "document":
        documents = [tokenizer.encode_array(text) for text in part]
        return batches("document", documents, min_windows=plan.min_windows, **options)
    return batches(config.batching, tokenizer.encode_array(part), batch=config.batch_size, **options)


def _set_initial(model: LanguageModel, deviation: float) -> None:
    """Weights from N(0, deviation), zero biases; the second bias of each recurrent layer stays zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
                parameter.requires_grad_("bias_hh" not in name)
            else:
                parameter.normal_(0.0, deviation)


def _generate(outcome: Outcome, plan: Plan, prompts: list[list[int]], seed: int, log: Say, emit: Say) -> None:
    """Generate the texts of a plan; draws that remember in the same way run as one batch."""
    start = time.monotonic()
    for state in dict.fromkeys(draw.state for draw in plan.draws):
        chosen = [(draw, ids) for draw, ids in zip(plan.draws, prompts, strict=True) if draw.state == state]
        draws = [draw for draw, _ in chosen]
        model = outcome.model if state is None else _remembering(outcome.model, state)
        found = model.generate(
            [ids for _, ids in chosen], max_new_tokens=[draw.tokens for draw in draws], eos_token_id=(), seed=seed,
            temperature=[draw.temperature for draw in draws], mode_of=[draw.mode_of for draw in draws],
        )  # fmt: skip
        for (draw, prompt), generation in zip(chosen, found, strict=True):
            if generation.error:
                raise RuntimeError(f"{draw.label}: {generation.error}")
            outcome.token_ids[draw.label] = generation.token_ids
            outcome.texts[draw.label] = model.tokenizer.decode([*prompt, *generation.token_ids])
    seconds = time.monotonic() - start
    count = sum(map(len, outcome.token_ids.values()))
    log(f"  {count} tokens generated in {seconds:.2f} s")
    for label, text in outcome.texts.items():
        log(f"--- {label}")
        emit(text)


def _remembering(model: LanguageModel, state: str) -> LanguageModel:
    """The same weights in a model whose state is ``carried``."""
    other = LanguageModel(dataclasses.replace(model.config, state=state, window=None), model.tokenizer)
    other.to(model.head.weight.device).load_state_dict(model.state_dict())
    return other.eval()


def _prompt(draw: Draw, tokenizer: Tokenizer, corpus: Corpus, log: Say) -> list[int]:
    """The ids of a draw's prompt; where the corpus lacks its characters, of the beginning of the corpus."""
    if not isinstance(draw.prompt, str):
        if max(draw.prompt) >= tokenizer.vocab_size:
            raise CorpusError(f"the seed {list(draw.prompt)} is beyond the {tokenizer.vocab_size} words of this text")
        return list(draw.prompt)
    try:
        return tokenizer.encode(draw.prompt, unk="error")
    except UnknownTextError as problem:
        text = corpus if isinstance(corpus, str) else corpus[0]
        log(
            f"  the tutorial's prompt does not fit this corpus ({', '.join(map(repr, problem.pieces))} unknown): the "
            "prompt is the beginning of the corpus"
        )
        return tokenizer.encode(text[: max(len(draw.prompt), 20)])[: len(draw.prompt)]


def _save_texts(outcome: Outcome, folder: Path, notebook: bool) -> None:
    """samples.txt, and the checkpoint that the notebook of 002 would have written."""
    texts = "\n\n".join(f"--- {label}\n{text}" for label, text in outcome.texts.items())
    (folder / "samples.txt").write_text(texts + "\n", encoding="utf-8")
    if notebook:
        outcome.model.to_tutorial_002(folder / "single-char.pth")
