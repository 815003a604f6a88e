"""The one place where tolerances are decided.

An expected value is computed in float64 (the oracle). A result in dtype D passes when its error against the oracle is
at most three times the error that plain PyTorch makes in D on the same inputs, plus a floor of a few units in the last
place of D: the honest tolerance of Dao-AILab/flash-attention's tests. Comparisons are written so that NaN fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FACTOR = 3.0
# In units of eps(D) times the largest magnitude expected. It covers the steps of a recurrence in float64, where the
# oracle rounds as much as what it judges.
FLOOR_ULPS = 64.0
# How far int8 may move log-probabilities, root mean square, in units of their spread. A row of numbers whose largest is
# c times their root mean square moves by c / 127 / sqrt(12) of itself when it is rounded to 127 steps: 0.7 % for states
# (c about 3), 0.4 % for uniform weights (c = sqrt(3)), 0.8 % for a product of both. What a state keeps of the errors
# before it and layers on top of each other may double that, and some is left to chance.
INT8_OF_SPREAD = 0.02


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in float64; inf when shapes differ or where exactly one of the two is NaN."""
    if actual.shape != expected.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual.detach().cpu().double() - expected.detach().cpu().double()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).max())


def largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor; 0 when it is empty."""
    return float(tensor.detach().double().abs().max()) if tensor.numel() else 0.0


def assert_close(
    actual: Tensor,
    expected: Tensor,
    plain: Tensor | None = None,
    what: str = "result",
    scale: float | None = None,
) -> None:
    """Hold ``actual`` to the float64 ``expected``; ``plain`` is plain PyTorch's result in the dtype of ``actual``.

    Without ``plain`` only the floor is allowed, which suits float64 results. ``scale`` is the magnitude of what was
    rounded on the way to the result, by default the largest of the result itself.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    scale = largest(expected) if scale is None else scale
    floor = FLOOR_ULPS * torch.finfo(actual.dtype).eps * max(scale, torch.finfo(actual.dtype).tiny)
    allowed = floor + (FACTOR * error(plain, expected) if plain is not None else 0.0)
    found = error(actual, expected)
    assert found <= allowed, f"{what}: error {found:.3e} exceeds {allowed:.3e} (largest expected value {scale:.3e})"


def assert_all_close(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    plain: Sequence[Tensor] | None = None,
    what: str = "result",
    one_scale: bool = False,
) -> None:
    """`assert_close` for each of several tensors, each by its own scale or all by the largest of them.

    One scale is for gradients of very few numbers: a sum of terms that cancel keeps the rounding of its terms, which
    are as large as the other gradients.
    """
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors, expected {len(expected)}"
    scale = max(map(largest, expected)) if one_scale else None
    for k, (a, e) in enumerate(zip(actual, expected)):
        assert_close(a, e, None if plain is None else plain[k], f"{what}[{k}]", scale)


def to_double(value):
    """The same arguments with every floating tensor in float64 on the CPU; other values unchanged."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(to_double(v) for v in value)
    return value


def check(function: Callable, definition: Callable, arguments: Sequence, what: str = "result") -> None:
    """Hold ``function(*arguments)`` to ``definition`` evaluated in float64, by the error of ``definition`` in place."""
    expected = _tensors(definition(*to_double(tuple(arguments))))
    plain = _tensors(definition(*arguments))
    assert_all_close(_tensors(function(*arguments)), expected, plain, what)


def _tensors(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
