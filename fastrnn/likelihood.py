"""How probable given ids are under a network: the numbers behind `LanguageModel.score`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .generate import generate
from .inference import Inference
from .network import Network
from .request import Request

GROUP_ROWS = 64
CHUNK_STEPS = 256
LOGITS_AT_ONCE = 1 << 24  # elements
COST_SEQUENCES, COST_TOKENS = 64, 64  # of text that `precision_cost` is measured on


def log_likelihoods(network: Network, sequences: Sequence[Tensor]) -> list[Tensor]:
    """For each sequence, 1-D int64 ids of length T, the natural logs (T - 1,) float32 of P(ids[t] | ids[:t]), t = 1 ..
    T-1.

    A network with window state is conditioned on the last ``window`` ids only, run from a zero state, as it generates.
    Sequences of any lengths share calls; memory is bounded whatever the lengths. The training flag does not matter.
    """
    inference = Inference(network)
    with inference.running():
        if network.config.state == "window":
            return [_windowed(inference, ids) for ids in sequences]
        result: list[Tensor] = [torch.empty(0)] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda r: -len(sequences[r]))
        for at in range(0, len(order), GROUP_ROWS):
            group = order[at : at + GROUP_ROWS]
            for r, values in zip(group, _group(inference, [sequences[r] for r in group])):
                result[r] = values
        return result


def precision_cost(network: Network, *, dtype: torch.dtype | None = None, quantize: str | None = None) -> float:
    """What weights of fewer bits (as in `generate.make_runner`) cost, in bits a token.

    The mean over 64 texts of 64 tokens that the network writes with them of log2 q / p: q the probability that it gave
    a token, p what it gives with its own weights; an estimate of the Kullback-Leibler divergence.
    """
    vocab = network.config.vocab_size
    starts = [[k * vocab // COST_SEQUENCES] for k in range(COST_SEQUENCES)]
    asked = [Request(ids, COST_TOKENS, sequence=k, logprobs=True) for k, ids in enumerate(starts)]
    done = sorted(generate(network, asked, dtype=dtype, quantize=quantize), key=lambda completion: completion.index)
    if failed := next((completion.error for completion in done if completion.error), None):
        raise RuntimeError(f"the cost of these weights cannot be measured: {failed}")
    texts = [torch.tensor([*ids, *completion.token_ids]) for ids, completion in zip(starts, done)]
    own = torch.cat(log_likelihoods(network, texts))
    given = torch.tensor([value for completion in done for value in completion.logprobs])
    return float((given.double() - own.double()).mean()) / math.log(2)


def _group(inference: Inference, sequences: list[Tensor]) -> list[Tensor]:
    """`log_likelihoods` of sequences sorted by falling length; the rows that have ended leave the batch."""
    state = inference.zero_state(len(sequences))
    parts: list[list[Tensor]] = [[torch.empty(0)] for _ in sequences]
    for start in range(0, len(sequences[0]) - 1, CHUNK_STEPS):
        live = [ids[start : start + CHUNK_STEPS + 1] for ids in sequences if len(ids) - 1 > start]
        state = tuple(s[:, : len(live)] for s in state) if isinstance(state, tuple) else state[:, : len(live)]
        ids = torch.nn.utils.rnn.pad_sequence(live).to(inference.device)
        y, state = inference.outputs(ids[:-1], state)
        found = _token_logs(inference, y, ids[1:]).cpu()
        for r, piece in enumerate(live):
            parts[r].append(found[: len(piece) - 1, r])
    return [torch.cat(part) for part in parts]


def _windowed(inference: Inference, ids: Tensor) -> Tensor:
    """`log_likelihoods` of one sequence under a window: the first window at once, then one run per id."""
    window = inference.config.window
    ids = ids.to(inference.device)
    if len(ids) < 2:
        return torch.empty(0)
    y, _ = inference.outputs(ids[: min(window, len(ids) - 1), None], inference.zero_state(1))
    parts = [_token_logs(inference, y, ids[1 : len(y) + 1, None])[:, 0]]
    if len(ids) <= window + 1:
        return parts[0].cpu()
    windows = ids[1:-1].unfold(0, window, 1)
    for block, targets in zip(windows.split(GROUP_ROWS), ids[window + 1 :].split(GROUP_ROWS)):
        y, _ = inference.outputs(block.t().contiguous(), inference.zero_state(len(block)))
        parts.append(_token_logs(inference, y[-1:], targets.unsqueeze(0))[0])
    return torch.cat(parts).cpu()


def _token_logs(inference: Inference, y: Tensor, targets: Tensor) -> Tensor:
    """Natural log (T, n) float32 of the probability of targets (T, n) int64, given the top layer's y (T, n, H)."""
    rows = max(1, LOGITS_AT_ONCE // inference.config.vocab_size)
    parts = []
    for h, target in zip(y.flatten(0, 1).split(rows), targets.flatten().split(rows)):
        logs = F.linear(h, inference.head.weight, inference.head.bias).float().log_softmax(-1)
        parts.append(logs.gather(1, target.unsqueeze(1)).squeeze(1))
    return torch.cat(parts).view(targets.shape)
