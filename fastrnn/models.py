"""LanguageModel: a Network with a tokenizer; text in, text out, scores, states, and a folder on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import storage
from .defaults import GenerationConfig, checked_stops
from .generate import Runner, make_engine, make_runner, prefill
from .likelihood import log_likelihoods, precision_cost
from .network import Network, NetworkConfig
from .planning import OPTIONS, Output, eos_ids, plan, requests
from .reading import TextReader
from .request import Request, check_request
from .results import Generation, Score, Scores, generation
from .sequence import SequenceState
from .text import Tokenizer, from_vocabulary

Prompt = str | Sequence[int] | Tensor
Streamer = Callable[[int, str], Any]


class LanguageModel(Network):
    """A `Network` that reads and writes text through ``tokenizer``; without one, prompts are ids, texts empty."""

    def __init__(self, config: NetworkConfig, tokenizer: Tokenizer | None = None, **make: Any) -> None:
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the config says vocab_size={config.vocab_size}"
            )
        super().__init__(config, **make)
        self.tokenizer = tokenizer
        bos = None if tokenizer is None else tokenizer.bos_id
        self.generation_config = GenerationConfig(start_token_id=bos)

    # --- text to ids ---

    def encode(self, prompt: Prompt, *, unk: str | None = None, state: SequenceState | None = None) -> Tensor:
        """The ids (T,) int64 that are run for a prompt: text or ids, with the start token that the model was trained
        with.

        After a ``state`` nothing is put before the prompt. Raises ``ValueError`` for an empty prompt that has no start
        token, and the tokenizer's UnknownTextError, which names characters that the vocabulary lacks, as ``unk``
        decides.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("this model has no tokenizer: give the prompt as token ids")
            ids = torch.from_numpy(self.tokenizer.encode_array(prompt, unk=unk)).to(torch.int64)
        else:
            ids = torch.as_tensor(prompt, dtype=torch.int64).reshape(-1)
        if state is not None:
            return ids
        start = self.generation_config.start_token_id
        if start is None and len(ids) == 0:
            start = self._default_start()
            if start is None:
                raise ValueError(
                    "the prompt is empty and this model has no start token (bos or eos): "
                    "give a prompt of at least one token"
                )
        return ids if start is None else torch.cat([torch.tensor([start]), ids])

    def _default_start(self) -> int | None:
        tokenizer = self.tokenizer
        return None if tokenizer is None else tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    def prefill(self, text: Prompt, *, state: SequenceState | None = None, window: int | None = None) -> SequenceState:
        """The state after reading ``text``: a value to pass to `generate` as often as wanted, to extend, or to save."""
        return prefill(self, self.encode(text, state=state), state, window=window)

    # --- generation ---

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] = "",
        *,
        max_new_tokens: int | Sequence[int] | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        mode_of: int | Sequence[int] | None = None,
        repetition_penalty: float | Sequence[float] | None = None,
        num_return_sequences: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] | None = None,
        seed: int | Sequence[int] | None = None,
        sequence_id: int | Sequence[int] | None = None,
        return_logprobs: bool = False,
        return_nll: bool = False,
        streamer: Streamer | None = None,
        batch_size: int | None = None,
        unk: str | None = None,
        state: SequenceState | None = None,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
    ) -> Generation | list[Generation]:
        """Continue one prompt (-> one `Generation`) or a list of prompts (-> a list in their order).

        A prompt is text or token ids; lengths may differ. What is None comes from ``generation_config``. For a list of
        prompts each of max_new_tokens ... repetition_penalty, seed and sequence_id may be a list with one value per
        prompt; for one prompt such lists are a sweep, and the result is a list. ``num_return_sequences`` = n gives n
        outputs per prompt, one after another, in a flat list.

        Which random numbers an output uses is (seed, sequence_id, number among its prompt's n outputs), so an output
        never depends on batch_size, on the order or on other prompts. ``sequence_id`` (0 .. 2**32-1) is by default the
        prompt's place in the list, or 0 where ``seed`` is a list or there is one prompt. So output ``i`` of a list with
        one seed is ``generate(prompts[i], seed=seed, sequence_id=i)``. Without a seed one is drawn from torch's
        generator.

        eos_token_id: id or ids that end a text, () for none. stop_strings: texts that end a text; they are cut off.
        streamer(k, piece): called with each new piece of output k's text as it comes; True ends that output.
        batch_size: rows at once. unk: "error", "skip" or "unk", what unknown characters of a prompt do.
        state: continue from `prefill`; prompts follow it and may be empty. window: tokens that are run for each new one
        in a model with window state (default: the config's). dtype=torch.bfloat16 or quantize="int8": run a copy of the
        weights with fewer bits, faster and a little less exact; `precision_cost` tells how much.
        """
        given = {name: value for name, value in locals().items() if name in OPTIONS and value is not None}
        single = _is_single(prompts)
        outputs = plan(self, [prompts] if single else list(prompts), single, given)
        results = self._run(outputs, given, streamer, batch_size)
        return results[0] if single and len(results) == 1 else results

    def _run(
        self, outputs: list[Output], given: Mapping[str, Any], streamer: Streamer | None, batch_size: int | None
    ) -> list[Generation]:
        """Run all outputs; their text is decoded on the way only where something looks at it."""
        stops = checked_stops(given.get("stop_strings", self.generation_config.stop_strings))
        logprobs, nll = bool(given.get("return_logprobs")), bool(given.get("return_nll"))
        readers: dict[int, TextReader] = {}
        results: list[Any] = [None] * len(outputs)
        runner = self._runner(given)
        engine = make_engine(runner, requests(self, outputs, runner), batch_size, events=bool(streamer or stops))
        while engine.busy:
            events = engine.step()
            for index, token in events if streamer is not None or stops else ():
                if index not in readers:
                    readers[index] = self._reader(outputs[index].request, stops)
                piece = readers[index].push(token)
                if (piece and streamer is not None and streamer(index, piece)) or readers[index].stopped:
                    engine.stop(index)
            for completion in engine.take_completions():
                index, request = completion.index, outputs[completion.index].request
                reader = readers.pop(index, None)
                if reader is None:
                    text = self._decode(completion.token_ids, request.eos)
                else:
                    if (piece := reader.finish()) and streamer is not None:
                        streamer(index, piece)
                    text = reader.text
                results[index] = generation(request, completion, text, logprobs, nll)
        return results

    def stream(self, prompt: Prompt = "", **options: Any) -> Iterator[str]:
        """Yield the text of one output piece by piece as it comes; the pieces joined are `generate`'s text.

        Options as `generate`'s, for one output. Raises ``ValueError`` at once for bad ones, RuntimeError when a token
        cannot be drawn.
        """
        if unknown := sorted(set(options) - OPTIONS):
            raise TypeError(f"stream has no option {', '.join(unknown)}; it has {', '.join(sorted(OPTIONS))}")
        given = {name: value for name, value in options.items() if value is not None}
        outputs = plan(self, [prompt], True, given)
        if len(outputs) != 1:
            raise ValueError(
                f"stream yields one output and these options ask for {len(outputs)}; use generate(streamer=)"
            )
        stops = checked_stops(given.get("stop_strings", self.generation_config.stop_strings))
        return self._pieces(self._runner(given), outputs[0].request, stops)

    def _runner(self, given: Mapping[str, Any]) -> Runner:
        return make_runner(self, dtype=given.get("dtype"), quantize=given.get("quantize"))

    def _pieces(self, runner: Runner, request: Request, stops: list[str]) -> Iterator[str]:
        engine, reader = make_engine(runner, [request], 1), self._reader(request, stops)
        while engine.busy:
            for index, token in engine.step():
                piece = reader.push(token)
                if reader.stopped:
                    engine.stop(index)
                if piece:
                    yield piece
            for completion in engine.take_completions():
                if piece := reader.finish():
                    yield piece
                if completion.error:
                    raise RuntimeError(f"generation ended early: {completion.error}")

    def _decode(self, ids: list[int], eos: frozenset[int]) -> str:
        """The text of new ids; the eos that ended them has none."""
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in eos else ids)

    def _reader(self, request: Request, stops: list[str]) -> TextReader:
        decoder = _NoText() if self.tokenizer is None else self.tokenizer.stream_decoder()
        return TextReader(decoder, stops, request.eos)

    def precision_cost(self, *, dtype: torch.dtype | None = None, quantize: str | None = None) -> float:
        """What ``generate(dtype=..., quantize=...)`` costs, in bits a token: see `likelihood.precision_cost`."""
        return precision_cost(self, dtype=dtype, quantize=quantize)

    # --- scores ---

    def score(
        self, texts: Prompt | Sequence[Prompt], *, complete: bool | None = None, unk: str | None = None
    ) -> Score | Scores:
        """How probable texts are: one text -> `Score`, a list -> `Scores`, in order.

        A model with a start token (``generation_config.start_token_id``) predicts every token of a text, and with
        ``complete`` (its default then) also the eos token that ends it; other models predict all tokens but the first.
        """
        single = _is_single(texts)
        start = self.generation_config.start_token_id
        complete = (start is not None and bool(eos_ids(self, None))) if complete is None else complete
        if complete and not eos_ids(self, None):
            raise ValueError("complete=True needs a tokenizer with an eos token, this one has none")
        end = torch.tensor(sorted(eos_ids(self, None)) if complete else [], dtype=torch.int64)
        sequences, chars = [], []
        for text in [texts] if single else texts:
            ids = self.encode(text, unk=unk) if start is not None or len(text) else torch.empty(0, dtype=torch.int64)
            check_request(Request(ids if len(ids) else [0], 0), self)
            sequences.append(torch.cat([ids, end]))
            chars.append(self._chars(text, ids, start is not None))
        found = log_likelihoods(self, sequences)
        scores = [
            Score(-float(logs.double().sum()), len(logs), count) for logs, count in zip(found, chars, strict=True)
        ]
        return scores[0] if single else Scores(scores)

    def _chars(self, text: Prompt, ids: Tensor, started: bool) -> int:
        """Characters that the predicted tokens of a text spell."""
        if self.tokenizer is None or not isinstance(text, str):
            return len(ids) - 1 if len(ids) else 0
        return len(text) - (0 if started or not len(ids) else len(self.tokenizer.decode(ids[:1].tolist())))

    # --- files ---

    def save_pretrained(self, path: str | PathLike[str], *, notes: Mapping[str, Any] | None = None) -> None:
        """Write the model into the folder ``path``: config.json, model.safetensors, generation_config.json,
        tokenizer.json and README.md with the model's facts and ``notes`` (name -> value).

        All files are complete on the disk before any takes its name; OSError leaves what was there before.
        """
        files = {
            storage.WEIGHTS: storage.weights_bytes(self),
            storage.CONFIG: storage.config_bytes(self),
            storage.GENERATION: storage.json_bytes(self.generation_config.to_dict()),
            storage.CARD: storage.model_card(self, self.tokenizer, notes or {}),
        }
        if self.tokenizer is not None:
            files[storage.TOKENIZER] = self.tokenizer.to_str().encode()
        storage.write_files(path, files)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """The model in the folder ``path``, in eval mode. `storage.ModelError`, a ValueError, says what is wrong."""
        folder = Path(path)
        config, saved_dtype = storage.read_config(folder)
        file = folder / storage.TOKENIZER
        tokenizer = Tokenizer.from_file(file) if file.is_file() else None
        if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
            raise storage.ModelError(
                f"{file} has {tokenizer.vocab_size} tokens but {storage.CONFIG} says {config.vocab_size}: "
                "the two files are of different models"
            )
        model = cls(config, tokenizer, dtype=saved_dtype)
        storage.read_weights(folder / storage.WEIGHTS, model)
        if (folder / storage.GENERATION).exists():
            try:
                fields = storage.read_json(folder / storage.GENERATION)
                model.generation_config = GenerationConfig.from_dict(fields)
            except (TypeError, ValueError) as problem:
                raise storage.ModelError(f"{folder / storage.GENERATION}: {problem}") from problem
        return model.to(device=device, dtype=dtype).eval()

    @classmethod
    def from_tutorial_002(
        cls, path: str | PathLike[str], *, window: int = 100, state: str = "window", dropout: float = 0.225
    ) -> LanguageModel:
        """The model of a checkpoint ``torch.save([state_dict, s2i], path)`` as the Shakespeare LSTM notebook writes it.

        Scalar input id/V, head on the last step; it was trained on windows of 100 ids, which are run again for each
        token unless state="carried". Raises FileNotFoundError, `storage.ModelError`, or the tokenizer's error for a bad
        ``s2i``.
        """
        weights, vocabulary = storage.read_pickled(path)
        tokenizer = from_vocabulary(vocabulary)
        config = storage.config_from_weights(
            weights,
            len(vocabulary),
            head="last",
            state=state,
            window=window if state == "window" else None,
            dropout=dropout,
        )
        model = cls(config, tokenizer)
        model.load_renamed_state_dict(weights)
        return model.eval()

    def to_tutorial_002(self, path: str | PathLike[str]) -> None:
        """Write ``[state_dict, s2i]`` as `from_tutorial_002` reads it, with the notebook's names ``lstm`` and
        ``linear``; the notebook's own ``Model`` loads it when the sizes are its own."""
        if self.tokenizer is None or self.config.cell != "lstm":
            raise ValueError("the notebook's checkpoint holds an LSTM and its characters; this model has no such pair")
        names = {"rnn": "lstm", "head": "linear"}
        parts = {name: name.partition(".") for name in self.state_dict()}
        renamed = {
            names.get(parts[name][0], parts[name][0]) + "." + parts[name][2]: tensor
            for name, tensor in self.state_dict().items()
        }
        storage.write_pickled(path, renamed, {piece: i for i, piece in enumerate(self.tokenizer.pieces)})


class _NoText:
    """The decoder of a model without a tokenizer."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def _is_single(prompts: Any) -> bool:
    """Whether this is one prompt, a text or ids, and not a list of prompts."""
    return isinstance(prompts, (str, Tensor)) or (len(prompts) > 0 and isinstance(prompts[0], int))
