"""LSTMCell, GRUCell and RNNCell: one step of torch.nn's cells; and what they share with the layers of `layers.py`.

The classes derive from torch.nn's of the same name: arguments, parameters, initial weights, state_dict and repr are
theirs.
Dimensions: B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import direct, ops

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

State = Tensor | tuple[Tensor, Tensor]


class Twin(nn.Module):
    """What the six classes share: the torch.nn class that they stand in for, and the way back to it."""

    _torch: type[nn.Module]

    def to_torch(self) -> nn.Module:
        """A module of the torch.nn class with the same Parameter objects, hooks and settings; this one stays as it is.

        To swap the layers of a whole model back in place, use `fastrnn.to_torch(model)`.
        TypeError for a subclass of ours: torch.nn has no twin of it.
        """
        from .conversion import twin

        return twin(self)

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script cannot compile the operators' Python fronts; it can compile torch.nn's forward.
        warnings.warn(
            f"torch.jit.script compiles fastrnn.{self._get_name()} as torch.nn.{self._torch.__name__} with the same "
            "parameters, and leaves that layer in its parent: script a copy.deepcopy of the model to keep the original",
            stacklevel=2,
        )
        return self.to_torch()


def fx_leaf(module: nn.Module, input: Any, hx: Any, reset: Any) -> Any:
    """The node of torch.fx.symbolic_trace for a call of `module`, kept whole as torch.nn's layers are; else None."""
    from torch.fx import Proxy

    if not isinstance(input, Proxy):
        return None
    args = (input,) if hx is None else (input, hx)
    kwargs = {} if reset is None else {"reset": reset}
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), args, kwargs)


def same_kind(state: Any, like: Tensor, shape: tuple[int, ...], autocast: bool) -> bool:
    """Whether `state` is a tensor of this shape, on the device and (without autocast) of the dtype of `like`."""
    return (
        isinstance(state, Tensor)
        and state.shape == shape
        and (state.dtype == like.dtype or autocast)
        and state.device == like.device
    )


def check_reset(reset: Any, shape: tuple[int, ...], words: str, device: torch.device) -> None:
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool tensor of shape {words} = {shape}, got {type(reset).__name__}")
    if reset.dtype != torch.bool or reset.shape != shape or reset.device != device:
        raise ValueError(
            f"reset must be a bool tensor of shape {words} = {shape} on {device}, "
            f"got {reset.dtype} of shape {tuple(reset.shape)} on {reset.device}"
        )


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class _Cell(Twin):
    """What the three cells share: one step of ops.lstm, ops.gru or ops.rnn."""

    _states = 1

    _cell: str

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], reset: Tensor | None) -> Any:
        raise NotImplementedError

    def _directly(self, x: Any, hx: Any, weights: list[Tensor]) -> tuple[Tensor, ...] | None:
        return direct.step(self._cell, x, hx, weights, self.input_size, self.hidden_size)

    def forward(self, input: Tensor, hx: State | None = None, *, reset: Tensor | None = None) -> Any:
        """One step.

        input: (B, I) or (I,); hx: (B, H) or (H,), zeros if None; for LSTMCell a pair (h, c) of them.
        reset: bool (B,), or () for an unbatched input: the state of the rows where it is True is zeroed first.
        Returns the next h, for LSTMCell (h, c), shaped like hx. Errors: torch.nn's; TypeError or ValueError for reset.
        """
        parameters = self._parameters
        weights = [parameters[name] if name in parameters else getattr(self, name) for name in _CELL_WEIGHTS]
        if reset is None and (new := self._directly(input, hx, weights)) is not None:
            return new[0] if self._states == 1 else new
        if not self._fits(input, hx, weights[0]):
            if (node := fx_leaf(self, input, hx, reset)) is not None:
                return node
            self._torch.forward(self, input, hx)  # raises what torch.nn raises
            raise ValueError(f"{self._get_name()}: input and hx must have the dtype and device of the weights")
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input[None, None]
        if hx is None:
            zeros = torch.zeros(x.size(1), self.hidden_size, dtype=x.dtype, device=x.device)
            states = (zeros,) * self._states
        else:
            states = (hx,) if self._states == 1 else hx
            states = tuple(states) if batched else tuple(state.unsqueeze(0) for state in states)
        if reset is not None:
            check_reset(reset, tuple(input.shape[:-1]), "(B,)" if batched else "()", input.device)
            reset = reset.reshape(1, -1)
        new = self._step(x, states, weights, reset)
        if not batched:
            new = tuple(state.squeeze(0) for state in new)
        return new[0] if self._states == 1 else new

    def _fits(self, x: Any, hx: Any, weight: Tensor) -> bool:
        """Whether torch.nn would take the call, as far as x, hx and the first weight can say."""
        if not isinstance(x, Tensor) or x.dim() not in (1, 2):
            return False
        if x.size(-1) != self.input_size or x.device != weight.device:
            return False
        autocast = torch._C._is_any_autocast_enabled()
        if x.dtype != weight.dtype and not autocast:
            return False
        if hx is None:
            return True
        shape = (*x.shape[:-1], self.hidden_size)
        if self._states == 1:
            return same_kind(hx, x, shape, autocast)
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2
        return pair and all(same_kind(state, x, shape, autocast) for state in hx)


class LSTMCell(_Cell, nn.LSTMCell):
    """torch.nn.LSTMCell: one step of LSTM. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html"""

    _torch = nn.LSTMCell
    _cell = "lstm"
    _states = 2

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], reset: Tensor | None) -> Any:
        return ops.lstm(x, *states, *weights, reset=reset)[1:]


class GRUCell(_Cell, nn.GRUCell):
    """torch.nn.GRUCell: one step of GRU. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html"""

    _torch = nn.GRUCell
    _cell = "gru"

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], reset: Tensor | None) -> Any:
        return ops.gru(x, *states, *weights, reset=reset)[1:]


class RNNCell(_Cell, nn.RNNCell):
    """torch.nn.RNNCell: one step of RNN. Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html"""

    _torch = nn.RNNCell
    _cell = "rnn"

    def _directly(self, x: Any, hx: Any, weights: list[Tensor]) -> tuple[Tensor, ...] | None:
        if self.nonlinearity not in ("tanh", "relu"):
            return None
        return direct.step("rnn", x, hx, weights, self.input_size, self.hidden_size, self.nonlinearity)

    def _fits(self, x: Any, hx: Any, weight: Tensor) -> bool:
        return self.nonlinearity in ("tanh", "relu") and super()._fits(x, hx, weight)

    def _step(self, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], reset: Tensor | None) -> Any:
        return ops.rnn(x, *states, *weights, nonlinearity=self.nonlinearity, reset=reset)[1:]
