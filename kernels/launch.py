"""What the kernels of every cell share on the host: argument checks, launches, products after the loop, variants."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import tuning

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
# The kernels of whole sequences are compiled once for all T and B. So it must not count either whether the states of a
# layer among others start at a multiple of 16 bytes.
SEQUENCE = dict(do_not_specialize=["T", "B"], do_not_specialize_on_alignment=["p_h0", "p_c0", "p_dhn", "p_dcn"])


class Variant(NamedTuple):
    """A kernel as one kind of launch compiles it.

    ``signature`` gives the Triton type of every parameter that ``constexprs`` does not fix; ``aligned`` names the
    pointers (and integers) that are multiples of 16.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...]
    maxnreg: int | None = None


def check_shapes(cell: str, given: dict[str, Any]) -> tuple[int, int, int, int]:
    """``(T, B, I, H)`` of the arguments of a cell's op, by name; all but x and the lengths may have two directions.

    With offsets, packed rows stand where all steps stand otherwise: x is (1, N, I), and so are y and what is kept.

    Raises:
        RuntimeError: a shape, dtype or device does not go with the others; kernels would read beyond it.
    """
    op = f"{cell}_{'backward' if 'dy' in given else 'forward'}"
    x, h0 = given["x"], given["h0"]
    ways = tuple(h0.shape[:-2])
    if x.dim() != 3 or h0.dim() < 2 or ways not in ((), (2,)):
        needed = "(B, H), or (2, B, H) for both directions"
        raise RuntimeError(f"{op}: x must be (T, B, I) and h0 {needed}, got {tuple(x.shape)} and {tuple(h0.shape)}")
    width, inputs, rows, offsets = h0.shape[-1], x.shape[-1], tuple(x.shape[:2]), given.get("offsets")
    time, batch = rows if offsets is None else (offsets.numel() - 1, h0.shape[-2])
    hidden = given["c0"].shape[-1] if cell == "lstm" else width
    units, kept = GATES[cell] * hidden, 4 * hidden
    shapes = dict(
        h0=(batch, width), c0=(batch, hidden), w_ih=(units, inputs), w_hh=(units, width), b_ih=(units,), b_hh=(units,),
        w_hr=(width, hidden), lengths=(batch,), offsets=(time + 1,), reset=rows, y=(*rows, width), dy=(*rows, width),
        dhn=(batch, width), dcn=(batch, hidden), gates=(*rows, kept), cells=(*rows, hidden),
    )  # fmt: skip
    for name, shape in shapes.items():
        tensor = given.get(name)
        if tensor is None:
            continue
        shape = shape if name in ("lengths", "offsets") else (*ways, *shape)
        if tuple(tensor.shape) != shape:
            raise RuntimeError(
                f"{op}: {name} must be {shape} for T={time} B={batch} I={inputs} H={hidden}, got {tuple(tensor.shape)}"
            )
        dtype = {"lengths": torch.int64, "offsets": torch.int64, "reset": torch.bool}.get(name, x.dtype)
        if tensor.dtype != dtype or tensor.device != x.device:
            raise RuntimeError(f"{op}: {name} must be {dtype} on {x.device}, got {tensor.dtype} on {tensor.device}")
    if width != hidden and given.get("w_hr") is None:
        raise RuntimeError(f"{op}: h0 must be (B, H) = {(batch, hidden)} without w_hr, got {tuple(h0.shape)}")
    return time, batch, inputs, hidden


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two biases that a layer may not have."""
    return one if other is None else other if one is None else one + other


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised contiguous tensors of the same kind."""
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def floats(x: Tensor, *shape: int) -> Tensor:
    """Float32 scratch on the device of `x`."""
    return x.new_empty(shape, dtype=torch.float32)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(x: Tensor) -> int:
    """The multiprocessors of the GPU of `x`; for a CPU, where kernels are interpreted, enough to form groups."""
    return _processors(x.device) if x.is_cuda else 8


def flag(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes that kernels read."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def precision(x: Tensor) -> str:
    """How products of float32 are taken: as torch.matmul takes them on this device, TF32 where that is allowed.

    Where it is not, three TF32 products make up one of float32 ("tf32x3"), which keeps the tensor cores.
    """
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def run(kernel, plan: tuning.Plan, *args, **constants) -> None:
    """Launch on the device of the first argument; nothing to do for an empty batch."""
    if args[0].numel() == 0 and 0 in plan.grid:
        return
    names = kernel.arg_names
    blocks = {name: value for name, value in plan.blocks.items() if name in names}
    options = dict(num_warps=plan.warps, num_stages=plan.stages, maxnreg=plan.maxnreg, enable_fp_fusion=True)
    if plan.programs > 1:
        options["launch_cooperative_grid"] = True
    guard = torch.cuda.device(args[0].device) if args[0].is_cuda else contextlib.nullcontext()
    with guard:
        kernel[plan.grid](*args, **constants, **blocks, **options)


def direction_of(h0: Tensor, reverse: bool) -> str:
    """The directions of a launch, as the kernels name them."""
    return "both" if h0.dim() == 3 else "reverse" if reverse else "forward"


def both(function: Callable) -> Callable:
    """The op for both directions of a layer, from the one for one direction that also takes what has two of them."""
    at = list(inspect.signature(function).parameters).index("reverse")

    @functools.wraps(function)
    def run(*args):
        reset = args[at - 1]
        if reset is not None:  # the reverse direction comes from the other side
            reset = torch.stack((reset, torch.cat((reset[1:], torch.zeros_like(reset[:1])))))
        return function(*args[: at - 1], reset, False, *args[at:])

    return run


def packed(function: Callable) -> Callable:
    """The op over packed rows, from the one for one direction that also takes them and two directions."""
    names = [name for name in inspect.signature(function).parameters if name not in ("reverse", "offsets")]
    names.insert(names.index("reset"), "offsets")

    @functools.wraps(function)
    def run(*args):
        given = dict(zip(names, args, strict=True))
        alone, offsets, lengths = given["h0"].shape[0] == 1, given["offsets"], given["lengths"]
        for name, value in given.items():
            if value is None or name in ("lengths", "offsets", "save", "nonlinearity"):
                continue
            if name in ("dy", "y", "gates", "cells"):
                given[name] = value if alone else value.unsqueeze(1)
            elif name not in ("x", "reset"):
                given[name] = value.squeeze(0) if alone else value
        reset = given["reset"]
        if reset is not None and not alone:
            t, b = _places(offsets, reset.shape[0])
            last = t + 1 == lengths[b]
            reset = torch.stack((reset, reset[torch.where(last, 0, offsets[t + 1] + b)] & ~last)).unsqueeze(1)
        elif reset is not None:
            reset = reset.unsqueeze(0)
        results = list(function(**given | {"x": given["x"].unsqueeze(0), "reset": reset, "reverse": False}))
        if "dy" in given:
            results[0] = results[0].squeeze(0)
        for i, result in list(enumerate(results))["dy" in given :]:
            if alone:
                results[i] = result if result.dim() == 3 else result.unsqueeze(0)
            else:
                results[i] = result.squeeze(1) if result.dim() == 4 else result
        return tuple(results)

    return run


def _places(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The step and the sequence of each packed row."""
    row = torch.arange(rows, device=offsets.device)
    t = torch.searchsorted(offsets, row, right=True) - 1
    return t, row - offsets[t]


def sequence_plan(cell: str, way: str, x: Tensor, h0: Tensor, hidden: int, projection: bool = False) -> tuning.Plan:
    """The plan of a whole sequence for arguments of one direction or of two."""
    sizes = (hidden, h0.shape[-2], x.dtype, processors(x), projection)
    return tuning.sequence(cell, way, *sizes, directions=h0.dim() - 1)


def input_part(x: Tensor, w_ih: Tensor, bias: Tensor | None) -> Tensor:
    """The input's part of all pre-activations, ``(T, B, G*H)`` for each direction."""
    if w_ih.dim() == 2:
        return linear(x, w_ih, bias).contiguous()
    rows = x.flatten(0, 1).expand(2, -1, -1)
    part = rows @ w_ih.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, w_ih.mT)
    return part.view(2, *x.shape[:2], w_ih.shape[1])


def input_gradient(x: Tensor, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of x ``(T, B, I)``: of all parts and directions the sum of gradients ``(T, B, M)`` by ``(M, I)``."""
    rows, dx = x.shape[0] * x.shape[1], None
    for gradients, weights in parts:
        ways, width = 1 if weights.dim() == 2 else 2, weights.shape[-2]
        for d, w in zip(gradients.reshape(ways, rows, width), weights.reshape(ways, width, -1)):
            dx = d @ w if dx is None else torch.addmm(dx, d, w)
    return dx.view(x.shape)


def weight_gradient(
    left: Tensor, right: Tensor, lengths: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Sum of the outer products over time and batch, ``(T,B,M), (T,B,N) -> (M,N)``, as one product a direction.

    With ``lengths``, what ``right`` holds beyond them does not count, not even a NaN; packed rows have nothing there.
    """
    if lengths is not None and offsets is None:
        beyond = torch.arange(right.shape[-3], device=right.device).unsqueeze(-1) >= lengths
        right = right.masked_fill(beyond.unsqueeze(-1), 0)
    return left.flatten(-3, -2).mT @ right.flatten(-3, -2)


def previous(
    y: Tensor, first: Tensor, lengths: Tensor | None, reset: Tensor | None, reverse: bool,
    offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The state ``(T, B, .)`` that each step started from, of every step's result and the initial state."""
    if first.dim() == 3:
        resets = (None, None) if reset is None else reset
        return torch.stack([previous(y[d], first[d], lengths, resets[d], d == 1, offsets) for d in (0, 1)])
    start = first.unsqueeze(0)
    if offsets is not None:
        (t, b), rows = _places(offsets, y.shape[1]), y.shape[1]
        is_first, t_before = (t + 1 == lengths[b], t + 1) if reverse else (t == 0, t - 1)
        before = torch.cat((y, start), 1)[:, torch.where(is_first, rows + b, offsets[t_before] + b)]
    elif not reverse:
        before = torch.cat((start, y[:-1]))[: y.shape[0]]
    else:
        before = torch.cat((y[1:], start))[: y.shape[0]]
        if lengths is not None:
            t = torch.arange(y.shape[0], device=y.device).unsqueeze(-1)
            before = torch.where((t == lengths - 1).unsqueeze(-1), start, before)
    return before if reset is None else before.masked_fill(reset.unsqueeze(-1), 0)


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_INTEGERS = {"p_lengths": "*i64", "p_offsets": "*i64", "p_reset": "*u8", "p_turn": "*i32"}
_INTEGERS |= dict.fromkeys(("T", "B", "I"), "i32")
_SCRATCH = ("p_dh", "p_c", "p_dc", "p_h")  # float32 whatever the dtype


def variant(
    name: str, kernel, plan: tuning.Plan, dtype: torch.dtype, hidden: int, given: bool, constants: dict[str, object],
    packed: bool = False,
) -> Variant:  # fmt: skip
    """A kernel for a width; lengths and a reset mask are there if ``given``, a projection where P is not H."""
    short, aligned, absent = TYPES[dtype], [], () if given else ("p_lengths", "p_reset")
    absent += () if packed else ("p_offsets",)
    known = plan.blocks | dict(H=hidden, P=hidden, DIRECTION="forward", p_ids=None) | constants
    known["PRECISION"] = "tf32x3" if dtype == torch.float32 else "ieee"
    anywhere = {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}
    absent += () if known["P"] != hidden else ("p_wr", "p_dhs", "p_m")
    fixed: dict[str, object] = {}
    signature: dict[str, str] = {}
    for parameter in kernel.arg_names:
        if parameter in known:
            fixed[parameter] = known[parameter]
        elif parameter in absent:
            fixed[parameter] = None
        else:
            signature[parameter] = _INTEGERS.get(parameter, f"*{'fp32' if parameter in _SCRATCH else short}")
            if parameter.startswith("p_") or (parameter == "I" and hidden % 16 == 0):
                aligned += [parameter] if parameter not in anywhere else []
    return Variant(name, kernel, signature, fixed, plan.warps, plan.stages, tuple(aligned), plan.maxnreg)
