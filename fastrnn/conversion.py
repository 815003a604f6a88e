"""Swap the recurrent layers of a model between torch.nn and fastrnn, in place.

A swap changes the class of a module object and nothing else: parameters, buffers, hooks and their handles, the training
flag, parametrizations, shared instances and every reference that the user's code holds stay valid.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import layers

__all__ = ["convert", "to_torch", "twin"]

M = TypeVar("M", bound=nn.Module)

_OURS = {getattr(nn, cls.__name__): cls for cls in (getattr(layers, name) for name in layers.__all__)}
_THEIRS = {cls: theirs for theirs, cls in _OURS.items()}


def convert(model: M) -> M:
    """Make every torch.nn LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell of `model` a fastrnn layer, in place.

    The module objects stay the same, and so do their Parameter objects, hooks, training flags and parametrizations; the
    model itself may be such a layer. Returns the model. A subclass of a torch.nn class, which may have code of its own,
    and a layer whose `forward` has been replaced on the instance are left alone, each with a UserWarning that names it.
    Afterwards `isinstance(layer, torch.nn.LSTM)` is False, for GRU and RNN too, while torch.nn.RNNBase, and for cells
    torch.nn.LSTMCell and so on, still hold. `to_torch` swaps back.
    """
    return _swap(model, _OURS, "convert")


def to_torch(model: M) -> M:
    """Make every fastrnn layer of `model` the torch.nn layer of the same name, in place: the inverse of `convert`."""
    return _swap(model, _THEIRS, "to_torch")


def twin(module: nn.Module) -> nn.Module:
    """A torch.nn module with the Parameter objects, hooks and settings of the fastrnn layer `module`, left as it is."""
    target = _target(module, _THEIRS)
    if target is None:
        raise TypeError(
            f"to_torch: {type(module).__name__} is not exactly one of fastrnn's {', '.join(layers.__all__)}, so "
            "torch.nn has no twin of it: build the torch.nn layer and load this one's state_dict"
        )
    if "forward" in vars(module):
        raise TypeError("to_torch: the layer's forward has been replaced on the instance; delete that attribute first")
    new = target.__new__(target)
    # Containers are copied, so that what is added to one module does not appear in the other; contents are shared.
    copied = (dict, list, set)
    new.__dict__ = {key: value.copy() if isinstance(value, copied) else value for key, value in vars(module).items()}
    _adopt(new, target)
    return new


def _swap(model: M, table: dict[type, type], what: str) -> M:
    for name, module in model.named_modules():
        target = _target(module, table)
        if target is not None and "forward" not in vars(module):
            _adopt(module, target)
            continue
        if target is not None:
            reason = "its forward has been replaced on the instance"
        elif isinstance(module, tuple(table)) and not (table is _OURS and isinstance(module, tuple(_THEIRS))):
            reason = f"{type(module).__name__} is a subclass and may have code of its own"
        else:
            continue
        warnings.warn(f"fastrnn.{what} leaves {repr(name) if name else 'the model'} alone: {reason}", stacklevel=3)
    return model


def _target(module: nn.Module, table: dict[type, type]) -> type | None:
    """The class to give to `module`: the table's, for a parametrized module one made from it; None if there is none."""
    cls = type(module)
    if cls in table:
        return table[cls]
    # torch's parametrize gives such a module a generated class whose only base is the original class.
    if is_parametrized(module) and cls.__bases__[0] in table:
        target = table[cls.__bases__[0]]
        names = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", "__doc__")}
        return type(f"Parametrized{target.__name__}", (target,), names)
    return None


def _adopt(module: nn.Module, target: type) -> None:
    """Give `module` the class `target` and, for torch.nn's layers, rebuild the weight cache that ours do without."""
    vars(module).pop("_flat_weights", None)
    module.__class__ = target
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
