"""Drop-in twins of torch.nn's LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell.

Same constructor arguments, attributes, parameter names, initial weights for a seed, state_dict, errors and results as
the torch.nn class of the same name, plus `reset=` masks in forward and, of LSTM, GRU and RNN, `recompute`. A call that
torch.nn refuses is refused in torch.nn's own words.

With `recompute=True`, an argument or at any time an attribute, backward finds the gates of every step again from the
layer's output instead of having forward keep them: forward keeps H numbers a step and row instead of 6 H (LSTM) or 5 H
(GRU), beside the layer's input, and backward has the work of forward once more. The RNN never keeps more.

Two differences are on purpose:

* LSTM, GRU and RNN derive from torch.nn.RNNBase and not from torch.nn.LSTM, GRU and RNN, because torch.compile breaks
  the graph at every subclass of those: `isinstance(layer, torch.nn.LSTM)` is False. `layer.to_torch()` is the way back.
  The cells do derive from torch.nn.LSTMCell, GRUCell and RNNCell.
* The weights are read at every forward. Nothing is cached, so parametrizations, weight drop and
  torch.func.functional_call always take effect; `_flat_weights` lists the current weights.

Dimensions: T time, B batch, I input_size, H hidden_size, P proj_size (H without projection), L num_layers, D directions
(1 or 2).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import direct, ops
from .cells import GRUCell, LSTMCell, RNNCell, State, Twin, check_reset, fx_leaf, same_kind

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class _Layers(Twin, nn.RNNBase):
    """The stack of layers behind LSTM, GRU and RNN."""

    __jit_unused_properties__: ClassVar = ["all_weights", "_flat_weights"]
    _states = 1
    recompute: bool = False  # a converted layer, and one unpickled from before there was the argument, has none

    def _weights(self) -> list[Tensor]:
        """The current weights in `_flat_weights_names` order; AttributeError names one that is missing."""
        parameters = self._parameters
        # The dictionary first: nn.Module.__getattr__ costs 0.4 us a weight, more than a small cell's step.
        return [parameters[name] if name in parameters else getattr(self, name) for name in self._flat_weights_names]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None):
                setattr(self, name, weight)

    def __setattr__(self, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)  # torch.nn.RNNBase would update its cache here

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []
        self.flatten_parameters()

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Lay CUDA parameters out in one chunk, as cuDNN likes them; do nothing elsewhere and for computed weights."""
        weights = [self._parameters.get(name) for name in self._flat_weights_names]
        if all(weight is not None and weight.is_cuda for weight in weights):
            super().flatten_parameters()

    def _fits(self, x: Tensor, hx: Any, weight: Tensor, batch: tuple[int, ...]) -> bool:
        """Whether torch.nn would take the call, as far as x (…, I), hx and the first weight can say."""
        if x.size(-1) != self.input_size or x.device != weight.device or x.size(0) == 0:
            return False
        autocast = torch._C._is_any_autocast_enabled()
        if x.dtype != weight.dtype and not autocast:
            return False
        if hx is None:
            return True
        lead = (self.num_layers * (2 if self.bidirectional else 1), *batch)
        h_shape = (*lead, self.proj_size or self.hidden_size)
        if self._states == 1:
            return same_kind(hx, x, h_shape, autocast)
        return (
            isinstance(hx, (tuple, list))
            and len(hx) == 2
            and same_kind(hx[0], x, h_shape, autocast)
            and same_kind(hx[1], x, (*lead, self.hidden_size), autocast)
        )

    def _refuse(self, input: Any, hx: Any) -> None:
        """Raise what torch.nn raises for this call."""
        self._torch.forward(self, input, hx)
        # torch.nn.LSTM leaves a PackedSequence unchecked, and may broadcast a state that does not fit.
        data, batch_sizes = input[:2] if isinstance(input, PackedSequence) else (input, None)
        self.check_forward_args(data, hx, batch_sizes)
        raise ValueError(
            f"{self._get_name()}: input and hx must share the dtype and device of the weights, got input "
            f"{data.dtype} on {data.device}, weights {self._weights()[0].dtype} on {self._weights()[0].device}"
        )

    def _zeros(self, x: Tensor, batch: int) -> State:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        c = torch.zeros(rows, batch, self.hidden_size, dtype=x.dtype, device=x.device)
        if self._states == 1:
            return c
        if not self.proj_size:
            return c, c
        return torch.zeros(rows, batch, self.proj_size, dtype=x.dtype, device=x.device), c

    def _directly(self, x: Tensor, hx: Any, weights: list[Tensor]):
        if self.proj_size or (self.dropout and self.training) or (self.recompute and torch.is_grad_enabled()):
            return None
        return direct.stack(
            self.mode,
            x,
            hx,
            weights,
            inputs=self.input_size,
            hidden=self.hidden_size,
            bias=self.bias,
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            training=self.training,
        )

    def _run(self, x: Tensor, hx: State, weights: list[Tensor], batch_sizes: Tensor | None, reset: Tensor | None):
        return ops.stack(
            self.mode,
            x,
            hx,
            weights,
            bias=self.bias,
            num_layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_sizes=batch_sizes,
            reset=reset,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None, *, reset: Any = None):
        """Run the sequence through all layers.

        input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence; of the weights' dtype.
        hx: initial state, zeros if None; (L*D, B, P), unbatched (L*D, P); for LSTM a pair with the cells (L*D, B, H).
        reset: bool (T, B), (B, T) with batch_first, (T,) unbatched, or a PackedSequence of bools packed like input.
          Where True, a new sequence starts: the forward direction zeroes the row's state before that step, and the
          backward direction, which comes from the other side, zeroes it after that step. Gradients stop there too.
        Returns output (…, D*P), packed where the input is, and the last state, shaped like hx.
        Errors: torch.nn's types and texts; TypeError or ValueError for a reset that does not fit.
        """
        if isinstance(input, PackedSequence):
            # The shapes depend on the values of batch_sizes, so a compiler cannot trace it: it runs as it is.
            packed = self._forward_packed
            return (torch.compiler.disable(packed) if torch.compiler.is_compiling() else packed)(input, hx, reset)
        weights = self._weights()
        batched = isinstance(input, Tensor) and input.dim() == 3
        batch_first = batched and self.batch_first
        if not batched:
            if not isinstance(input, Tensor) or input.dim() != 2 or not self._fits(input, hx, weights[0], ()):
                if (node := fx_leaf(self, input, hx, reset)) is not None:
                    return node
                self._refuse(input, hx)
            x = input.unsqueeze(1)
            if hx is not None:
                hx = hx.unsqueeze(1) if self._states == 1 else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        else:
            x = input.transpose(0, 1) if batch_first else input
            if reset is None and (results := self._directly(x, hx, weights)) is not None:
                return (results[0].transpose(0, 1), results[1]) if batch_first else results
            if not self._fits(x, hx, weights[0], (x.size(1),)):
                self._refuse(input, hx)
        if reset is not None:
            words = "(T, B)" if batched else "(T,)"
            check_reset(reset, tuple(input.shape[:-1]), "(B, T)" if batch_first else words, x.device)
            reset = reset.unsqueeze(1) if not batched else reset.transpose(0, 1) if batch_first else reset
        y, hn = self._run(x, self._zeros(x, x.size(1)) if hx is None else hx, weights, None, reset)
        if not batched:
            return y.squeeze(1), (hn.squeeze(1) if self._states == 1 else (hn[0].squeeze(1), hn[1].squeeze(1)))
        return y.transpose(0, 1) if batch_first else y, hn

    def _forward_packed(self, input: PackedSequence, hx: State | None, reset: Any):
        data, batch_sizes, order, back = input
        weights = self._weights()
        batch = int(batch_sizes[0])
        if data.dim() != 2 or not self._fits(data, hx, weights[0], (batch,)):
            self._refuse(input, hx)
        hx = self._zeros(data, batch) if hx is None else self.permute_hidden(hx, order)
        if reset is not None:
            reset = self._packed_reset(reset, input)
        y, hn = self._run(data, hx, weights, batch_sizes, reset)
        return PackedSequence(y, batch_sizes, order, back), self.permute_hidden(hn, back)

    @staticmethod
    def _packed_reset(reset: Any, input: PackedSequence) -> Tensor:
        """The bools of `reset`, a row each of input.data."""
        if not isinstance(reset, PackedSequence):
            raise TypeError(
                "reset must be a PackedSequence of bools because input is a PackedSequence, got "
                f"{type(reset).__name__}: pack the mask with the lengths of the input"
            )
        orders = (reset.sorted_indices, input.sorted_indices)
        same_order = orders[0] is orders[1] or (None not in orders and torch.equal(*orders))
        if not torch.equal(reset.batch_sizes, input.batch_sizes) or not same_order:
            raise ValueError(
                f"reset must be packed like input, with batch_sizes {input.batch_sizes.tolist()} and the same order of "
                f"rows, got batch_sizes {reset.batch_sizes.tolist()}: pack the mask with the lengths of the input"
            )
        check_reset(reset.data, (input.data.size(0),), "(sum of lengths,)", input.data.device)
        return reset.data


class LSTM(_Layers):
    """torch.nn.LSTM: i, f, o = sigmoid, g = tanh; c' = f c + i g; h' = o tanh(c'), projected to P if proj_size > 0.

    Arguments as torch.nn.LSTM's. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    _torch = nn.LSTM
    _states = 2
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **unknown: Any,  # nn.RNNBase names what it does not know
    ) -> None:
        args = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *args, device, dtype, **unknown)
        self.recompute = recompute


def _refuse_proj_size(unknown: dict[str, Any]) -> None:
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class GRU(_Layers):
    """torch.nn.GRU: r, z = sigmoid; n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h' = (1 - z) n + z h.

    Arguments as torch.nn.GRU's. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    _torch = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **unknown: Any,
    ) -> None:
        _refuse_proj_size(unknown)
        args = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        super().__init__("GRU", *args, device, dtype, **unknown)
        self.recompute = recompute


class RNN(_Layers):
    """torch.nn.RNN: h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in place of tanh.

    Arguments as torch.nn.RNN's: nonlinearity comes fourth.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    _torch = nn.RNN
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **unknown: Any,
    ) -> None:
        _refuse_proj_size(unknown)
        modes = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}
        if nonlinearity not in modes:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        args = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0)
        super().__init__(modes[nonlinearity], *args, device, dtype, **unknown)
        self.recompute = recompute
        self.nonlinearity = nonlinearity
