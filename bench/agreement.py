"""Agreement: are the tokens of the generation loop those of the reference draw on float64 logits?

Each model of the folders given (as `fastrnn train` and `fastrnn demo` write them) generates from the empty prompt. Its
tokens are then read back by the same network in float64, and the reference draws again from those logits with the same
seeds, sequences and steps. A token may differ only where the draw was so near to a boundary that an honest float32
error of the logits decides it: three times the error of PyTorch's own float32 run on the same ids, plus 1e-6. Ends with
status 1 where one differs elsewhere.

    python -m bench.agreement FOLDER... [--tokens 1000000] [--seed 1] [--output bench/results/agreement.csv]
"""

from __future__ import annotations

import argparse
import copy
import csv
from pathlib import Path
from typing import NamedTuple

import torch

import fastrnn
from bench.timing import machine
from fastrnn import LanguageModel
from fastrnn.models import Generation

ROWS, LENGTH = 512, 250  # sequences at a time, and the most tokens of one


class Agreement(NamedTuple):
    """Tokens compared, those that differ, those of them beyond the margin, and the logits' error that was allowed."""

    tokens: int
    differing: int
    beyond_margin: int
    allowed: float


@torch.inference_mode()
def compare(model: LanguageModel, double: LanguageModel, outputs: list[Generation], seed: int) -> Agreement:
    """Tokens of ``outputs``, which ``model`` generated from the empty prompt at temperature 1."""
    first = model.tokenizer.eos_id
    length = max(len(output.token_ids) for output in outputs)
    ids = torch.full((len(outputs), length + 1), first)
    for row, output in enumerate(outputs):
        ids[row, 1 : len(output.token_ids) + 1] = torch.tensor(output.token_ids)
    real = torch.arange(length) < torch.tensor([len(output.token_ids) for output in outputs])[:, None]
    with fastrnn.backend("aten"):
        exact, single = (run(ids[:, :-1])[0][real] for run in (double, model))
    allowed = float(3 * (single - exact).abs().max() + 1e-6)
    rows, steps = real.nonzero(as_tuple=True)
    sequences = torch.tensor([output.sequence for output in outputs])[rows]
    tokens = ids[:, 1:][real]
    near = torch.zeros(len(tokens), dtype=torch.bool)
    differs = torch.zeros(len(tokens), dtype=torch.bool)
    for part in torch.arange(len(tokens)).split(1 << 16):
        with fastrnn.backend("reference"):
            draw = fastrnn.sample(
                exact[part].float(), seed=seed, sequence=sequences[part], step=steps[part], return_details=True
            )
        near[part] = 2 * (draw.margin - 1e-6) <= allowed
        differs[part] = draw.token != tokens[part]
    return Agreement(len(tokens), int(differs.sum()), int((differs & ~near).sum()), allowed)


def agreement(model: LanguageModel, tokens: int, seed: int) -> Agreement:
    """`compare` over slices of sequences until ``tokens`` have been compared."""
    if model.tokenizer.eos_id is None:
        raise SystemExit("the model's vocabulary has no end of text to start from; train one on documents or lines")
    double = copy.deepcopy(model).double()
    total = Agreement(0, 0, 0, 0.0)
    while total.tokens < tokens:
        outputs = model.generate(
            "", num_return_sequences=ROWS, max_new_tokens=LENGTH, temperature=1.0, seed=seed, batch_size=ROWS,
            top_k=0, top_p=1.0, min_p=0.0, mode_of=1, repetition_penalty=1.0,
        )  # fmt: skip
        part = compare(model, double, outputs, seed)
        total = Agreement(*(a + b for a, b in zip(total[:3], part[:3])), max(total.allowed, part.allowed))
        seed += 1
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a trained model")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens to compare for each model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "agreement.csv")
    options = parser.parse_args()
    rows = []
    for folder in options.folders:
        model = LanguageModel.from_pretrained(folder).eval()
        c = model.config
        found = agreement(model, options.tokens, options.seed)
        name = f"{c.cell} {c.num_layers}x{c.hidden_size} {c.input} V={c.vocab_size}"
        print(
            f"{name}: {found.tokens:,} tokens, {found.differing} differ, {found.beyond_margin} of them beyond the "
            f"margin of a logit error of {found.allowed:.1e}",
            flush=True,
        )
        rows.append({"model": name, **found._asdict(), "machine": machine(), "torch": torch.__version__})
    with open(options.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {options.output}")
    raise SystemExit(any(row["beyond_margin"] for row in rows))


if __name__ == "__main__":
    main()
