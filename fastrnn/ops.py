"""The fronts of the ops, which the layers call: they decide how a call gets to its backend.

A call goes through the registered op (`fastrnn.library`) where a gradient, a compiler or a tensor subclass is involved,
straight to the backend's function where not, to the reference under ``torch.func`` transforms and forward-mode AD,
which go through plain PyTorch, and to PyTorch's own fused RNN where the table says ``aten``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _VF, Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import aten, backends, reference
from .backends import Call
from .library import ARGUMENTS, GATES, cast, run_sample, sample_backend

_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "privateuseone")
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int))
_AUTOCAST = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))


def lstm(
    x: Tensor, h0: Tensor, c0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
    b_hh: Tensor | None = None, w_hr: Tensor | None = None, *, lengths: Tensor | None = None,
    reset: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One LSTM layer in one direction: ``(y (T,B,P), hn (B,P), cn (B,H))``; arguments as `fastrnn.reference`."""
    return _layer("lstm", (x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, reverse))[:3]


def gru(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    lengths: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One GRU layer in one direction: ``(y (T,B,H), hn (B,H))``; arguments as `fastrnn.reference`."""
    return _layer("gru", (x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse))[:2]


def rnn(
    x: Tensor, h0: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    nonlinearity: str = "tanh", lengths: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One Elman layer in one direction: ``(y (T,B,H), hn (B,H))``; arguments as `fastrnn.reference`."""
    return _layer("rnn", (x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse, nonlinearity))[:2]


def sample(
    logits: Tensor, scale: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, mask: Tensor | None, seed: Tensor,
    sequence: Tensor, step: Tensor, mode_of: int = 1, logprobs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw a token a row as `fastrnn.reference_sample` defines it (arguments there)."""
    args = (logits.detach(), scale, top_k, top_p, min_p, mask, seed, sequence, step, mode_of, logprobs)
    return run_sample(*args) if _plain(args) else torch.ops.fastrnn.sample(*args)


def draw(
    logits: Tensor, scale: float, top_k: int, top_p: int, min_p: float, seed: int, step: int
) -> Tensor | None:  # fmt: skip
    """The tokens (B,) of `sample` with each parameter one number for all rows and the rows' sequences 0, 1, ...

    None where the table gives the draw to another backend than the C++ one, where something surrounds the call, and
    where a row cannot be drawn from: `sample` runs there, and knows why.
    """
    ordinary = type(logits) in _ORDINARY and not torch._C._len_torch_dispatch_stack()
    if not ordinary or transform() or backends.recording() or sample_backend(logits) != "cpu":
        return None
    if logits.requires_grad:
        logits = logits.detach()
    token, refused = backends.function("cpu", "draw")(logits, scale, top_k, top_p, min_p, seed, step)
    return None if refused else token


def transform() -> str:
    """What surrounds this call and decides how it runs: a compiler, ``torch.func``, forward-mode AD, or nothing."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if torch.compiler.is_compiling():
        return "torch.compile"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    return "forward-mode AD" if forward_ad._current_level >= 0 else ""


def _plain(args: Sequence) -> bool:
    """Whether the arguments are ordinary tensors outside every mode, so that the dispatcher has nothing to add."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return not any(type(a) not in _ORDINARY and isinstance(a, Tensor) for a in args)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast region around this call; None outside one and on devices without autocast (meta)."""
    return torch.get_autocast_dtype(device) if device in _AUTOCAST and torch.is_autocast_enabled(device) else None


def _in_autocast(args: tuple) -> tuple:
    dtype = _autocast_dtype(args[0].device.type)
    return args if dtype is None else tuple(cast(args, dtype))


def _needs_grad(args: Sequence) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def _layer(cell: str, args: tuple, recompute: bool = False) -> tuple[Tensor, ...]:
    """Run one layer by the shortest way that does what the surroundings ask for."""
    args = _in_autocast(args)
    forward, needs_grad, surroundings = f"{cell}_forward", _needs_grad(args), transform()
    tail = () if cell == "rnn" else (needs_grad and not recompute,)
    if surroundings == "torch.compile":
        return getattr(torch.ops.fastrnn, forward)(*args, *tail)
    if torch.compiler.is_compiling():  # a transform inside a compiled region: only plain PyTorch can be traced through
        return getattr(reference, forward)(*args, *(() if cell == "rnn" else (False,)))
    a, x = dict(zip(ARGUMENTS[forward], args)), args[0]
    call = Call(
        cell, x.device.type, x.dtype, *x.shape, a["w_hh"].shape[0] // GATES[cell], lengths=a["lengths"] is not None,
        reset=a["reset"] is not None, projection=a.get("w_hr") is not None, needs_grad=needs_grad, training=True,
        recompute=recompute and needs_grad, transform=surroundings,
    )  # fmt: skip
    backend = backends.choose(call).backend
    if surroundings and backend == "reference":
        return getattr(reference, forward)(*args, *(() if cell == "rnn" else (False,)))
    if backend == "aten":
        return aten.layer(cell, a, needs_grad)
    if needs_grad or not _plain(args):
        return getattr(torch.ops.fastrnn, forward)(*args, *tail)
    return backends.function(backend, forward)(*args, *tail)


def stack(
    mode: str, x: Tensor, hx, weights: Sequence[Tensor], *, bias: bool, num_layers: int, dropout: float,
    training: bool, bidirectional: bool, batch_sizes: Tensor | None = None, lengths: Tensor | None = None,
    reset: Tensor | None = None, recompute: bool = False,
):  # fmt: skip
    """Run a stack of layers as `torch.nn.LSTM` and its kin do.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        x: ``(T, B, I)``, or ``(sum of lengths, I)`` with ``batch_sizes``, the fields of a PackedSequence.
        hx: initial states ``(L*D, B, .)``; a pair ``(h, c)`` of them for the LSTM.
        weights: in the order of ``torch.nn.RNNBase._flat_weights``.
        dropout: probability, applied in training between the layers.
        lengths: ``(B,)`` int64, for padded ``x``; see `fastrnn.reference`.
        reset: bool ``(T, B)``, or ``(sum of lengths,)`` with ``batch_sizes``, in forward time: True starts a new
            segment at that step, in both directions.
        recompute: keep of each layer only its y for backward, which finds the gates again.

    Returns:
        ``(y, hx)`` with the shapes of `torch.nn.LSTM`; ``y`` is packed data when ``batch_sizes`` is given.
    """
    cell = mode.partition("_")[0].lower()
    states = hx if cell == "lstm" else (hx,)
    together, in_place = bidirectional and x.is_cuda, False
    if not torch.compiler.is_compiling():
        time, batch = (len(batch_sizes), int(batch_sizes[0])) if batch_sizes is not None else x.shape[:2]
        needs_grad = _needs_grad((x, *states, *weights))
        dtype = _autocast_dtype(x.device.type) or x.dtype
        call = Call(
            cell, x.device.type, dtype, time, batch, x.shape[-1], states[-1].shape[-1], layers=num_layers,
            lengths=lengths is not None, reset=reset is not None, needs_grad=needs_grad,
            projection=len(weights) > states[0].shape[0] * (2 + 2 * bias), training=training,
            dropout=dropout > 0 and training, packed=batch_sizes is not None, bidirectional=bidirectional,
            recompute=recompute and needs_grad, transform=transform(),
        )  # fmt: skip
        backend = backends.choose(call).backend
        together = bidirectional and backend == "triton"
        in_place = batch_sizes is not None and backend == "triton"
        if backend == "aten":
            options = (bias, num_layers, dropout, training, bidirectional, batch_sizes)
            return aten.stack(mode, x, hx, list(weights), *options, needs_grad=needs_grad)
    how = dict(bias=bias, dropout=dropout if training else 0.0, together=together, recompute=recompute)
    how["directions"] = 1 + bidirectional
    if batch_sizes is None:
        return _layer_by_layer(mode, x, states, weights, lengths, reset, **how)
    if in_place:
        lengths, offsets = (t.to(x.device) for t in _places(batch_sizes))
        return _layer_by_layer(mode, x, states, weights, lengths, reset, offsets=offsets, **how)
    x, host_lengths = _VF._pad_packed_sequence(x, batch_sizes, False, 0.0, len(batch_sizes))
    lengths = host_lengths.to(x.device)
    if reset is not None:
        reset = _VF._pad_packed_sequence(reset, batch_sizes, False, False, len(batch_sizes))[0]
    y, hx = _layer_by_layer(mode, x, states, weights, lengths, reset, **how)
    return _VF._pack_padded_sequence(y, host_lengths, False)[0], hx


def _places(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The lengths and the offsets of `fastrnn.reference` for packed rows."""
    lengths = torch.searchsorted(-batch_sizes, -torch.arange(int(batch_sizes[0])))
    return lengths, F.pad(batch_sizes.cumsum(0), (1, 0))


def _of_layer(cell: str, weights: Sequence[Tensor], count: int) -> list[Tensor | None]:
    """One direction's weights as the ops take them, from its `count` and what a projection has."""
    given = [*weights[:count], *(None for _ in range(4 - count))]
    return [*given, weights[count] if len(weights) > count else None] if cell == "lstm" else given


def _directions(cell: str, op: str, args: tuple, recompute: bool) -> tuple[Tensor, ...]:
    """All directions D of a layer by one op: ``(y, hn)``, of the LSTM also ``cn``, each (D, ...)."""
    args = _in_autocast(args)
    tail = () if cell == "rnn" else (_needs_grad(args) and not recompute,)
    return getattr(torch.ops.fastrnn, op)(*args, *tail)[: 3 if cell == "lstm" else 2]


def _side_by_side(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The directions' weights in one tensor; a view where there is one direction."""
    if tensors[0] is None:
        return None
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _layer_by_layer(
    mode: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None,
    reset: Tensor | None, *, directions: int, bias: bool, dropout: float, together: bool, recompute: bool,
    offsets: Tensor | None = None,
):  # fmt: skip
    """The stack as a loop over layers and directions, or with both `together`; ``dropout`` is 0 outside training.

    With ``offsets`` x holds packed rows, and so does the y of each layer.
    """
    cell, _, nonlinearity = mode.lower().partition("_")
    count, per_slot = 2 + 2 * bias, len(weights) // states[0].shape[0]
    resets = (reset, reference.reset_of(reset, 1) if directions == 2 and not together else None)
    slots = [slice(first, first + per_slot) for first in range(0, len(weights), per_slot)]
    ends: list[tuple[Tensor, ...]] = []
    for first in range(0, len(slots), directions):
        if first and dropout:
            x = F.dropout(x, dropout, True)
        own = [_of_layer(cell, weights[slot], count) for slot in slots[first : first + directions]]
        if together or offsets is not None:
            given = (x, *(s[first : first + directions] for s in states), *map(_side_by_side, zip(*own)))
            places, op = ((lengths,), "both") if offsets is None else ((lengths, offsets), "packed")
            tail = (*places, reset, *((nonlinearity,) if cell == "rnn" else ()))
            y, *end = _directions(cell, f"{cell}_{op}_forward", (*given, *tail), recompute)
            outputs = list(y)
            ends.extend(zip(*end))
        else:
            outputs = []
            for direction, weight in enumerate(own):
                tail = (lengths, resets[direction], direction == 1, *((nonlinearity,) if cell == "rnn" else ()))
                given = (x, *(s[first + direction] for s in states), *weight, *tail)
                y, *end = _layer(cell, given, recompute)[: 1 + len(states)]
                outputs.append(y)
                ends.append(tuple(end))
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    if directions == 1 and x.requires_grad:
        x = x.clone()  # the op keeps its y for backward, and a caller may write into this one, as after torch.nn.GRU
    hx = tuple(torch.stack(s) for s in zip(*ends))
    # torch.nn's GRU, and its LSTM of packed rows, answer in the dtype of their state.
    if (cell == "gru" or (cell == "lstm" and lengths is not None)) and _autocast_dtype(x.device.type) is not None:
        x, hx = x.to(states[0].dtype), tuple(s.to(states[0].dtype) for s in hx)
    return x, (hx if cell == "lstm" else hx[0])
