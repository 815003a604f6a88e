"""PyTorch's own fused RNNs (oneDNN or per-step ATen on a CPU, cuDNN on a GPU) behind fastrnn's interfaces.

`stack` runs a whole stack of layers with PyTorch's autograd, and with double backward where cuDNN has none. The
``{lstm,gru,rnn}_{forward,backward}`` functions have the interface of `fastrnn.reference`: forward recovers the tensors
that backward needs from the outputs by one matrix product, backward differentiates PyTorch's own forward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import _VF, Tensor

from . import reference


class DoublyDifferentiable(torch.autograd.Function):
    """Run ``fused`` forward and backward, and differentiate ``definition`` instead when a graph of backward is wanted.

    cuDNN has no derivative of its backward (pytorch/pytorch#5261), so ``create_graph=True`` runs
    ``definition``, PyTorch's per-step RNN, anew.
    """

    @staticmethod
    def forward(ctx, fused: Callable, definition: Callable, *inputs: Tensor):
        ctx.definition = definition
        ctx.save_for_backward(*inputs)
        with torch.enable_grad():
            ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
            ctx.outputs = fused(*ctx.inputs)
        return tuple(t.detach() for t in ctx.outputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            inputs = [t.view_as(t) for t in ctx.saved_tensors]
            outputs = ctx.definition(*inputs)
        else:
            inputs, outputs = ctx.inputs, ctx.outputs
        wanted = [t for t, need in zip(inputs, needed) if need]
        found = iter(
            torch.autograd.grad(
                outputs, wanted, grads, retain_graph=True, create_graph=torch.is_grad_enabled(), allow_unused=True
            )
        )
        return None, None, *(next(found) if need else None for need in needed)


def stack(
    mode: str, x: Tensor, hx, weights: list[Tensor], bias: bool, num_layers: int, dropout: float, training: bool,
    bidirectional: bool, batch_sizes: Tensor | None, needs_grad: bool,
):  # fmt: skip
    """Run a stack of layers as `torch.nn.LSTM` and its kin do: ``(y, hx)``; arguments as `fastrnn.ops.stack`."""
    options = (mode, bias, num_layers, dropout, training, bidirectional, batch_sizes)
    if _one_step(x, batch_sizes) and len(weights) == 2 + 2 * bias and (needs_grad or mode != "LSTM"):
        # The cell is the same step without what the layer prepares; for an LSTM with a gradient, oneDNN packs the
        # weights at every call, several times the work of a step forward and back.
        cell, _, nonlinearity = mode.lower().partition("_")
        states = [state[0] for state in (hx if mode == "LSTM" else (hx,))]
        h, *c = step(cell, nonlinearity, x[0], states, weights if bias else [*weights, None, None])
        # y and hn are the caller's to write into, and the backward of an RNN reads its h.
        y, hn = torch.stack((h,)) if cell == "rnn" else h.unsqueeze(0), torch.stack((h,))
        return y, (hn, c[0].unsqueeze(0)) if c else hn
    if not (needs_grad and x.device.type == "cuda"):
        return _fused(options, x, hx, weights)
    states = hx if mode == "LSTM" else (hx,)

    def run(fused: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        states_in = tensors[1 : 1 + len(states)]
        with contextlib.nullcontext() if fused else torch.backends.cudnn.flags(enabled=False):
            hx_in = states_in if mode == "LSTM" else states_in[0]
            y, hx_out = _fused(options, tensors[0], hx_in, list(tensors[1 + len(states) :]))
        return (y, *(hx_out if mode == "LSTM" else (hx_out,)))

    tensors = (x, *states, *weights)
    y, *ends = DoublyDifferentiable.apply(functools.partial(run, True), functools.partial(run, False), *tensors)
    return y, (tuple(ends) if mode == "LSTM" else ends[0])


def _one_step(x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether a CPU is to run one step that no trace records for other lengths, in the dtype of its arguments.

    Under autocast the LSTM's cell answers in another dtype than the LSTM.
    """
    plain = not torch.jit.is_tracing() and not torch.is_autocast_enabled("cpu")
    return batch_sizes is None and x.device.type == "cpu" and plain and x.shape[0] == 1


def _fused(options: tuple, x: Tensor, hx, weights: list[Tensor]):
    """API: ``torch._VF.lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``."""
    mode, bias, num_layers, dropout, training, bidirectional, batch_sizes = options
    function = {"LSTM": _VF.lstm, "GRU": _VF.gru, "RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu}[mode]
    if batch_sizes is None:
        result = function(x, hx, weights, bias, num_layers, dropout, training, bidirectional, False)
    else:
        result = function(x, batch_sizes, hx, weights, bias, num_layers, dropout, training, bidirectional)
    return (result[0], result[1:]) if mode == "LSTM" else result


def layer(cell: str, a: dict, needs_grad: bool) -> tuple[Tensor, ...]:
    """One layer in one direction, arguments by name as in the op's schema: ``(y, *states)``.

    A single step runs PyTorch's cell, which packs nothing.
    """
    mode = cell.upper() if cell != "rnn" else f"RNN_{a['nonlinearity'].upper()}"
    states = (a["h0"], a["c0"]) if cell == "lstm" else (a["h0"],)
    weights = [a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]]
    if a["x"].shape[0] != 1 or a.get("w_hr") is not None:
        return _layer(mode, a["x"], states, [*weights, a.get("w_hr")], a["reverse"], needs_grad)
    ends = step(cell, a.get("nonlinearity", ""), a["x"][0], states, weights)
    return (ends[0].unsqueeze(0), *ends)


def step(cell: str, nonlinearity: str, x: Tensor, states, weights: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The new states of one step from x (B, I), by PyTorch's cell (API: ``torch._VF.lstm_cell`` and its kin)."""
    if cell == "lstm":
        return _VF.lstm_cell(x, states, *weights)
    if cell == "gru":
        return (_VF.gru_cell(x, states[0], *weights),)
    return ((_VF.rnn_relu_cell if nonlinearity == "relu" else _VF.rnn_tanh_cell)(x, states[0], *weights),)


def _layer(mode: str, x: Tensor, states, weights: list[Tensor | None], reverse: bool, needs_grad: bool = False):
    """One layer in one direction through the fused RNN: ``(y, *states)``."""
    present, bias = [w for w in weights if w is not None], weights[2] is not None
    hx = tuple(s.unsqueeze(0) for s in states)
    y, out = stack(
        mode, x.flip(0) if reverse else x, hx if mode == "LSTM" else hx[0], present, bias, 1, 0.0, needs_grad, False,
        None, needs_grad,
    )  # fmt: skip
    out = out if mode == "LSTM" else (out,)
    return (y.flip(0) if reverse else y, *(s.squeeze(0) for s in out))


def lstm_forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, reverse, save):
    """`fastrnn.reference.lstm_forward` by the fused LSTM; gates and cells follow from ``y``."""
    y, hn, cn = _layer("LSTM", x, (h0, c0), [w_ih, w_hh, b_ih, b_hh, w_hr], reverse)
    if not save:
        return y.contiguous(), hn.clone(), cn.clone(), x.new_empty(0), x.new_empty(0)
    kept = reference.lstm_gates(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, reverse, y)
    return y.contiguous(), hn.clone(), cn.clone(), *kept


def gru_forward(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse, save):
    """`fastrnn.reference.gru_forward` by the fused GRU; the gates follow from ``y``."""
    y, hn = _layer("GRU", x, (h0,), [w_ih, w_hh, b_ih, b_hh], reverse)
    if not save:
        return y.contiguous(), hn.clone(), x.new_empty(0)
    gates = reference.gru_gates(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse, y)
    return y.contiguous(), hn.clone(), gates


def rnn_forward(x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse, nonlinearity):
    """`fastrnn.reference.rnn_forward` by the fused RNN."""
    y, hn = _layer(f"RNN_{nonlinearity.upper()}", x, (h0,), [w_ih, w_hh, b_ih, b_hh], reverse)
    return y.contiguous(), hn.clone()


def lstm_backward(dy, dhn, dcn, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, reset, reverse, y, gates, cells):
    """`fastrnn.reference.lstm_backward` by differentiating the fused LSTM."""
    grads = _differentiate("LSTM", (dy, dhn, dcn), x, (h0, c0), [w_ih, w_hh, b_ih, b_hh, w_hr], reverse)
    dx, dh0, dc0, dw_ih, dw_hh, db, _, dw_hr = grads
    return dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr


def gru_backward(dy, dhn, x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse, y, gates):
    """`fastrnn.reference.gru_backward` by differentiating the fused GRU."""
    return _differentiate("GRU", (dy, dhn), x, (h0,), [w_ih, w_hh, b_ih, b_hh], reverse)


def rnn_backward(dy, dhn, x, h0, w_ih, w_hh, b_ih, b_hh, lengths, reset, reverse, nonlinearity, y):
    """`fastrnn.reference.rnn_backward` by differentiating the fused RNN."""
    mode = f"RNN_{nonlinearity.upper()}"
    return _differentiate(mode, (dy, dhn), x, (h0,), [w_ih, w_hh, b_ih, b_hh], reverse)[:5]


def _differentiate(mode: str, grads, x: Tensor, states, weights: list[Tensor | None], reverse: bool):
    """Gradients of one fused layer in the order ``x, *states, *weights``; an absent weight gives an empty tensor."""
    with _autograd_within_an_op():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *states, *weights)]
        states_in, weights_in = tuple(leaves[1 : 1 + len(states)]), leaves[1 + len(states) :]
        outputs = _layer(mode, leaves[0], states_in, weights_in, reverse)
        found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], grads))
    return tuple(x.new_empty(0) if t is None else next(found).contiguous() for t in leaves)


@contextlib.contextmanager
def _autograd_within_an_op() -> Iterator[None]:
    """Record a graph although the body of an op runs below autograd."""
    names = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
    keys = [getattr(torch._C.DispatchKey, name) for name in names]
    excluded = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in excluded:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)
