"""What the layer tests share: torch.nn's and our module with equal weights, and every output and gradient of a run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastrnn import layers
from oracle import assert_all_close

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours with the same weights."""
    theirs, ours = getattr(nn, name)(*args, **kwargs), getattr(layers, name)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_state(module: nn.Module, *batch: int, **like) -> Tensor | tuple[Tensor, Tensor]:
    """A random initial state of a layer or a cell; `batch` is (B,) or nothing for unbatched input."""
    if isinstance(module, nn.RNNCellBase):
        lead, width = batch, module.hidden_size
    else:
        lead = (module.num_layers * (2 if module.bidirectional else 1), *batch)
        width = module.proj_size or module.hidden_size
    h = torch.randn(*lead, width, **like)
    return (h, torch.randn(*lead, module.hidden_size, **like)) if module._get_name().startswith("LSTM") else h


def flat(value) -> list[Tensor]:
    """The tensors in a result or an argument."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if value is not None else []


def cast(value, dtype: torch.dtype):
    """The argument as a fresh leaf of that dtype with a gradient to come."""
    if isinstance(value, PackedSequence):
        return PackedSequence(cast(value.data, dtype), *value[1:])
    if isinstance(value, (tuple, list)):
        return tuple(cast(part, dtype) for part in value)
    return value if value is None else value.detach().to(dtype).requires_grad_()


def outcome(module: nn.Module, input, hx, dtype: torch.dtype, gradients: bool = True, **kwargs) -> list[Tensor]:
    """Every output and state of one call, then the gradients of input, hx and parameters for a fixed random loss.

    What the loss does not depend on, like the initial state of a row that is reset, has a gradient of zero.
    """
    module, input, hx = module.to(dtype), cast(input, dtype), cast(hx, dtype)
    outputs = flat(module(input, hx, **kwargs))
    if not gradients:
        return outputs
    generator = torch.Generator().manual_seed(7)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs)
    wanted = [*flat(input), *flat(hx), *module.parameters()]
    return [*outputs, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def assert_same(
    theirs: nn.Module,
    ours: nn.Module,
    input,
    hx=None,
    dtype=torch.float64,
    gradients: bool = True,
    one_scale: bool = False,
    **kwargs,
) -> None:
    """Hold our outputs, states and every gradient to torch.nn's in float64, by torch.nn's own error in `dtype`.

    In float64, which has no such error, `one_scale` holds gradients to the largest of them (`oracle.assert_all_close`).
    """
    expected = outcome(theirs, input, hx, torch.float64, gradients)
    plain = None if dtype == torch.float64 else outcome(theirs, input, hx, dtype, gradients)
    found = outcome(ours, input, hx, dtype, gradients, **kwargs)
    if not (one_scale and gradients and dtype == torch.float64):
        return assert_all_close(found, expected, plain, f"{ours}")
    first = len(expected) - len([*flat(input), *flat(hx), *theirs.parameters()])  # gradient
    assert_all_close(found[:first], expected[:first], None, f"{ours}")
    assert_all_close(found[first:], expected[first:], None, f"{ours}, gradients", one_scale=True)
