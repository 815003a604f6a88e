"""A model as a folder: config.json, model.safetensors, generation_config.json, README.md and tokenizer.json.

Every file is complete on the disk before any takes its name, so a full disk or an interruption leaves the old model
intact. Nothing is pickled: reading a stranger's folder runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import __version__
from .checkpoint import atomic_file, sync_folder
from .network import Network, NetworkConfig, rename_state_dict

FORMAT = "fastrnn-1"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
GENERATION, CARD = "generation_config.json", "README.md"


class ModelError(ValueError):
    """A model's folder or file is missing, truncated, foreign or does not fit together; the text says what."""


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write all ``files`` (name -> content) into ``folder``: each beside its place first, then all renamed.

    Raises OSError when one cannot be written. After any exception, Ctrl-C too, the files are those that were there
    before.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = os.getpid()
    staged = {folder / name: (folder / f".{name}.{mark}.tmp", folder / f".{name}.{mark}.old") for name in files}
    try:
        for (temporary, _), content in zip(staged.values(), files.values(), strict=True):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for final, (_, old) in staged.items():
            if final.exists():
                shutil.copy2(final, old)
        try:
            for final, (temporary, _) in staged.items():
                os.replace(temporary, final)
        except BaseException:
            _restore(staged)
            raise
    finally:
        for place in staged.values():
            for path in place:
                path.unlink(missing_ok=True)
    sync_folder(folder)


def _restore(staged: Mapping[Path, tuple[Path, Path]]) -> None:
    """Undo the renames of `write_files` that were done."""
    for final, (temporary, old) in staged.items():
        if temporary.exists():
            continue
        if old.exists():
            shutil.move(old, final)
        else:
            final.unlink(missing_ok=True)


def weights_bytes(network: Network) -> bytes:
    """model.safetensors of a network; a matrix that is tied to another is written once."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if network.config.tie_weights:
        del tensors["head.weight"]
    return save(tensors, metadata={"format": "pt"})


def config_bytes(network: Network) -> bytes:
    """config.json of a network."""
    dtype = str(network.head.weight.dtype).removeprefix("torch.")
    fields = {"model_type": "fastrnn", "format": FORMAT, "fastrnn_version": __version__, "dtype": dtype}
    return json_bytes({**fields, **network.config.to_dict()})


def json_bytes(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ModelError` when the file is missing, cut off or something else."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: a model's folder holds {CONFIG}, {WEIGHTS} and {TOKENIZER}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ModelError(f"{path} is not whole JSON: {problem}; copy or save the model again") from problem
    if not isinstance(fields, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(fields).__name__}")
    return fields


def read_config(folder: Path) -> tuple[NetworkConfig, torch.dtype]:
    """The network's config and dtype from a model's folder."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"{folder} {what}; a model is a folder written by save_pretrained or `fastrnn train`")
    fields = read_json(folder / CONFIG)
    if fields.get("format") != FORMAT:
        kind = fields.get("model_type") or fields.get("architectures") or "an unknown kind"
        raise ModelError(
            f"{folder / CONFIG} is not of this program: it describes {kind} in format {fields.get('format')!r}, "
            f"needed is format {FORMAT!r}"
        )
    dtype = getattr(torch, str(fields.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(
            f"{folder / CONFIG}: dtype must name a floating type such as float32, got {fields.get('dtype')!r}"
        )
    names = ("model_type", "format", "fastrnn_version", "dtype")
    try:
        return NetworkConfig.from_dict({k: v for k, v in fields.items() if k not in names}), dtype
    except (ValueError, TypeError) as problem:
        raise ModelError(f"{folder / CONFIG}: {problem}") from problem


def read_weights(path: Path, network: Network) -> None:
    """Load model.safetensors into ``network``; `ModelError` says what is missing, cut off or of another shape."""
    if not path.is_file():
        raise ModelError(f"{path} is missing: the folder holds no weights")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as problem:
        size = path.stat().st_size
        raise ModelError(
            f"{path} ({size} bytes) is no whole safetensors file, it is truncated or foreign: {problem}; "
            "copy or save it again"
        ) from problem
    if network.config.tie_weights and "embedding.weight" in tensors:
        tensors.setdefault("head.weight", tensors["embedding.weight"])
    try:
        network.load_renamed_state_dict(tensors)
    except ValueError as problem:
        raise ModelError(f"{path} does not fit {CONFIG} beside it: {problem}") from problem


def model_card(network: Network, tokenizer: Any, notes: Mapping[str, Any]) -> bytes:
    """README.md: what the model is, in facts that its files hold, and how to use it."""
    config = network.config
    parameters = sum(p.numel() for p in network.parameters())
    rows = {
        "input": config.input + (f", {config.embedding_dim} dimensions" if config.embedding_dim else ""),
        "recurrent layers": f"{config.num_layers} x {config.cell}, {config.hidden_size} units",
        "head": f"linear, {'every step' if config.head == 'all' else 'last step'}" + ", tied" * config.tie_weights,
        "state": f"window of {config.window} tokens" if config.window else "carried from token to token",
        "tokens": f"{config.vocab_size}" + (f", {tokenizer.kind}" if tokenizer is not None else ", no tokenizer"),
        "parameters": f"{parameters:,}",
        "dtype": str(network.head.weight.dtype).removeprefix("torch."),
        "written by": f"fastrnn {__version__}",
        **{str(name): str(value) for name, value in notes.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: fastrnn\npipeline_tag: text-generation\n---\n\n# A recurrent language model\n\n"
        f"| | |\n|---|---|\n{table}\n\n```python\nfrom fastrnn import LanguageModel\n\n"
        'lm = LanguageModel.from_pretrained(".")\nprint(lm.generate("...", max_new_tokens=100, seed=0).text)\n```\n'
    ).encode()


def config_from_weights(weights: Mapping[str, Tensor], vocab_size: int, **options: Any) -> NetworkConfig:
    """The config of a torch.nn model from its state_dict, whose parts `rename_state_dict` knows.

    ``options`` are fields that weights do not tell (head, state, window, dropout); `ModelError` when the rest cannot be
    read.
    """
    weights = rename_state_dict(weights)
    layers = sum(name.startswith("rnn.weight_hh_l") for name in weights)
    if not layers or "head.weight" not in weights:
        raise ModelError(
            f"the state_dict needs recurrent layers and a linear head, it holds {', '.join(weights) or 'nothing'}"
        )
    gates, hidden = weights["rnn.weight_hh_l0"].shape
    inputs = weights["rnn.weight_ih_l0"].shape[1]
    cell = {4: "lstm", 3: "gru", 1: "rnn_tanh"}.get(gates // hidden)
    embedding = weights.get("embedding.weight")
    if embedding is not None:
        options |= {"input": "embedding", "embedding_dim": embedding.shape[1]}
    elif inputs in (1, vocab_size):
        options["input"] = "scalar" if inputs == 1 else "onehot"
    if cell is None or "input" not in options or weights["head.weight"].shape != (vocab_size, hidden):
        raise ModelError(
            f"the state_dict is of no network known here: W_hh {gates} x {hidden}, input {inputs}, head "
            f"{tuple(weights['head.weight'].shape)}, {vocab_size} tokens"
        )
    return NetworkConfig(vocab_size, cell=cell, hidden_size=hidden, num_layers=layers, **options)


def read_pickled(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """(state_dict, s2i) of a file that ``torch.save([state_dict, s2i], path)`` wrote, without running its code.

    Raises FileNotFoundError, or `ModelError` when the file is truncated, needs code to load, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content, problem = None, "it holds something else"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        problem = "it needs code to be run, which is refused"
    except (RuntimeError, EOFError, ValueError) as error:
        problem = f"it is truncated or foreign: {error}"
    pair = isinstance(content, (list, tuple)) and len(content) == 2 and all(isinstance(part, dict) for part in content)
    if not pair or not all(isinstance(value, Tensor) for value in content[0].values()):
        raise ModelError(f"{path} is no checkpoint of the form [state_dict, s2i]: {problem}")
    return content[0], content[1]


def write_pickled(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], s2i: Mapping[str, int]) -> None:
    """Write what `read_pickled` reads, as ``torch.save([state_dict, s2i], path)`` does, atomically."""
    with atomic_file(path) as file:
        torch.save([{name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}, dict(s2i)], file)
