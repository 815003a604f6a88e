"""The generation loop on a GPU: for each token a step of every layer, the head with the draw, and the feedback.

Nothing comes from the host in between. A row of the batch has its next input, its place in the random numbers, what it
may still draw and its sampling parameters in memory; the feedback writes the token back, and where a row has ended it
takes the next request of a queue with its parameters and the state after its prompt. So a chain of tokens is a chain
of launches, the same one each time, which a CUDA graph holds.

A row's tokens do not depend on the rows beside it: the blocks of all products depend on the network alone.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from . import gru, lstm, rnn, tuning
from .head import head_draw
from .launch import Variant, precision, run, variant
from .sample import on_device, sample

# The integer columns of a row: numbers[COLUMN, row]. Behind them stand the ids that end it, -1 where there are fewer.
COLUMNS = ("top_k", "top_p", "seed", "sequence", "step", "left", "item", "mode_of", "id", "move")
REALS = ("scale", "min_p", "penalty", "inverse")
STEP, LEFT, ITEM, ID, MOVE = (tl.constexpr(COLUMNS.index(name)) for name in ("step", "left", "item", "id", "move"))
REAL_COLUMNS = tl.constexpr(len(REALS))
FIRST_EOS = tl.constexpr(len(COLUMNS))

ROWS = 16  # the batch in memory is a multiple of this: whole blocks of the products, aligned rows
KEPT_GRAPHS = 8  # of a loop; the one whose last use is longest ago goes
TABLE_BYTES = 64 << 20  # a larger table of the first layer's pre-activations costs more memory than its product time


@triton.jit
def copy_column(p_from, p_to, at_from, at_to, size, BLOCK: tl.constexpr):
    """``size`` numbers from one place to another."""
    for first in range(0, size, BLOCK):
        o = first + tl.arange(0, BLOCK)
        tl.store(p_to + at_to + o, tl.load(p_from + at_from + o, o < size), o < size)


@triton.jit(do_not_specialize=["k", "rows", "capacity"])
def feedback_kernel(
    p_numbers, p_reals, p_state, p_seen, p_next_numbers, p_next_reals, p_next_state, p_next_seen, p_taken, p_token,
    p_status, p_logprob, p_events, p_logprobs, k, span, rows, capacity, vocabulary,
    H: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a row's token k does to the row; without tokens, work for the rows that have none.

    An event (item, token) is kept for the host, -status in place of a token that could not be drawn. The row that has
    ended, by an id that ends it, by its count or by a status, takes the next of the queue's ``p_taken[1]`` items, or
    has none from then on.

    Owns: program r the columns, the state and the seen ids of row r. Keeps: nothing. Moves: a row's columns; of a row
    that takes an item the state too. Syncs: one atomic a row that has ended, so that which row takes which item depends
    on the moment. Limits: none.
    """
    i_row, vast = tl.program_id(0), rows.to(tl.int64)
    p_row = p_numbers + i_row
    item = tl.load(p_row + ITEM * vast)
    if p_token is None:
        ended = item < 0
    else:
        token, status = tl.load(p_token + i_row), tl.load(p_status + i_row)
        at = k * vast + i_row
        tl.store(p_events + at, item)
        tl.store(p_events + span + at, tl.where(status == 0, token, -status.to(tl.int64)))
        if p_logprobs is not None:
            tl.store(p_logprobs + at, tl.load(p_logprob + i_row))
        left = tl.load(p_row + LEFT * vast) - 1
        ended = (left == 0) | (status != 0)
        for column in tl.static_range(FIRST_EOS, WIDTH):
            ended = ended | (tl.load(p_row + column * vast) == token)
        ended = ended & (item >= 0)
        tl.store(p_row + LEFT * vast, left)
        tl.store(p_row + STEP * vast, tl.load(p_row + STEP * vast) + 1)
        tl.store(p_row + ID * vast, token)
        tl.store(p_row + MOVE * vast, (item >= 0).to(tl.int64))
        if p_seen is not None:
            tl.store(p_seen + i_row.to(tl.int64) * vocabulary + token, 1)
        tl.debug_barrier()
    if ended:
        place = tl.atomic_add(p_taken, 1)
        if place < tl.load(p_taken + 1):
            slot = (place % capacity).to(tl.int64)
            for column in tl.static_range(WIDTH):
                tl.store(p_row + column * vast, tl.load(p_next_numbers + column * capacity.to(tl.int64) + slot))
            for column in tl.static_range(REAL_COLUMNS):
                value = tl.load(p_next_reals + column * capacity.to(tl.int64) + slot)
                tl.store(p_reals + column * vast + i_row, value)
            for part in range(PARTS):
                at_next = (part * capacity.to(tl.int64) + slot) * H
                copy_column(p_next_state, p_state, at_next, (part * vast + i_row) * H, H, BLOCK)
            if p_seen is not None:
                at_seen = i_row.to(tl.int64) * vocabulary
                copy_column(p_next_seen, p_seen, slot * vocabulary, at_seen, vocabulary, BLOCK)
        else:
            tl.store(p_row + ITEM * vast, tl.full((), -1, tl.int64))
            tl.store(p_row + MOVE * vast, tl.full((), 0, tl.int64))


# --- launching ------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The weights of a layer; w_ih None where the layer's inputs are a table of its pre-activations."""

    w_ih: Tensor | None
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None


class Weights(NamedTuple):
    """A network as the loop reads it: the inputs of each id, the layers, the head."""

    cell: str  # lstm, gru, rnn_tanh, rnn_relu
    table: Tensor
    layers: tuple[Layer, ...]
    head: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, cell: str, inputs: Tensor | None, weights: list[Tensor], bias: bool, head: Tensor, head_bias: Tensor | None
    ) -> Weights:
        """From the inputs (V, I) of all ids, None where they are one-hot, the stack's weights in torch.nn's order and
        the head (V, H).

        The first layer's product with the inputs is taken once for every id where the result is small enough; that with
        one-hot input is the weight itself.
        """
        size = 4 if bias else 2
        stack = [[w.contiguous() for w in weights[at : at + size]] for at in range(0, len(weights), size)]
        layers = [Layer(*layer, *[None] * (4 - size)) for layer in stack]
        table, first = inputs, layers[0]
        if inputs is None or 4 * inputs.shape[0] * first.w_ih.shape[0] <= TABLE_BYTES:
            w_ih, b_ih = first.w_ih.float(), 0 if first.b_ih is None else first.b_ih.float()
            table = (w_ih.t() if inputs is None else linear(inputs.float(), w_ih)) + b_ih
            layers[0] = first._replace(w_ih=None, b_ih=None)
        return cls(cell, table.contiguous(), tuple(layers), head.contiguous(), head_bias)


class Kind(NamedTuple):
    """What the rows of a run need beyond a plain draw."""

    filters: bool = False
    penalty: bool = False
    logprobs: bool = False
    modes: tuple[int, ...] = (1,)

    @classmethod
    def of_all(cls, kinds: Counter[Kind]) -> Kind:
        """What all of those that are counted need."""
        present = [kind for kind, count in kinds.items() if count]
        modes = sorted({mode for kind in present for mode in kind.modes})
        return cls(*(any(kind[place] for kind in present) for place in range(3)), tuple(modes))


class Loop:
    """The rows and the queue of a generation loop in the memory of a device, and the launches that run it.

    The caller fills queue slots (`put`), says how many wait (`offer`), runs a number of tokens (`run`) and reads
    `events` (2, tokens, rows): item or -1, and token or -status; and `logprobs`. After `restart` it runs another
    generation, with the graphs that it has.
    """

    def __init__(self, weights: Weights, rows: int, capacity: int, tokens: int, eos: int = 1) -> None:
        head = weights.head
        self.used, self.rows, self.capacity = rows, ROWS * tuning.cdiv(rows, ROWS), capacity
        self.device, self.tokens, self.graphed = head.device, tokens, head.device.type == "cuda"
        self.vocabulary, self.hidden, self.layers = *head.shape, len(weights.layers)
        self.weights = weights._replace(table=torch.empty_like(weights.table))  # a table of its own, see `restart`
        parts, width = self.layers * (2 if weights.cell == "lstm" else 1), len(COLUMNS) + eos
        whole = functools.partial(torch.zeros, dtype=torch.int64, device=self.device)
        like = functools.partial(torch.zeros, dtype=head.dtype, device=self.device)
        self.numbers, self.next_numbers = whole(width, self.rows), whole(width, capacity)
        self.reals, self.next_reals = (whole(len(REALS), n).float() for n in (self.rows, capacity))
        self.states = like(2, parts, self.rows, self.hidden)  # a step reads one and writes the other
        self.next_state = like(parts, capacity, self.hidden)
        self.y = like(self.layers, self.rows, self.hidden)
        self.seen: Tensor | None = None
        self.next_seen: Tensor | None = None
        self.taken = torch.zeros(2, dtype=torch.int32, device=self.device)  # of the queue, and how many there are
        self.events = whole(2, tokens, self.rows)
        self.logprobs = whole(tokens, self.rows).float()
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}  # the one used last stands last
        self.ran: set[tuple] = set()  # what kernels are compiled for
        self.restart(weights)

    def restart(self, weights: Weights) -> None:
        """Leave no row at work, and take over the table of weights whose other tensors lie where this loop's do."""
        self.weights.table.copy_(weights.table)
        for part in (self.numbers, self.states, self.taken):
            part.zero_()
        self.column("item").fill_(-1)
        self.column("mode_of").fill_(1)
        self.reals.fill_(1)

    def column(self, name: str) -> Tensor:
        """A column of the rows (rows,)."""
        return self.reals[REALS.index(name)] if name in REALS else self.numbers[COLUMNS.index(name)]

    def widen(self, eos: int) -> None:
        """Room for ``eos`` ids that end a row."""
        lacking = len(COLUMNS) + eos - self.numbers.shape[0]
        if lacking > 0:
            both = self.numbers, self.next_numbers
            wider = (torch.cat([part, part.new_full((lacking, part.shape[1]), -1)]) for part in both)
            self.numbers, self.next_numbers = wider
            self._forget()

    def remember_seen(self) -> None:
        """Keep from now on which ids have occurred."""
        if self.seen is None:
            seen = self.numbers.new_zeros(self.rows + self.capacity, self.vocabulary, dtype=torch.uint8)
            self.seen, self.next_seen = seen[: self.rows], seen[self.rows :]
            self._forget()

    def _forget(self) -> None:
        self.graphs.clear()
        self.ran.clear()

    def put(self, slots: Tensor, numbers: Tensor, reals: Tensor, state: Tensor, seen: Tensor | None) -> None:
        """Fill the queue's ``slots`` (n,): numbers (columns, n), reals (REALS, n), state (parts, n, H), seen (n, V)."""
        self.next_numbers[:, slots] = -1
        self.next_numbers[: len(numbers), slots] = numbers.to(self.device)
        self.next_reals[:, slots] = reals.to(self.device)
        self.next_state[:, slots] = state
        if self.next_seen is not None:
            self.next_seen[slots] = 0 if seen is None else seen.view(torch.uint8)

    def offer(self, first: int, count: int) -> None:
        """``count`` items wait, the first in slot ``first``; rows without work take theirs at once."""
        self.taken.copy_(torch.tensor([first, first + count], dtype=torch.int32))
        with on_device(self.device):
            self._feed_back(0, self.states[0], None, False)

    def release(self, items: list[int]) -> None:
        """Leave rows without work that run one of ``items``."""
        gone = torch.isin(self.column("item"), torch.tensor(items, device=self.device))
        self.column("item").masked_fill_(gone, -1)
        self.column("move").masked_fill_(gone, 0)

    def run(self, tokens: int, kind: Kind) -> None:
        """``tokens`` (an even number) for every row: as launches the first time, then as a graph of them."""
        compiled, key = (kind, precision(self.states)), (tokens, kind, precision(self.states))
        if not self.graphed or compiled not in self.ran:
            self.ran.add(compiled)
            self._launch(tokens, kind)
            return
        if (graph := self.graphs.pop(key, None)) is None:
            graph = torch.cuda.CUDAGraph()
            with on_device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch(tokens, kind)
        self.graphs[key] = graph
        if len(self.graphs) > KEPT_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        graph.replay()

    def _launch(self, tokens: int, kind: Kind) -> None:
        with on_device(self.device):
            for k in range(tokens):
                old, new = self.states[k % 2], self.states[1 - k % 2]
                self._step(old, new)
                self._feed_back(k, new, self._draw(new[self.layers - 1], kind), kind.logprobs)

    def _step(self, old: Tensor, new: Tensor) -> None:
        """The states after one more input of every row that moves; the others keep theirs."""
        weights, ids, moves = self.weights, self.column("id"), self.column("move")
        cell, L = weights.cell.partition("_")[0], self.layers
        plan = tuning.token_step(cell, self.hidden, self.rows, old.dtype)
        sizes = dict(H=self.hidden, PRECISION=precision(old))
        x = weights.table
        for i, layer in enumerate(weights.layers):
            common = (layer.w_ih, layer.w_hh, layer.b_ih, layer.b_hh, moves, None, self.y[i], new[i])
            tail = (self.rows, x.shape[-1])
            if cell == "lstm":
                args = (x, ids, old[i], old[L + i], *common, new[L + i], None, None, *tail)
                run(lstm.step_kernel, plan, *args, **sizes)
            elif cell == "gru":
                run(gru.step_kernel, plan, x, ids, old[i], *common, None, *tail, **sizes)
            else:
                relu = weights.cell == "rnn_relu"
                run(rnn.step_kernel, plan, x, ids, old[i], *common, *tail, RELU=relu, **sizes)
            x, ids = self.y[i], None

    def _draw(self, h: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor | None]:
        """(token, status, logprob) of every row that may have work.

        Logits come from the same launch whatever else is asked for, so that the draw of a row is the same, too.
        """
        names = ("seed", "sequence", "step")
        scale, place = self.column("scale"), [self.column(name) for name in names]
        head, bias = self.weights.head, self.weights.bias
        if kind == Kind(logprobs=kind.logprobs):
            found = head_draw(h, head, bias, scale, *place, logprobs=kind.logprobs)
            return found.token, found.status, found.logprob if kind.logprobs else None
        logits = torch.empty(self.rows, self.vocabulary, dtype=torch.float32, device=self.device)
        head_draw(h, head, bias, scale, *place, logits=logits, recompute=False)
        return self._draw_from(logits[: self.used], kind)

    def _draw_from(self, given: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor | None]:
        """`_draw` from logits, with penalties, filters and votes."""
        used = {name: self.column(name)[: self.used] for name in (*COLUMNS, *REALS)}
        logits, penalty = given, used["penalty"]
        if kind.penalty:
            factor = torch.where(given > 0, used["inverse"].unsqueeze(1), penalty.unsqueeze(1))
            logits = torch.where(self.seen[: self.used] != 0, given * factor, given)
        columns = [used[name] for name in ("scale", "top_k", "top_p", "min_p")]
        place = [used[name] for name in ("seed", "sequence", "step")]
        token = status = logprob = None
        for mode in kind.modes:
            found = sample(logits, *columns, None, *place, mode, kind.logprobs)
            if token is None:
                token, status, logprob = found.token, found.status, found.logprob
                continue
            mine = used["mode_of"] == mode
            token, status = torch.where(mine, found.token, token), torch.where(mine, found.status, status)
            logprob = torch.where(mine, found.logprob, logprob) if kind.logprobs else logprob
        if kind.penalty and kind.logprobs:
            own = given.log_softmax(1).gather(1, token.unsqueeze(1)).squeeze(1)
            logprob = torch.where(penalty == 1, logprob, own)
        return token, status, logprob if kind.logprobs else None

    def _feed_back(self, k: int, state: Tensor, drawn: tuple | None, logprobs: bool) -> None:
        token, status, logprob = drawn or (None, None, None)
        rows = (self.numbers, self.reals, state, self.seen)
        queue = (self.next_numbers, self.next_reals, self.next_state, self.next_seen, self.taken)
        kept = (self.events, self.logprobs if logprobs else None)
        feedback_kernel[(self.used,)](
            *rows, *queue, token, status, logprob, *kept, k, self.tokens * self.rows, self.rows, self.capacity,
            self.vocabulary, H=self.hidden, PARTS=state.shape[0], WIDTH=self.numbers.shape[0],
            BLOCK=feedback_block(self.hidden), num_warps=FEEDBACK_WARPS,
        )  # fmt: skip


FEEDBACK_WARPS = 2


def feedback_block(hidden: int) -> int:
    """How much of a state a program copies at once."""
    return min(512, tuning.padded(hidden))


# --- what is compiled -----------------------------------------------------------------------------------------------

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_SIGNATURE = dict(
    p_numbers="*i64", p_reals="*fp32", p_seen="*u8", p_next_numbers="*i64", p_next_reals="*fp32", p_next_seen="*u8",
    p_taken="*i32", p_token="*i64", p_status="*i32", p_logprob="*fp32", p_events="*i64", p_logprobs="*fp32", k="i32",
    span="i32", rows="i32", capacity="i32", vocabulary="i32",
)  # fmt: skip
_DRAWN = ("p_token", "p_status", "p_logprob", "p_logprobs")
_SEEN = ("p_seen", "p_next_seen")


def _feedback_variant(dtype: torch.dtype, hidden: int, absent: tuple[str, ...]) -> Variant:
    fixed = dict.fromkeys(absent) | dict(H=hidden, PARTS=4, WIDTH=len(COLUMNS) + 2, BLOCK=feedback_block(hidden))
    types = _SIGNATURE | dict.fromkeys(("p_state", "p_next_state"), f"*{_TYPES[dtype]}")
    signature = {name: types[name] for name in feedback_kernel.arg_names if name not in fixed}
    words = [_TYPES[dtype], str(hidden), *["admit"] * ("p_token" in absent), *["seen"] * ("p_seen" not in absent)]
    aligned = tuple(name for name in signature if name.startswith("p_"))
    name = f"generate/feedback/{'/'.join(words)}"
    return Variant(name, feedback_kernel, signature, fixed, FEEDBACK_WARPS, 3, aligned)


def _step_variant(cell: str, kernel, dtype: torch.dtype, hidden: int, products: bool) -> Variant:
    """A step whose inputs are rows of a table, of their products with W_ih in float32 or of themselves."""
    plan = tuning.token_step(cell, hidden, 64, dtype)
    constants = dict(RELU=False) if cell == "rnn" else {}
    bare = variant("", kernel, plan, dtype, hidden, False, constants)
    signature, fixed = dict(bare.signature) | {"p_ids": "*i64"}, dict(bare.constexprs)
    fixed.pop("p_ids")
    absent = ["p_gates", "p_cells", "p_reset", *(["p_w_ih", "p_b_ih"] if products else [])]
    fixed |= {name: None for name in absent if name in kernel.arg_names}
    fixed.pop("p_lengths", None)
    signature |= {"p_lengths": "*i64"} | ({"p_x": "*fp32"} if products else {})
    signature = {name: signature[name] for name in kernel.arg_names if name not in fixed}
    name = f"generate/{cell}_step/{_TYPES[dtype]}/{hidden}/{'products' if products else 'inputs'}"
    aligned = (*bare.aligned, "p_ids", "p_lengths")
    return bare._replace(name=name, signature=signature, constexprs=fixed, aligned=aligned)


def variants() -> list[Variant]:
    """The feedback with and without its options, and the steps of layers that read a table."""
    every, single = _DRAWN[2:] + _SEEN, torch.float32
    found = [_feedback_variant(dtype, 512, every) for dtype in _TYPES]
    found += [_feedback_variant(single, 20, absent) for absent in ((), _SEEN, _DRAWN, _DRAWN + _SEEN)]
    kernels = dict(lstm=lstm.step_kernel, gru=gru.step_kernel, rnn=rnn.step_kernel)
    for cell, kernel in kernels.items():
        found += [_step_variant(cell, kernel, single, hidden, True) for hidden in (20, 512)]
        found += [_step_variant(cell, kernel, torch.bfloat16, 512, products) for products in (True, False)]
    return found
