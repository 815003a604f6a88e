"""The generation loop in Python: prefill, one draw a step for all rows, refill of finished rows.

It runs every network on every device and backend, and says what `native` does in C++. The draw of token ``k`` of a
request is a function of its logits and of (seed, sequence, k), and `inference.Inference` makes the logits a function of
the ids alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from . import backends, ops
from .inference import Inference, join, take
from .network import State
from .request import BATCH_ROWS, Completion, Pending, Request, Taken, signed
from .sampling import STATUS_TEXTS
from .sequence import window_tail


class _Row:
    """Host side of one running request."""

    def __init__(self, taken: Taken) -> None:
        self.request, self.prompt, self.state = taken.request, taken.prompt, taken.request.state
        self.mode_of, self.completion = taken.request.sampling.mode_of, taken.completion()


class Engine:
    """Runs requests, at most ``batch_rows`` at once; a finished row's place is taken by the next request at once.

    Each `step` draws one token for every running row and returns the (index, token) pairs; `take_completions` gives
    what has finished since it was last emptied. `stop` ends a row between two steps.
    """

    def __init__(self, inference: Inference, requests: Iterable[Request], batch_rows: int | None = None) -> None:
        network = inference.network
        self.network, self.inference = network, inference
        self.windowed = network.config.state == "window"
        self.batch_rows = batch_rows or BATCH_ROWS
        self.pending = Pending(requests, network)
        self.rows: list[_Row] = []
        self.ended: set[int] = set()  # which of the rows have a finish_reason
        # Of the rows, in their order, so that a step costs no Python loop over them: the index of the request, the list
        # that its tokens go to, how many are left to draw, and the ids that end it, filled up with -1.
        self.indices: list[int] = []
        self.token_ids: list[list[int]] = []
        self.left = np.empty(0, np.int64)
        self.eos = np.empty((0, 1), np.int64)
        self.modes: Counter[int] = Counter()  # mode_of -> rows
        self.logprob_rows = 0
        self.completions: list[Completion] = []
        self.drawn: Tensor | None = None  # (n,) tokens of the last step, on the device
        self.state: State | None = None  # carried: state of the rows, (L, n, H)
        self.tails: list[Tensor] = []  # window: the ids that are run for each row
        self.numbers = torch.empty(5, 0, dtype=torch.int64)  # top_k, top_p, seed, sequence, step
        self.reals = torch.empty(4, 0)  # scale, min_p, repetition_penalty and its inverse
        self.seen: Tensor | None = None  # (n, V) bool, while some row has a repetition_penalty

    def stop(self, index: int) -> None:
        """End the row of request ``index`` with finish_reason ``stop``; nothing if it has failed or drawn an eos."""
        if index in self.indices:
            r = self.indices.index(index)
            if self.rows[r].completion.finish_reason in ("", "length"):
                self._end(r, "stop")

    @property
    def busy(self) -> bool:
        """Whether a request is running or may be pending."""
        return bool(self.rows) or not self.pending.exhausted

    @torch.inference_mode()
    def take_completions(self) -> list[Completion]:
        """What has finished since the last call, in the order in which it finished; their rows are free now."""
        self._drop_finished()
        done, self.completions = self.completions, []
        return done

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Draw a token for every running row, after filling the free places; an empty list when all is done."""
        with self.inference.running():
            self._drop_finished()
            logits = [self._advance()] if self.rows else []
            logits += self._admit()
            if not self.rows:
                return []
            return self._draw(logits[0] if len(logits) == 1 else torch.cat(logits))

    def _drop_finished(self) -> None:
        """Report finished rows and close the gaps they leave."""
        if not self.ended:
            return
        for row in (self.rows[r] for r in sorted(self.ended)):
            self.completions.append(row.completion)
            self.modes -= Counter([row.mode_of])
            self.logprob_rows -= row.request.logprobs
        kept = [r for r in range(len(self.rows)) if r not in self.ended]
        self.ended.clear()
        self.indices, self.token_ids = [self.indices[r] for r in kept], [self.token_ids[r] for r in kept]
        self.left, self.eos = self.left[kept], self.eos[kept]
        number = torch.tensor(kept, dtype=torch.int64, device=self.inference.device)
        self.rows = [self.rows[r] for r in kept]
        self.drawn, self.numbers, self.reals = self.drawn[number], self.numbers[:, number], self.reals[:, number]
        if self.windowed:
            self.tails = [self.tails[r] for r in kept]
        else:
            self.state = take(self.state, number)
        if self.seen is not None:
            self.seen = self.seen[number] if bool((self.reals[2] != 1).any()) else None

    def _advance(self) -> Tensor:
        """Logits (n, V) of the running rows after their last token."""
        if not self.windowed:
            self.state = self.inference.advance(self.drawn.unsqueeze(0), self.state)
            return self.inference.logits(self.state)
        for r, (row, tail) in enumerate(zip(self.rows, self.tails)):
            window = row.request.window or self.network.config.window
            self.tails[r] = torch.cat([tail, self.drawn[r : r + 1]])[-window:]
        return self.inference.window_logits(self.tails)

    def _admit(self) -> list[Tensor]:
        """Prefill the next requests into the free places: a list with their logits (k, V), or an empty one."""
        new: list[_Row] = []
        while len(self.rows) + len(new) < self.batch_rows and (taken := self.pending.take()) is not None:
            if taken.request.max_new_tokens == 0:
                self.completions.append(taken.completion("length"))
            else:
                new.append(_Row(taken))
        if not new:
            return []
        logits = self._prefill(new)
        self._add_columns(new)
        self._add_rows(new)
        return [logits]

    def _add_rows(self, new: list[_Row]) -> None:
        """What the host keeps of new rows."""
        self.rows += new
        self.indices += [row.completion.index for row in new]
        self.token_ids += [row.completion.token_ids for row in new]
        self.modes.update(row.mode_of for row in new)
        self.logprob_rows += sum(row.request.logprobs for row in new)
        self.left = np.append(self.left, [row.request.max_new_tokens for row in new])
        width = max(self.eos.shape[1], *(len(row.request.eos) for row in new))
        eos = np.full((len(self.rows), width), -1)
        eos[: len(self.eos), : self.eos.shape[1]] = self.eos
        for r, row in enumerate(new, len(self.eos)):
            eos[r, : len(row.request.eos)] = list(row.request.eos)
        self.eos = eos

    def _prefill(self, new: list[_Row]) -> Tensor:
        """Logits (k, V) after the prompts of new rows, whose state or tails are added to those of the running rows."""
        inference, device = self.inference, self.inference.device
        if self.windowed:
            window = self.network.config.window
            tails = [window_tail(row.prompt, row.state, row.request.window or window).to(device) for row in new]
            self.tails += tails
            return inference.window_logits(tails)
        zero = inference.zero_state(1) if any(row.state is None for row in new) else None
        start = join([row.state.hidden if row.state else zero for row in new])
        read = [r for r, row in enumerate(new) if len(row.prompt)]
        state = inference.prefill([row.prompt for row in new], start) if read else start
        self.state = join([self.state, state]) if self.rows else state
        if len(read) == len(new):
            return inference.logits(state)
        known = [r for r, row in enumerate(new) if not len(row.prompt)]
        logits = torch.stack([new[r].state.logits for r in known]).to(device)
        if not read:
            return logits
        logits = torch.cat([logits, inference.logits(take(state, torch.tensor(read, device=device)))])
        return logits[torch.tensor(known + read, device=device).argsort()]

    def _add_columns(self, new: list[_Row]) -> None:
        """Sampling parameters of new rows, one column a row, and the ids they have seen."""
        inference, requests = self.inference, [row.request for row in new]
        known = {sampling: sampling.numbers() for sampling in {request.sampling for request in requests}}
        kernel = [known[request.sampling] for request in requests]
        numbers = [
            [k.top_k, k.top_p, signed(request.seed), signed(request.sequence), 0]
            for k, request in zip(kernel, requests)
        ]
        reals = [
            [k.scale, k.min_p, request.repetition_penalty, 1 / request.repetition_penalty]
            for k, request in zip(kernel, requests)
        ]
        columns = torch.tensor(numbers, device=inference.device).t()
        self.numbers = torch.cat([self.numbers.to(inference.device), columns], 1)
        self.reals = torch.cat([self.reals.to(inference.device), torch.tensor(reals, device=inference.device).t()], 1)
        if self.seen is None and all(request.repetition_penalty == 1 for request in requests):
            return
        vocab = self.network.config.vocab_size
        seen = torch.zeros(len(new), vocab, dtype=torch.bool, device=inference.device)
        for r, row in enumerate(new):
            seen[r, row.prompt.to(inference.device)] = True
            if row.state is not None:
                seen[r] |= row.state.seen
        if self.seen is None:  # nobody before had a penalty, so what they have seen does not matter
            self.seen = seen.new_zeros(len(self.rows), vocab)
        self.seen = torch.cat([self.seen, seen])

    def _draw(self, logits: Tensor) -> list[tuple[int, int]]:
        """One token for every row from ``logits`` (n, V)."""
        wanted = self.logprob_rows > 0
        given = logits
        if self.seen is not None:
            penalty, inverse = self.reals[2:].unsqueeze(2)
            logits = torch.where(self.seen, logits * torch.where(logits > 0, inverse, penalty), logits)
        token, logprob, status = self._sample(logits, wanted)
        if wanted and self.seen is not None:
            logprob = given.log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
        self.drawn = token
        self.numbers[4] += 1
        if self.seen is not None:
            self.seen.scatter_(1, token.unsqueeze(1), True)
        if wanted:
            for row, probability, code in zip(self.rows, logprob.tolist(), status.tolist()):
                if row.completion.logprobs is not None and not code:
                    row.completion.logprobs.append(probability)
        return self._record(token.cpu().numpy(), status.cpu().numpy())

    def _record(self, tokens: np.ndarray, status: np.ndarray) -> list[tuple[int, int]]:
        """Give every row its token, or the error of its status; the (index, token) pairs of those that have one."""
        drawn = tokens.tolist()
        if status.any():
            events = []
            for r, row in enumerate(self.rows):
                if status[r]:
                    done = len(row.completion.token_ids)
                    row.completion.error = f"token {done} cannot be drawn: {STATUS_TEXTS[int(status[r])]}"
                    self._end(r, "error")
                else:
                    row.completion.token_ids.append(drawn[r])
                    events.append((self.indices[r], drawn[r]))
        else:
            deque(map(list.append, self.token_ids, drawn), maxlen=0)
            events = list(zip(self.indices, drawn))
        self.left -= 1
        at_eos = (self.eos == tokens[:, None]).any(1)
        for r in np.flatnonzero((at_eos | (self.left == 0)) & (status == 0)):
            self._end(int(r), "eos" if at_eos[r] else "length")
        return events

    def _end(self, r: int, reason: str) -> None:
        self.rows[r].completion.finish_reason = reason
        self.ended.add(r)

    def _sample(self, logits: Tensor, logprobs: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(token, logprob, status) of each row, one call for all rows that share mode_of. ``aten`` has no draw."""
        with backends.backend(None if self.inference.backend == "aten" else backends.explicit()):
            if len(self.modes) == 1:
                return self._sample_rows(logits.contiguous(), self.numbers, self.reals, *self.modes, logprobs)
            parts, places = [], []
            for mode in sorted(self.modes):
                some = torch.tensor([r for r, row in enumerate(self.rows) if row.mode_of == mode], device=logits.device)
                parts.append(
                    self._sample_rows(logits[some], self.numbers[:, some], self.reals[:, some], mode, logprobs)
                )
                places.append(some)
            back = torch.cat(places).argsort()
            token, logprob, status = (torch.cat(part) for part in zip(*parts))
            return token[back], logprob[back] if logprobs else logprob, status[back]

    @staticmethod
    def _sample_rows(logits: Tensor, numbers: Tensor, reals: Tensor, mode: int, logprobs: bool) -> tuple[Tensor, ...]:
        top_k, top_p, seed, sequence, step = numbers.unbind()
        scale, min_p = reals[:2]
        found = ops.sample(logits, scale, top_k, top_p, min_p, None, seed, sequence, step, mode, logprobs)
        return found[0], found[1], found[4]
