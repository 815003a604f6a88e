"""Network: token ids -> recurrent layers -> logits, the model family of every char, word and BPE generator here.

A network is an input (``embedding``, ``onehot`` or ``scalar``), a stack of one cell, an optional dropout and a linear
head on all steps or on the last one. It knows token ids, not text; ``models.LanguageModel`` adds the tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import layers, ops

INPUTS = ("embedding", "onehot", "scalar")
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
HEADS = ("all", "last")
STATES = ("carried", "window")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

# Names that published models give to the three parts, and ours.
PART_NAMES = {
    "rnn": "rnn", "lstm": "rnn", "gru": "rnn", "rnns": "rnn", "cell": "rnn",
    "head": "head", "fc": "head", "linear": "head", "decoder": "head", "out": "head", "output": "head", "dense": "head",
    "embedding": "embedding", "embeddings": "embedding", "embed": "embedding", "emb": "embedding",
    "encoder": "embedding",
}  # fmt: skip

State = Tensor | tuple[Tensor, Tensor]


@dataclasses.dataclass
class NetworkConfig:
    """What a network is made of; ``ValueError`` says which field is wrong, what it was and what it may be.

    vocab_size     V, the number of token ids and of logits
    input          ``embedding``: a learned row per id; ``onehot``: W_ih has V columns; ``scalar``: the number id/V
    embedding_dim  E, only for input="embedding"; None means hidden_size
    cell           ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``;  hidden_size H;  num_layers L
    dropout        probability, between the layers and before the head, in training only
    head           ``all``: logits for every step; ``last``: for the last step of the sequence
    state          how generation remembers: ``carried`` from token to token, or ``window``: the last ``window`` ids are
                   run again from a zero state for each new token
    tie_weights    the head shares the embedding's matrix (needs embedding_dim == hidden_size)
    """

    vocab_size: int
    input: str = "embedding"
    embedding_dim: int | None = None
    cell: str = "lstm"
    hidden_size: int = 128
    num_layers: int = 1
    dropout: float = 0.0
    head: str = "all"
    state: str = "carried"
    window: int | None = None
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("input", INPUTS), ("cell", CELLS), ("head", HEADS), ("state", STATES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"NetworkConfig: {name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.input == "embedding" and self.embedding_dim is None:
            self.embedding_dim = self.hidden_size
        for name in ("vocab_size", "hidden_size", "num_layers", "embedding_dim", "window"):
            value = getattr(self, name)
            optional = name in ("embedding_dim", "window") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"NetworkConfig: {name} must be a whole number of at least 1, got {value!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"NetworkConfig: dropout must be a probability in [0, 1), got {self.dropout!r}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.input != "embedding" and self.embedding_dim is not None:
            raise ValueError(
                f"NetworkConfig: embedding_dim={self.embedding_dim} needs input='embedding', got {self.input!r}"
            )
        if self.state == "window" and self.window is None:
            raise ValueError(
                "NetworkConfig: state='window' needs window=, the number of ids that are run for each token"
            )
        if self.state == "carried" and self.window is not None:
            raise ValueError(f"NetworkConfig: window={self.window} needs state='window', got state='carried'")
        if self.tie_weights and (self.input != "embedding" or self.embedding_dim != self.hidden_size):
            raise ValueError(
                "NetworkConfig: tie_weights needs input='embedding' with embedding_dim == hidden_size, got "
                f"input={self.input!r}, embedding_dim={self.embedding_dim}, hidden_size={self.hidden_size}"
            )

    @property
    def input_size(self) -> int:
        """I of the first layer."""
        return {"embedding": self.embedding_dim or 0, "onehot": self.vocab_size, "scalar": 1}[self.input]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> NetworkConfig:
        """The config of ``fields``; a missing vocab_size or an unknown field is a ``ValueError`` that names it."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"NetworkConfig: unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if "vocab_size" not in fields:
            raise ValueError("NetworkConfig: vocab_size is missing")
        return cls(**fields)


class Network(nn.Module):
    """Input -> recurrent stack -> dropout -> linear head, as ``config`` says.

    Parts: ``embedding`` (``nn.Embedding`` or None), ``rnn`` (a fastrnn layer, batch_first), ``dropout``, ``head``
    (``nn.Linear``). The parts are made in the order embedding, rnn, head, so a model written with torch.nn in that
    order has the same initial weights for the same ``torch.manual_seed``.
    """

    def __init__(self, config: NetworkConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        make = {"device": device, "dtype": dtype}
        self.embedding = None
        if config.input == "embedding":
            self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim, **make)
        self.rnn = _make_layers(config, make)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, **make)
        if config.tie_weights:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits and the state after the last step.

        ids (B, T) int64 in [0, V); state h (L, B, H), or (h, c) for the LSTM, or None for zeros; reset (B, T) bool or
        None: True zeroes the state of that row before that step. Returns logits (B, T, V) for head "all", (B, V) for
        "last".
        """
        if ids.dim() != 2:
            raise ValueError(
                f"Network: ids must be (B, T), got shape {tuple(ids.shape)}; add a dimension for one sequence"
            )
        if self.config.head == "last" and ids.shape[1] == 0:
            raise ValueError("Network: head 'last' needs at least one step, got ids with T=0")
        if self.gathers_columns:
            y, state = self._run_columns(ids, state, reset)
        else:
            y, state = self.rnn(self.inputs(ids), state, **({} if reset is None else {"reset": reset}))
        if self.config.head == "last":
            y = y[:, -1]
        return self.head(self.dropout(y)), state

    @property
    def gathers_columns(self) -> bool:
        """Whether one-hot input gathers columns of W_ih, as it does where V exceeds the gates: no (B, T, V) then."""
        config = self.config
        return config.input == "onehot" and config.vocab_size > GATES[config.cell] * config.hidden_size

    def inputs(self, ids: Tensor) -> Tensor:
        """x of the first layer, ids.shape + (I,): the embedding's rows, one-hot rows, or id/V (scalar)."""
        if self.embedding is not None:
            return self.embedding(ids)
        dtype = self.head.weight.dtype
        if self.config.input == "onehot":
            return F.one_hot(ids, self.config.vocab_size).to(dtype)
        return (ids.to(dtype) / self.config.vocab_size).unsqueeze(-1)

    def weights(self) -> list[Tensor]:
        """The stack's weights in torch.nn's order, with those of the first layer as ``run`` needs them."""
        return [getattr(self.rnn, name) for name in self.rnn._flat_weights_names]

    def _run_columns(self, ids: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """The stack with x = the columns of W_ih that ids name, and the identity in W_ih's place (an exact product)."""
        weights = self.weights()
        x, weights[0] = column_inputs(ids.t(), weights[0])
        if state is None:
            state = self.zero_state(ids.shape[0])
        y, state = ops.stack(
            self.rnn.mode, x, state, weights, bias=self.rnn.bias, num_layers=self.rnn.num_layers,
            dropout=self.rnn.dropout, training=self.training, bidirectional=False,
            reset=None if reset is None else reset.t(), recompute=self.rnn.recompute,
        )  # fmt: skip
        return y.transpose(0, 1), state

    def input_table(self) -> tuple[Tensor, list[Tensor]]:
        """(table, weights): the stack with ``weights`` on x = table[ids] is this network's, for any input kind."""
        weights, config, like = self.weights(), self.config, self.head.weight
        if self.embedding is not None:
            return self.embedding.weight, weights
        if self.gathers_columns:
            table = weights[0].t().contiguous()
            return table, [torch.eye(table.shape[1], dtype=like.dtype, device=like.device), *weights[1:]]
        if config.input == "onehot":
            return torch.eye(config.vocab_size, dtype=like.dtype, device=like.device), weights
        return self.inputs(torch.arange(config.vocab_size, device=like.device)), weights

    def zero_state(self, batch: int) -> State:
        """The state before the first token: h (L, B, H), or (h, c) for the LSTM."""
        h = self.head.weight.new_zeros(self.config.num_layers, batch, self.config.hidden_size)
        return (h, torch.zeros_like(h)) if self.config.cell == "lstm" else h

    def load_renamed_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights saved from a torch.nn model that names its parts otherwise (``lstm``/``fc``, ``gru``/``linear``,
        ...).

        The names of the published tutorials are known; ``ValueError`` names what is missing, unknown or of another
        shape.
        """
        renamed = rename_state_dict(state_dict)
        wanted = self.state_dict()
        missing, unknown = sorted(set(wanted) - set(renamed)), sorted(set(renamed) - set(wanted))
        if missing or unknown:
            raise ValueError(
                f"state_dict does not fit this network ({self.config.input} input, {self.config.num_layers} x "
                f"{self.config.cell}): missing {', '.join(missing) or 'nothing'}; "
                f"unknown {', '.join(unknown) or 'nothing'}"
            )
        for name, tensor in renamed.items():
            if tensor.shape != wanted[name].shape:
                raise ValueError(
                    f"state_dict: {name} must be {tuple(wanted[name].shape)} for this network, "
                    f"got {tuple(tensor.shape)}"
                )
        self.load_state_dict(renamed)


def _make_layers(config: NetworkConfig, make: dict[str, Any]) -> nn.Module:
    kind = {"lstm": layers.LSTM, "gru": layers.GRU}.get(config.cell, layers.RNN)
    options: dict[str, Any] = {"nonlinearity": config.cell.removeprefix("rnn_")} if kind is layers.RNN else {}
    if config.num_layers > 1:
        options["dropout"] = config.dropout
    return kind(config.input_size, config.hidden_size, config.num_layers, batch_first=True, **options, **make)


def column_inputs(ids: Tensor, w_ih: Tensor) -> tuple[Tensor, Tensor]:
    """(x, identity) with x @ identity.T = one_hot(ids) @ w_ih.T, for ids (T, B), w_ih (GH, V): a gather, no product."""
    return F.embedding(ids, w_ih.t()), torch.eye(w_ih.shape[0], dtype=w_ih.dtype, device=w_ih.device)


def rename_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` with its first name part mapped to ours: embedding, rnn, head; unknown names stay as they are."""
    renamed = {}
    for name, tensor in state_dict.items():
        part, dot, rest = name.removeprefix("module.").partition(".")
        renamed[PART_NAMES.get(part.lower(), part) + dot + rest] = tensor
    return renamed
