"""How a token is drawn: the parameters, their translation into a kernel's numbers, and the `sample` front.

`fastrnn.reference_sample` defines the draw. A token depends on its row's logits, its parameters and the integers
(seed, sequence, step) alone: not on the batch, the row's place, the device or the number of threads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops

TEMPERATURE_RANGE = (1e-30, 1e30)  # keeps log2(e) / T a normal float32
MAX_VOCABULARY = 1 << 24
MAX_CACHED_ROWS = 4096

STATUS_TEXTS = {
    0: "drawn",
    1: "NaN among the logits",
    2: "+inf among the logits, so that there is no softmax",
    3: "no allowed token (every logit is masked or -inf)",
    4: "a sampling parameter outside its range",
}


class KernelNumbers(NamedTuple):
    """One row's parameters as the ``sample`` op takes them: float32 values in floats, ``top_p`` in units of 2**-63."""

    scale: float
    top_k: int
    top_p: int
    min_p: float


class Draw(NamedTuple):
    """What `sample` knows of a draw; each (B,), or () for logits of one dimension.

    token             int64, -1 where status is not 0
    logprob           float32, natural log of its probability under the softmax of all logits at temperature 1
    tempered_logprob  float32, the same at the given temperature for what mask and filters leave (0 for greedy)
    margin            float32: the token stays while the survivors do and every logit changes by less than
                      ``2 * temperature * (margin - 1e-6)`` (greedy: ``margin / 2``); 1e-6 covers rounding
    status            int32, a key of `STATUS_TEXTS`; the floats are NaN where it is not 0
    """

    token: Tensor
    logprob: Tensor
    tempered_logprob: Tensor
    margin: Tensor
    status: Tensor


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to draw from logits, in Hugging Face's words and order: mask, temperature, top_k, top_p, min_p.

    temperature  0 is greedy (the largest logit, lowest id on ties), otherwise 1e-30 to 1e30
    top_k        keep the k largest logits, the lowest ids on ties; 0 is off
    top_p        keep the shortest run of likeliest tokens whose probabilities reach top_p, in (0, 1]; 1 is off
    min_p        keep tokens at least min_p times as likely as the likeliest, in [0, 1]; 0 is off
    mode_of      the token most often drawn in this many draws, the lowest id on ties; 1 is a plain draw

    Raises ValueError for a number outside its range, TypeError for what is no number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    mode_of: int = 1

    def __post_init__(self) -> None:
        self.numbers()
        check_mode_of(self.mode_of)

    def numbers(self) -> KernelNumbers:
        """The numbers that the ``sample`` op takes."""
        values = (self.temperature, self.top_k, self.top_p, self.min_p)
        return _cached_numbers(*values) if _NUMBERS.issuperset(map(type, values)) else _numbers(*values)


def _real(name: str, value: float) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _whole(name: str, value: int, low: int, high: int, need: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    value = operator.index(value)
    if not low <= value < high:
        raise ValueError(f"{name} must be {need}, got {value}")
    return value


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def scale(temperature: float) -> float:
    """log2(e) / temperature, rounded once to float32; 0 for greedy."""
    low, high = TEMPERATURE_RANGE
    value = _real("temperature", temperature)
    if value == 0:
        return 0.0
    if not low <= value <= high:
        raise ValueError(f"temperature must be 0 (greedy) or between {low:g} and {high:g}, got {temperature}")
    return _float32(1.4426950408889634 / value)


def top_k(value: int) -> int:
    """top_k itself, checked."""
    return _whole("top_k", value, 0, 1 << 63, "at least 0 (0 = off)")


def top_p(value: float) -> int:
    """top_p in units of 2**-63, rounded up (exact from 2**-10 on); 0 when it is 1, which is off."""
    number = _real("top_p", value)
    if not 0 < number <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 = off), got {value}")
    return 0 if number == 1 else math.ceil(math.ldexp(number, 63))


def min_p(value: float) -> float:
    """-log2(min_p), rounded once to float32; +inf when min_p is 0, which is off."""
    number = _real("min_p", value)
    if not 0 <= number <= 1:
        raise ValueError(f"min_p must be between 0 and 1 (0 = off), got {value}")
    return math.inf if number == 0 else _float32(0.0 - math.log2(number))


def check_mode_of(value: int) -> int:
    """mode_of itself, checked."""
    return _whole("mode_of", value, 1, 1 << 31, "at least 1 (1 = a plain draw)")


def _bits(value: int, name: str) -> int:
    """An integer of up to 64 bits, signed or not, as the int64 with the same bits."""
    value = _whole(name, value, -(1 << 63), 1 << 64, "an integer of 64 bits")
    return value - (1 << 64) if value >= 1 << 63 else value


def _step(value: int) -> int:
    return _whole("step", value, 0, 1 << 32, "at least 0 and below 2**32")


def _rows(name: str, value: object, rows: int, device: torch.device, convert: Callable, dtype: torch.dtype) -> Tensor:
    """A parameter given as one number or as one a row, converted number by number; (rows,)."""
    value = value.tolist() if hasattr(value, "tolist") else value  # torch and numpy
    if not isinstance(value, Sequence) or isinstance(value, str):
        return torch.full((rows,), convert(value), dtype=dtype, device=device)
    if len(value) != rows:
        raise ValueError(f"sample: {name} must be one number or one for each of the {rows} rows, got {len(value)}")
    known = {v: convert(v) for v in dict.fromkeys(value)}
    return torch.tensor([known[v] for v in value], dtype=dtype, device=device)


def _numbers(*values: float) -> KernelNumbers:
    """Of temperature, top_k, top_p and min_p."""
    return KernelNumbers(*(convert(value) for convert, value in zip((scale, top_k, top_p, min_p), values)))


_NUMBERS = frozenset((int, float))
_cached_numbers = functools.lru_cache(maxsize=1024, typed=True)(_numbers)  # `typed`, for 1.0 is no top_k

_PARAMETERS = {
    "temperature": (scale, torch.float32), "top_k": (top_k, torch.int64),
    "top_p": (top_p, torch.int64), "min_p": (min_p, torch.float32),
    "seed": (functools.partial(_bits, name="seed"), torch.int64),
    "sequence": (functools.partial(_bits, name="sequence"), torch.int64), "step": (_step, torch.int64),
}  # fmt: skip
_SELDOM = ("temperature", "top_k", "top_p", "min_p", "seed")


@functools.lru_cache(maxsize=128, typed=True)
def _cached_columns(rows: int, device: torch.device, *numbers: float) -> tuple[Tensor, ...]:
    """`_columns` of parameters that are one number each."""
    return tuple(_rows(name, value, rows, device, *_PARAMETERS[name]) for name, value in zip(_SELDOM, numbers))


@functools.lru_cache(maxsize=32)
def _cached_zeros(rows: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.zeros(rows, dtype=dtype, device=device)


@functools.lru_cache(maxsize=32)
def _cached_range(rows: int, device: torch.device) -> Tensor:
    return torch.arange(rows, device=device)


def _may_keep(rows: int) -> bool:
    """Whether a tensor made now is small and an ordinary one, good for later calls (a traced or fake one is not)."""
    return rows <= MAX_CACHED_ROWS and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def _parameter(name: str, value: object, rows: int, device: torch.device) -> Tensor:
    """The (rows,) column of a parameter."""
    convert, dtype = _PARAMETERS[name]
    integers = name in ("seed", "sequence", "step")
    if integers and isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == (rows,):
        return value.to(device).contiguous()  # any 64 bits are right, so that nothing needs to leave a GPU
    return _rows(name, value, rows, device, convert, dtype)


def _columns(rows: int, device: torch.device, keep: bool, *values: object) -> tuple[Tensor, ...]:
    """The columns of the parameters `_SELDOM`, which most callers leave from call to call; kept if each is a number."""
    if keep and _NUMBERS.issuperset(map(type, values)):
        return _cached_columns(rows, device, *values)
    return tuple(_parameter(name, value, rows, device) for name, value in zip(_SELDOM, values))


def _sequences(rows: int, device: torch.device, keep: bool, given: object) -> Tensor:
    """The (rows,) ids of the rows' sequences."""
    if given is None:
        return _cached_range(rows, device) if keep else torch.arange(rows, device=device)
    if rows == 1 or hasattr(given, "__len__") or isinstance(given, Tensor):
        return _parameter("sequence", given, rows, device)
    raise ValueError(f"sample: sequence must have one id for each of the {rows} rows, got {given!r}")


def _check_logits(logits: Tensor, mask: Tensor | None) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"sample: logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits))}")
    if logits.dim() not in (1, 2):
        raise ValueError(f"sample: logits must be (V,) or (B, V), got {tuple(logits.shape)}")
    if not 1 <= logits.shape[-1] <= MAX_VOCABULARY:
        raise ValueError(f"sample: logits must have 1 to {MAX_VOCABULARY} columns (tokens), got {logits.shape[-1]}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"sample: mask must be a bool tensor, True = allowed, got {getattr(mask, 'dtype', type(mask))}")
    rows, vocabulary = logits.shape[0] if logits.dim() == 2 else 1, logits.shape[-1]
    if tuple(mask.shape) not in ((vocabulary,), (1, vocabulary), (rows, vocabulary)):
        need = f"({vocabulary},) or ({rows}, {vocabulary}) because logits are {tuple(logits.shape)}"
        raise ValueError(f"sample: mask must be {need}, got {tuple(mask.shape)}")


def _refusal(status: Tensor) -> str:
    """The message for rows that cannot be drawn."""
    parts = []
    for code, text in STATUS_TEXTS.items():
        rows = (status == code).nonzero()[:, 0].tolist() if code else []
        if rows:
            names = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            parts.append(f"row{'s' * (len(rows) > 1)} {names}: {text}")
    return f"sample: cannot draw from {'; '.join(parts)} (return_details=True gives each row's status instead)"


def sample(
    logits: Tensor,
    temperature: float | Sequence[float] | Tensor = 1.0,
    *,
    top_k: int | Sequence[int] | Tensor = 0,
    top_p: float | Sequence[float] | Tensor = 1.0,
    min_p: float | Sequence[float] | Tensor = 0.0,
    mask: Tensor | None = None,
    mode_of: int = 1,
    seed: int | Sequence[int] | Tensor = 0,
    sequence: Sequence[int] | Tensor | None = None,
    step: int | Sequence[int] | Tensor = 0,
    return_details: bool = False,
) -> Tensor | Draw:
    """Draw one token from each row of ``logits`` (B, V), or from ``logits`` (V,); token ids int64 (B,) or ().

    logits: any floating dtype, converted to float32. temperature, top_k, top_p, min_p: as in `SamplingParams`, one
    number or one a row. mask: (V,) or (B, V) bool, True = allowed. seed, sequence, step: the 64-bit seed, the id of
    each row's sequence (default 0 .. B-1) and the position in it (32 bits) name the draw's random numbers: the same
    three give the same token from the same logits everywhere, and a row keeps its draw in any batch when it keeps its
    sequence id. Of an int64 tensor ``step`` the low 32 bits count.

    With ``return_details`` the result is a `Draw`. Without it a row that cannot be drawn from (NaN, +inf or nothing
    allowed) raises a ValueError that names it.
    """
    _check_logits(logits, mask)
    check_mode_of(mode_of)
    table = logits if logits.dim() == 2 else logits[None]
    if table.dtype != torch.float32:
        table = table.detach().to(torch.float32)
    numbers = (temperature, top_k, top_p, min_p)
    plain = mask is None and sequence is None and mode_of == 1 and not return_details
    if plain and type(seed) is type(step) is int and _NUMBERS.issuperset(map(type, numbers)):
        token = ops.draw(table, *_cached_numbers(*numbers), _bits(seed, "seed"), _step(step))
        if token is not None:
            return token if logits.dim() == 2 else token[0]
    rows, device = table.shape[0], table.device
    keep = _may_keep(rows)
    sequences = _sequences(rows, device, keep, sequence)
    if mask is not None:
        mask = mask.to(device).reshape(-1, table.shape[1]).contiguous()
    *columns, seeds = _columns(rows, device, keep, *numbers, seed)
    if keep and type(step) is int and step == 0:
        steps = _cached_zeros(rows, device, torch.int64)
    else:
        steps = _parameter("step", step, rows, device)
    token, logprob, tempered, margin, status = ops.sample(
        table, *columns, mask, seeds, sequences, steps, int(mode_of), return_details
    )
    if return_details:
        parts = (token.masked_fill(status != 0, -1), logprob, tempered, margin, status)
        return Draw(*(parts if logits.dim() == 2 else (part[0] for part in parts)))
    fine = torch.equal(status, _cached_zeros(rows, device, torch.int32)) if keep else not bool(status.any())
    if not fine:
        raise ValueError(_refusal(status))
    return token if logits.dim() == 2 else token[0]
