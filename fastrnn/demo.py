"""``fastrnn demo``: in under a minute on two cores, offline, a model learns the names of Unicode's characters, writes
100 000 new ones, is checked against plain PyTorch, and only then raced against it."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends import backend
from .batching import Batch
from .config import TrainConfig
from .corpora import load_corpus
from .inference import Inference
from .models import Generation, LanguageModel
from .prepare import prepare
from .sampling import sample
from .train import train

NAMES = "names.txt"


class DemoError(RuntimeError):
    """What was generated is not what plain PyTorch with the same weights would have given."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much the demo does. Times are seconds, sizes are rows."""

    steps: int
    train_time: float
    names: int
    slices: int
    batch: int
    checked: int
    raced: int
    hidden: int = 160


FULL = Scale(steps=1150, train_time=26.0, names=100_000, slices=8, batch=1024, checked=256, raced=2048)
QUICK = Scale(steps=60, train_time=10.0, names=200, slices=2, batch=64, checked=16, raced=128, hidden=32)
LONGEST = 96  # tokens; the longest of Unicode's names has fewer


def run(options: argparse.Namespace) -> int:
    """Train, generate, check, race; samples and results on stdout, progress on stderr."""
    scale, start, out = QUICK if options.quick else FULL, time.monotonic(), Path(options.out)
    say(f"learning the names of Unicode's characters ({torch.get_num_threads()} threads, no GPU, no network)")
    model, held_out = learn(scale, out, options.seed)
    print(f"learned: {held_out['bits_per_char']:.3f} bits/char on names it has not seen", flush=True)

    outputs, seconds = write_names(model, scale, out, options.seed)
    speed = len(outputs) / seconds
    tokens = sum(output.usage["completion_tokens"] for output in outputs)
    print(f"wrote {len(outputs):,} names into {out / NAMES}: {speed:,.0f} names/s, {tokens / seconds:,.0f} tokens/s")
    print(novelty(outputs, load_corpus("unicode-names")), flush=True)

    plain = PlainModel(model)
    drawn, worst = check(model, plain, outputs[: scale.checked], options.seed)
    print(f"checked: {drawn:,} tokens are those of nn.GRU with the same weights and the reference draw; "
          f"logits differ by {worst:.1e} at most")  # fmt: skip
    rival = max(race(plain, scale, model, threads) for threads in {1, torch.get_num_threads()})
    print(f"race: {speed:,.0f} names/s against {rival:,.0f} names/s of nn.GRU + softmax + multinomial in batches of "
          f"{scale.batch}: {speed / rival:.1f} times as fast", flush=True)  # fmt: skip
    say(f"done in {time.monotonic() - start:.0f} s; try: fastrnn generate {out} -p CAT -n 5")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def learn(scale: Scale, out: Path, seed: int) -> tuple[LanguageModel, dict[str, Any]]:
    """Train on 95 % of the names; the model, and the validation record of the other 5 %."""
    config = TrainConfig(
        batching="lines", batch_size=32, seq_len=32, lr=0.008, schedule="cosine", warmup_steps=40, min_lr=1e-4,
        max_steps=scale.steps, max_time=scale.train_time, eval_every=0, eval_batches=0, save_every=0,
        log_every=50, sample_every=max(scale.steps // 12, 1), sample_tokens=LONGEST, seed=seed,
    )  # fmt: skip
    prepared = prepare(load_corpus("unicode-names"), config)
    torch.manual_seed(seed)
    model = prepared.model(cell="gru", hidden_size=scale.hidden, embedding_dim=scale.hidden // 5)

    def show(record: dict[str, Any]) -> None:
        if record["event"] == "sample":
            print(f"  step {record['step']:>5}: {record['text']}", flush=True)
        elif record["event"] == "train" and record["step"] % 200 == 0:
            say(f"  step {record['step']}: loss {record['loss']:.3f}, {record['tok_per_s']:,} tok/s")

    threads = torch.get_num_threads()
    torch.set_num_threads(quickest_threads(model, next(iter(prepared.valid))))
    result = train(model, prepared.train, config, valid=prepared.valid, out=out, on_event=show,
                   chars_per_token=prepared.chars_per_token)  # fmt: skip
    torch.set_num_threads(threads)
    if result.signal is not None:
        raise KeyboardInterrupt
    return model.eval(), result.best


def quickest_threads(model: LanguageModel, batch: Batch) -> int:
    """1 or all of torch's threads, whichever runs a batch forward and backward sooner now; a busy machine wants 1."""
    seconds = {}
    for threads in {torch.get_num_threads(), 1}:
        torch.set_num_threads(threads)
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            model(batch.inputs, reset=batch.reset)[0].sum().backward()
            runs.append(time.perf_counter() - start)
        seconds[threads] = statistics.median(runs)
    model.zero_grad()
    return min(seconds, key=seconds.__getitem__)


def write_names(model: LanguageModel, scale: Scale, out: Path, seed: int) -> tuple[list[Generation], float]:
    """Generate ``scale.names`` names into a file, in slices, so that one can watch; the outputs, and the seconds.

    A small network runs on one thread, so the slices are shared out among as many Python threads as torch would use, up
    to four: the tokens do not depend on it.
    """
    outputs: list[Generation] = []
    each = scale.names // scale.slices
    start = time.perf_counter()

    def slice_of_names(number: int) -> list[Generation]:
        torch.set_num_threads(1)
        return model.generate(
            "", num_return_sequences=each, max_new_tokens=LONGEST, seed=seed, sequence_id=number,
            batch_size=scale.batch,
        )  # fmt: skip

    workers = min(torch.get_num_threads(), 4)
    with open(out / NAMES, "w", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        for part in pool.map(slice_of_names, range(scale.slices)):
            file.writelines(output.text + "\n" for output in part)
            outputs += part
            say(f"  {len(outputs):,} names, such as {part[0].text}")
    return outputs, time.perf_counter() - start


def novelty(outputs: Sequence[Generation], corpus: Sequence[str]) -> str:
    """How many of the names are new, in words."""
    known, written = set(corpus), {output.text for output in outputs}
    return f"of them {len(written):,} are different, and {len(written - known):,} are no character's name yet"


class PlainModel(nn.Module):
    """A copy of the weights in torch.nn modules, without anything of ours."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        config = model.config
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
        self.rnn = nn.GRU(config.embedding_dim, config.hidden_size, config.num_layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.load_state_dict(model.state_dict())

    def forward(self, ids: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (T, B, V) and the state after ids (T, B)."""
        y, state = self.rnn(self.embedding(ids), state)
        return self.head(y), state


@torch.inference_mode()
def check(model: LanguageModel, plain: PlainModel, outputs: Sequence[Generation], seed: int) -> tuple[int, float]:
    """Compare names with what plain PyTorch would have drawn: the number of tokens, the largest difference of a logit.

    The logits must be as near to those of float64 as three times nn.GRU's own in float32. The tokens must be those of
    the reference draw on nn.GRU's logits, but for draws so near to a boundary that the logits' difference can decide.

    Raises:
        DemoError: they are not.
    """
    eos = model.tokenizer.eos_id
    length = max(len(output.token_ids) for output in outputs)
    ids = torch.full((length + 1, len(outputs)), eos)
    for row, output in enumerate(outputs):
        ids[1 : len(output.token_ids) + 1, row] = torch.tensor(output.token_ids)
    real = torch.arange(length)[:, None] < torch.tensor([len(output.token_ids) for output in outputs])
    # The cells of the same backend: the loop gives no logits out, and rounds as they do but for the order of its sums.
    with backend(Inference(model).backend):
        ours = model(ids[:-1].t())[0].transpose(0, 1)[real]
    theirs = plain(ids[:-1])[0][real]
    exact = copy.deepcopy(plain).double()(ids[:-1])[0][real]
    error, allowed = (ours - exact).abs().max(), 3 * (theirs - exact).abs().max() + 1e-6
    if not error <= allowed:
        raise DemoError(f"the logits differ by {error:.2e} from float64, nn.GRU's by {allowed / 3:.2e}")

    steps, rows = real.nonzero(as_tuple=True)
    sequences = torch.tensor([output.sequence for output in outputs])[rows]
    with backend("reference"):
        draw = sample(theirs, seed=seed, sequence=sequences, step=steps, return_details=True)
    moved = (ours - theirs).abs().max()
    decided = 2 * (draw.margin - 1e-6) > moved
    if wrong := int((decided & (draw.token != ids[1:][real])).sum()):
        raise DemoError(f"{wrong} of {len(rows)} tokens are not those of nn.GRU and the reference draw")
    return len(rows), float(moved)


@torch.inference_mode()
def race(plain: PlainModel, scale: Scale, model: LanguageModel, threads: int) -> float:
    """Names per second of the usual loop: batches of nn.GRU, softmax and multinomial until the last row has ended."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    eos, tokenizer, names = model.tokenizer.eos_id, model.tokenizer, []
    start = time.perf_counter()
    while len(names) < scale.raced:
        ids, state = torch.full((1, scale.batch), eos), None
        ended, drawn = torch.zeros(scale.batch, dtype=torch.bool), []
        while len(drawn) < LONGEST and not ended.all():
            logits, state = plain(ids, state)
            ids = torch.multinomial(logits[0].softmax(-1), 1).t()
            drawn.append(ids[0])
            ended |= ids[0] == eos
        for row in torch.stack(drawn, 1).tolist():
            names.append(tokenizer.decode(row[: row.index(eos)] if eos in row else row))
    torch.set_num_threads(before)
    return len(names) / (time.perf_counter() - start)
