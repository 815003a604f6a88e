"""What a model's predictions cost: the cross-entropy that training minimises and validation reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or the data are empty; the text says what to change."""


class Batches(Protocol):
    """What training needs of its data, as `fastrnn.data` makes it: one iteration is the rest of one epoch."""

    epoch: int
    position: int

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def token_losses(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropies and the sum of the weights, both float32 scalars on the logits' device.

    Args:
        logits: (B, T, V) or (B, V), any floating dtype; the loss is taken in float32.
        targets: (B, T) or (B,), int64.
        weight: like targets, 0 where a target does not count; None counts all.
    """
    flat = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    if weight is None:
        return flat.sum(), torch.tensor(float(flat.numel()), device=flat.device)
    return (flat * weight.flatten()).sum(), weight.sum().float()


def evaluate(
    model: torch.nn.Module, batches: Batches, *, limit: int = 0, reduction: str = "mean",
    chars_per_token: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The loss of ``model`` on the first ``limit`` ``batches`` (0 = all), in eval mode, without touching random states.

    Returns:
        ``loss`` (in ``reduction``: nats per token, or the sum of nats), ``nll`` (nats per token), ``perplexity``,
        ``bits_per_token``, ``tokens``, and ``bits_per_char`` where ``chars_per_token`` is known.
    """
    batches.epoch = batches.position = 0
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count, state = torch.zeros((), dtype=torch.float64), 0.0, None
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                if limit and index >= limit:
                    break
                logits, state = run_batch(model, batch, state if batch.carry else None, device)
                loss, weight = token_losses(logits, batch.targets.to(device), to_device(batch.weight, device))
                total += loss.double().cpu()
                count += float(weight)
    finally:
        model.train(training)
    if not count:
        raise TrainingError(
            "the validation data hold no batch; give more text, a larger valid_fraction or a shorter seq_len"
        )
    nll = float(total) / count
    record = {
        "loss": nll if reduction == "mean" else float(total), "nll": nll, "perplexity": _exp(nll),
        "bits_per_token": nll / math.log(2), "tokens": int(count),
    }  # fmt: skip
    if chars_per_token:
        record["bits_per_char"] = nll / math.log(2) / chars_per_token
    return record


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def to_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def run_batch(model: torch.nn.Module, batch: Any, state: Any, device: torch.device) -> tuple[Tensor, Any]:
    return model(to_device(batch.inputs, device), state, reset=to_device(batch.reset, device))


def detached(state: Any) -> Any:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()
