"""Models as folders: they come back the same, survive failed saves, and damaged ones say what is wrong."""

import errno
import os
from pathlib import Path

import pytest
import torch
from small_models import TEXT, make
from torch import nn

import oracle
from fastrnn import storage
from fastrnn.models import LanguageModel
from fastrnn.network import NetworkConfig
from fastrnn.storage import ModelError
from fastrnn.text import Tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cell": "lstm", "num_layers": 2, "dropout": 0.1},
        {"input": "scalar", "embedding_dim": None, "head": "last", "state": "window", "window": 8},
        {"input": "onehot", "embedding_dim": None, "cell": "rnn_relu"},
        {"embedding_dim": 12, "tie_weights": True},
    ],
    ids=["gru", "lstm", "window", "onehot", "tied"],
)
def test_a_saved_model_comes_back_the_same(options: dict, tmp_path: Path) -> None:
    lm = make(**options)
    lm.generation_config.temperature = 0.7
    lm.save_pretrained(tmp_path / "m", notes={"validation loss": 1.25})
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "README.md"}
    back = LanguageModel.from_pretrained(tmp_path / "m")
    assert (back.config, back.generation_config) == (lm.config, lm.generation_config)
    assert not back.training
    assert list(back.state_dict()) == list(lm.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), lm.state_dict().values(), strict=True))
    prompts = ["the ", "fox jumps over"]
    assert back.generate(prompts, seed=1, max_new_tokens=9) == lm.generate(prompts, seed=1, max_new_tokens=9)
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"| parameters | {sum(p.numel() for p in lm.parameters()):,} |" in card
    assert "| validation loss | 1.25 |" in card
    if options.get("tie_weights"):
        assert back.head.weight is back.embedding.weight
    lm.double().save_pretrained(tmp_path / "m")
    assert LanguageModel.from_pretrained(tmp_path / "m").head.weight.dtype == torch.float64
    assert LanguageModel.from_pretrained(tmp_path / "m", dtype=torch.float32).head.weight.dtype == torch.float32


@pytest.mark.parametrize("moment", ["write", "sync", "rename"])
def test_a_save_that_fails_leaves_the_old_model_whole(moment: str, tmp_path: Path, monkeypatch) -> None:
    old, new, folder = make(), make(hidden_size=20), tmp_path / "m"
    old.save_pretrained(folder)
    (folder / "metrics.jsonl").write_text("kept")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    calls = 0

    def fail(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    place, name = {"write": (storage, "open"), "sync": (storage.os, "fsync"), "rename": (storage.os, "replace")}[moment]
    real = open if moment == "write" else getattr(place, name)
    monkeypatch.setattr(place, name, fail, raising=False)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert LanguageModel.from_pretrained(folder).config == old.config


def damage_config(folder: Path, **fields) -> None:
    config = storage.read_json(folder / "config.json")
    (folder / "config.json").write_bytes(storage.json_bytes({**config, **fields}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: os.truncate(f / "model.safetensors", 500), r"\(500 bytes\) is no whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04 pickled"), "truncated or foreign"),
        (lambda f: os.truncate(f / "config.json", 40), "config.json is not whole JSON"),
        (lambda f: (f / "config.json").write_text("[1]"), "must hold a JSON object, it holds a list"),
        (lambda f: damage_config(f, format="x", model_type="gpt2"), "is not of this program: it describes gpt2"),
        (lambda f: damage_config(f, hidden_size=99), r"does not fit config.json beside it: .* must be"),
        (lambda f: damage_config(f, num_layers=2), "missing rnn.bias_hh_l1"),
        (lambda f: damage_config(f, cell="transformer"), "cell must be one of"),
        (lambda f: damage_config(f, dtype="int32"), "dtype must name a floating type"),
        (lambda f: damage_config(f, surprise=1), "unknown field surprise"),
        (lambda f: os.truncate(f / "tokenizer.json", 80), "tokenizer.json is not a whole tokenizer.json"),
        (lambda f: make(corpus="ab").tokenizer.to_file(f / "tokenizer.json"), "the two files are of different models"),
        (lambda f: (f / "generation_config.json").write_text('{"heat": 1}'), "unknown generation setting heat"),
        (lambda f: (f / "generation_config.json").write_text('{"top_p": 0}'), "top_p must be above 0"),
    ],
)
def test_damaged_and_foreign_folders_say_what_is_wrong(damage, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make().save_pretrained(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        LanguageModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_and_a_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; a model is a folder"):
        LanguageModel.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file, not a folder"):
        LanguageModel.from_pretrained(tmp_path / "file")


class TutorialModel(nn.Module):
    """The Shakespeare notebook's model."""

    def __init__(self, vocab: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(input_size=1, hidden_size=hidden, num_layers=layers, batch_first=True, dropout=0.225)
        self.dropout = nn.Dropout(0.225)
        self.linear = nn.Linear(hidden, vocab)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(self.lstm(x)[0][:, -1, :]))


def test_the_shakespeare_notebook_s_checkpoint_imports(tmp_path: Path) -> None:
    s2i = {c: i for i, c in enumerate(sorted(set(TEXT)))}
    theirs = TutorialModel(len(s2i), 10, 4).eval()
    torch.save([theirs.state_dict(), s2i], tmp_path / "single-char.pth")
    lm = LanguageModel.from_tutorial_002(tmp_path / "single-char.pth")
    assert lm.config == NetworkConfig(
        len(s2i), input="scalar", hidden_size=10, num_layers=4, dropout=0.225, head="last", state="window", window=100
    )
    ids = torch.tensor([lm.tokenizer.encode(TEXT[:30])])
    assert ids.tolist() == [[s2i[c] for c in TEXT[:30]]]
    with torch.no_grad():
        expected = theirs.double()(ids.double()[..., None] / len(s2i))
        plain = theirs.float()(ids.float()[..., None] / len(s2i))
        oracle.assert_close(lm(ids)[0], expected, plain)
    lm.save_pretrained(tmp_path / "m")
    assert isinstance(Tokenizer.from_file(tmp_path / "m" / "tokenizer.json"), Tokenizer)
    assert LanguageModel.from_tutorial_002(tmp_path / "single-char.pth", state="carried").config.window is None


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_other_checkpoints_are_refused_and_run_no_code(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        LanguageModel.from_tutorial_002(path)
    torch.save([Evil(), {}], path)
    with pytest.raises(ModelError, match="needs code to be run, which is refused"):
        LanguageModel.from_tutorial_002(path)
    assert not Path("evil").exists()
    model = TutorialModel(5, 4, 2)
    torch.save(model.state_dict(), path)
    with pytest.raises(ModelError, match="it holds something else"):
        LanguageModel.from_tutorial_002(path)
    torch.save([model.state_dict(), {"a": 0, "b": 1}], path)
    with pytest.raises(ModelError, match=r"is of no network known here: .* 2 tokens"):
        LanguageModel.from_tutorial_002(path)
    torch.save([{"a": torch.zeros(1)}, {"a": 0}], path)
    with pytest.raises(ModelError, match="needs recurrent layers and a linear head"):
        LanguageModel.from_tutorial_002(path)
    torch.save([model.state_dict(), {c: i for i, c in enumerate("abcde")}], path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ModelError, match="truncated or foreign"):
        LanguageModel.from_tutorial_002(path)
