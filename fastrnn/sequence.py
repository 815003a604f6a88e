"""SequenceState: what a network remembers of the ids it has read, as a value that can be kept, shared and saved."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .checkpoint import atomic_file
from .network import Network, State

FORMAT = "fastrnn-state-1"


@dataclasses.dataclass
class SequenceState:
    """What a network remembers of the ids it has read; any number of requests may start from it.

    hidden   h (L, 1, H), or (h, c) for the LSTM; for a network with window state the zero state
    logits   (V,) float32, of the next token
    tail     the last ids, int64, at most ``window`` of them (none for a carried state)
    seen     (V,) bool: ids that have occurred, for repetition_penalty;  length: how many ids were read
    """

    hidden: State
    logits: Tensor
    tail: Tensor
    seen: Tensor
    length: int

    def check(self, network: Network) -> None:
        """``ValueError`` when this state cannot be one of ``network``."""
        given = [tuple(s.shape) for s in _parts(self.hidden)]
        needed = [tuple(s.shape) for s in _parts(network.zero_state(1))]
        if given != needed or tuple(self.logits.shape) != (network.config.vocab_size,):
            raise ValueError(
                f"this state belongs to another network: it has hidden {given} and logits {tuple(self.logits.shape)}, "
                f"the network needs {needed} and ({network.config.vocab_size},)"
            )
        weight = network.head.weight
        if _parts(self.hidden)[0].dtype != weight.dtype or _parts(self.hidden)[0].device != weight.device:
            raise ValueError(
                f"this state is {_parts(self.hidden)[0].dtype} on {_parts(self.hidden)[0].device}, the network "
                f"{weight.dtype} on {weight.device}; use state.to(network.head.weight)"
            )
        if network.config.state == "window" and len(self.tail) == 0:
            raise ValueError("this state has read no ids, and a network with window state needs at least one")

    def to(self, like: Tensor) -> SequenceState:
        """The same state with the dtype (of hidden) and the device of ``like``."""
        hidden = tuple(part.to(like) for part in _parts(self.hidden))
        moved = (part.to(like.device) for part in (self.logits, self.tail, self.seen))
        return SequenceState(hidden if isinstance(self.hidden, tuple) else hidden[0], *moved, self.length)

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, atomically; ``OSError`` when that fails, an old file then being intact."""
        tensors = dict(zip(("h", "c"), _parts(self.hidden))) | {
            "logits": self.logits, "tail": self.tail, "seen": self.seen
        }  # fmt: skip
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with atomic_file(path) as file:
            file.write(save(tensors, metadata={"format": FORMAT, "length": str(self.length)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SequenceState:
        """Read what `save` wrote; ``ValueError`` says what is wrong with the file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no state file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as problem:
            raise ValueError(f"{path} is no whole safetensors file: {problem}") from problem
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is no saved state: its format is {metadata.get('format')!r}, needed is {FORMAT!r}"
            )
        hidden = (tensors["h"], tensors["c"]) if "c" in tensors else tensors["h"]
        return cls(hidden, tensors["logits"], tensors["tail"], tensors["seen"], int(metadata["length"]))


def _parts(hidden: State) -> tuple[Tensor, ...]:
    return hidden if isinstance(hidden, tuple) else (hidden,)

def window_tail(prompt: Tensor, state: SequenceState | None, window: int) -> Tensor:
    """The last ``window`` ids of a state's tail and a prompt."""
    return (prompt if state is None else torch.cat([state.tail.cpu(), prompt]))[-window:]
