"""Corpora, splits and batches against their definitions, resumed anywhere, and on bad input."""

import io
import itertools
import json
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn import data
from fastrnn.shuffle import epoch_key, mix, shuffled

IDS = list(range(1000, 1101))
LINES = [[10 * i + j for j in range(1 + i % 4)] for i in range(1, 24)]
EOS = 7
CASES = {
    "stream": (IDS, {"batch": 3, "steps": 8}),
    "windows": (IDS, {"batch": 16, "steps": 10}),
    "windows-last": (IDS, {"batch": 16, "steps": 10, "stride": 3, "target": "last"}),
    "random": (IDS, {"batch": 4, "steps": 5, "per_epoch": 6}),
    "document": ([IDS[: 3 * n] for n in range(1, 8)], {"steps": 4, "shuffle": True, "max_rows": 9}),
    "lines": (LINES, {"batch": 3, "steps": 5, "eos": EOS}),
}


def make(name: str, **options) -> data.Batches:
    ids, given_options = CASES[name]
    return data.batches(name.split("-")[0], ids, **{"seed": 5, **given_options, **options})


def same(a: data.Batch, b: data.Batch) -> bool:
    pairs = [(getattr(a, f), getattr(b, f)) for f in ("inputs", "targets", "reset", "weight")]
    return a.carry == b.carry and all(x is y is None or torch.equal(x, y) for x, y in pairs)


# Batches


@pytest.mark.parametrize("name", list(CASES))
def test_shapes_types_and_length(name: str) -> None:
    batches = make(name)
    count = len(batches)
    epoch = list(batches)
    assert count == len(epoch) > 1
    assert batches.mode == name.split("-")[0]
    counted = 0
    for batch in epoch:
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.targets.shape == (batch.inputs.shape[:1] if name == "windows-last" else batch.inputs.shape)
        assert batch.carry == (name in ("stream", "lines"))
        assert (batch.reset is None) == (name != "lines")
        for extra, dtype in ((batch.reset, torch.bool), (batch.weight, torch.float32)):
            assert extra is None or (extra.shape == batch.inputs.shape and extra.dtype == dtype)
        counted += batch.targets.numel() if batch.weight is None else int(batch.weight.sum())
        assert same(batch.to("cpu"), batch)
    assert counted == batches.targets


@pytest.mark.parametrize("name", [n for n in CASES if n != "lines"])
def test_targets_are_the_inputs_one_step_on(name: str) -> None:
    for batch in make(name):
        # In IDS and its beginnings each token is one more than the token before it.
        expected = batch.inputs[:, -1] + 1 if name == "windows-last" else batch.inputs + 1
        assert torch.equal(batch.targets, expected)
        assert torch.equal(batch.inputs[:, 1:], batch.inputs[:, :-1] + 1)


@pytest.mark.parametrize("name", list(CASES))
def test_resumed_anywhere_the_batches_are_the_same(name: str) -> None:
    whole = make(name)
    expected = [(epoch, batch) for epoch in range(3) for batch in whole]
    for stop in range(len(expected)):
        first, taken = make(name), 0
        while taken < stop:
            for _ in first:
                taken += 1
                if taken == stop:
                    break
        state = json.loads(json.dumps(first.state_dict()))
        resumed = make(name)
        resumed.load_state_dict(state)
        rest = []
        while len(rest) + stop < len(expected):
            epoch = resumed.epoch
            rest += [(epoch, batch) for batch in resumed]
        assert [e for e, _ in rest] == [e for e, _ in expected[stop:]]
        assert all(same(a, b) for (_, a), (_, b) in zip(rest, expected[stop:], strict=True))


def test_the_saved_position_is_small_and_refuses_other_data() -> None:
    state = make("lines").state_dict()
    assert len(json.dumps(state)) < 300
    for other, says in (
        (make("lines", batch=2), "batch was 3 and is 2"),
        (make("lines", seed=6), "seed was 5 and is 6"),
        (make("stream"), "mode was 'lines' and is 'stream'"),
        (data.Lines(LINES[::-1], batch=3, steps=5, eos=EOS, seed=5), "checksum was"),
    ):
        with pytest.raises(ValueError, match=says):
            other.load_state_dict(state)


def test_stream_rows_go_on_from_batch_to_batch() -> None:
    batches = make("stream")
    rows = torch.cat([b.inputs for b in batches], 1)
    assert rows.tolist() == [IDS[0:33], IDS[33:66], IDS[66:99]]
    assert [b.inputs.shape[1] for b in batches] == [8, 8, 8, 8, 1]
    starts = np.zeros(len(IDS), bool)
    starts[[0, 40, 70]] = True
    reset = torch.cat([b.reset for b in data.Stream(IDS, batch=3, steps=8, starts=starts)], 1)
    assert reset.nonzero().tolist() == [[0, 0], [1, 7], [2, 4]]


@pytest.mark.parametrize(("stride", "size"), [(1, 16), (3, 7), (1, 1), (7, 100)])
def test_every_window_comes_once_an_epoch_in_a_new_order(stride: int, size: int) -> None:
    batches = make("windows", stride=stride, batch=size)
    orders = [[row[0].item() for batch in batches for row in batch.inputs] for _ in range(3)]
    assert all(sorted(order) == IDS[: len(IDS) - 10 : stride] for order in orders)
    assert orders[0] != orders[1] != orders[2]
    plain = torch.cat([batch.inputs[:, 0] for batch in make("windows", stride=stride, batch=size, shuffle=False)])
    assert plain.tolist() == IDS[: len(IDS) - 10 : stride]
    # 101 tokens have 101 - 10 windows with a next token, as in the notebook's range(0, char_count - seq_len).
    assert len(make("windows", stride=1, batch=1)) == 91


def test_random_windows_reach_every_start_evenly() -> None:
    batches = data.batches("random", range(12), batch=50, steps=4, per_epoch=100, seed=1)
    count = Counter(int(x) for batch in batches for x in batch.inputs[:, 0])
    assert sorted(count) == list(range(8))
    # Chi-square with 7 degrees of freedom: 1e-4 of all seeds exceed 29.9.
    assert sum((n - 625) ** 2 / 625 for n in count.values()) < 29.9


def test_documents_are_batches_of_all_their_windows() -> None:
    documents = [IDS[:8], IDS[:3], IDS[:4], IDS[:5]]
    batches = data.batches("document", documents, steps=4)
    shapes = [tuple(b.inputs.shape) for b in batches]
    assert shapes == [(4, 4), (1, 4)]
    assert batches.documents == 2
    assert batches._batch(0).inputs[:, 0].tolist() == IDS[:4]
    assert len(data.batches("document", documents, steps=4, min_windows=4)) == 1
    assert [len(b.inputs) for b in data.batches("document", documents, steps=4, max_rows=3)] == [3, 1, 1]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("bos", [None, 3])
def test_every_line_comes_once_an_epoch_whole_and_after_a_reset(shuffle: bool, bos: int | None) -> None:
    batches = make("lines", shuffle=shuffle, bos=bos)
    for _ in range(3):
        parts = list(batches)
        inputs, targets, reset = (torch.cat([getattr(b, f) for b in parts], 1) for f in ("inputs", "targets", "reset"))
        weight = torch.cat([torch.ones(b.inputs.shape) if b.weight is None else b.weight for b in parts], 1)
        found = []
        for row in range(3):
            real = int(weight[row].sum())
            assert weight[row, :real].all()
            assert inputs.shape[1] - real <= 2 * max(map(len, LINES)) + 2
            at = [*reset[row, :real].nonzero()[:, 0].tolist(), real]
            assert at[0] == 0
            for a, b in itertools.pairwise(at):
                assert inputs[row, a] == (EOS if bos is None else bos)
                assert targets[row, b - 1] == EOS
                assert inputs[row, a + 1 : b].tolist() == targets[row, a : b - 1].tolist()
                found.append(targets[row, a : b - 1].tolist())
        assert sorted(found) == sorted(LINES)
        assert shuffle or found == LINES
    assert all(b.reset is None for b in make("lines", reset=False))


def test_lines_waste_few_steps() -> None:
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, 30, n) for n in rng.integers(5, 60, 5000)]
    batches = data.batches("lines", lines, batch=64, steps=64, eos=30)
    assert sum(b.inputs.numel() for b in batches) < 1.02 * batches.targets


@pytest.mark.parametrize(
    ("mode", "ids", "options", "says"),
    [
        ("stream", range(4), {"batch": 4, "steps": 2}, "has 4 tokens and 4 streams of at least one step need 5"),
        (
            "windows",
            range(10),
            {"batch": 1, "steps": 10},
            "has 10 tokens and one window of 10 .* need 11; give more",
        ),
        ("random", [], {"batch": 1, "steps": 1}, "has 0 tokens"),
        ("document", [[1, 2], [3]], {"steps": 2}, "2 tokens need 3, the longest of 2 has 2"),
        ("document", [], {"steps": 2}, "the longest of 0 has 0"),
        ("lines", [[1]], {"batch": 2, "steps": 2, "eos": 0}, "need at least 2 lines, the corpus has 1"),
        ("windows", range(9), {"batch": 0, "steps": 2}, "batch must be at least 1, got 0"),
        ("windows", range(9), {"batch": 1, "steps": 2, "target": "first"}, "'all' or 'last'"),
        ("stream", [[1, 2], [3, 4]], {"batch": 1, "steps": 1}, "one flat sequence"),
        ("stream", [0.5, 1.0, 2.0], {"batch": 1, "steps": 1}, "integers"),
        ("stream", range(9), {"batch": 1, "steps": 1, "starts": [True]}, "one bool per token"),
        ("streams", range(9), {}, "one of stream, windows, random, document, lines"),
    ],
)
def test_too_little_text_and_bad_options(mode: str, ids, options, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        data.batches(mode, ids, **options)


def test_an_option_that_a_mode_lacks_is_an_error() -> None:
    with pytest.raises(TypeError, match="stride"):
        data.batches("stream", range(9), batch=1, steps=1, stride=2)


def test_smallest_corpora() -> None:
    assert [b.inputs.tolist() for b in data.batches("stream", [1, 2], batch=1, steps=64)] == [[[1]]]
    assert [b.targets.tolist() for b in data.batches("windows", [1, 2], batch=8, steps=1, target="last")] == [[2]]
    (batch,) = data.batches("lines", [[], [5]], batch=2, steps=8, eos=0, shuffle=False)
    assert batch.inputs.tolist() == [[0, 0], [0, 5]]
    assert batch.weight.tolist() == [[1, 0], [1, 1]]


# Order


@given(total=st.integers(1, 400), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 50))
def test_shuffled_is_a_permutation(total: int, seed: int, epoch: int) -> None:
    image = shuffled(np.arange(total), total, seed, epoch)
    assert sorted(image.tolist()) == list(range(total))
    assert shuffled(np.array([total - 1]), total, seed, epoch)[0] == image[-1]


def test_shuffled_orders_are_even() -> None:
    # All 24 orders of 4 things over 4800 seeds; chi-square with 23 degrees of freedom: 1e-4 exceed 56.
    count = Counter(tuple(shuffled(np.arange(4), 4, seed, 0).tolist()) for seed in range(4800))
    assert len(count) == 24
    assert sum((n - 200) ** 2 / 200 for n in count.values()) < 56
    big = shuffled(np.arange(5), 10**12, 0, 0)
    assert len(set(big.tolist())) == 5
    assert (big < 10**12).all()


def test_mix_is_splitmix64() -> None:
    # First outputs of the generator seeded with 1234567, as published with its C source.
    steps = np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1234567)
    assert mix(steps).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert epoch_key(1, 0) != epoch_key(0, 1)


# Corpora


def test_files_and_their_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes("\ufeffnaïve\r\ntext\rend\n".encode())
    assert data.load_corpus(path) == "naïve\ntext\nend\n" == data.load_corpus(str(path))
    assert data.load_corpus(path, limit=5) == "naïve"
    path.write_bytes("é".encode("latin-1"))
    assert data.load_corpus(path, encoding="latin-1") == "é"
    path.write_bytes("é\n".encode("utf-16"))
    assert data.load_corpus(path, encoding="utf-16") == "é\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe")))
    assert data.load_corpus("-") == "from a pipe"


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "corpus.txt"
    with pytest.raises(FileNotFoundError, match="unicode-names, python-docs, news"):
        data.load_corpus(path)
    with pytest.raises(IsADirectoryError):
        data.load_corpus(tmp_path)
    cases = (
        (b"abc\xe9def", r"corpus.txt is not utf-8: byte 3 is 0xE9 .*encoding='latin-1'.*iconv -f LATIN-1 -t UTF-8"),
        ("été".encode("utf-16"), r"byte 0 is 0xFF .*encoding='utf-16'"),
        (b"", "is empty; a corpus needs text"),
        (b" \n\t\n", "white space only"),
    )
    for content, says in cases:
        path.write_bytes(content)
        with pytest.raises(data.CorpusError, match=says):
            data.load_corpus(path)
    with pytest.raises(data.CorpusError, match="no encoding 'utf-9'"):
        data.load_corpus(path, encoding="utf-9")
    with pytest.raises(data.CorpusError, match="limit must be at least 1"):
        data.load_corpus("news", limit=0)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(data.CorpusError, match="standard input is empty"):
        data.load_corpus("-")


def test_ag_news_files(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text('"3","Wall St. ""Bears""","Short-sellers, again\nare back."\n"4","A","B #39;s"\n', encoding="utf-8")
    expected = [(3, 'Wall St. "Bears" Short-sellers, again\nare back.'), (4, "A B #39;s")]
    assert data.read_ag_news(path) == expected
    assert data.load_corpus(path) == [text for _, text in expected]
    assert data.load_corpus(path, limit=1) == [expected[0][1]]
    path.write_text("Class Index,Title,Description\n1,a,b\n", encoding="utf-8")
    assert data.read_ag_news(path) == [(1, "a b")]
    cases = (
        ("1,a,b\nx,a,b\n", "line 2: AG News rows are class,title,description"),
        ("1,a\n", "got 2 columns"),
        ('1,a,"b\n', "not CSV"),
        ("Class Index,Title,Description\n", "has no rows"),
        ("", "has no rows"),
    )
    for content, says in cases:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(data.CorpusError, match=says):
            data.load_corpus(path)


def test_built_in_corpora() -> None:
    names = data.load_corpus("unicode-names")
    assert len(names) > 25_000
    assert len(set("".join(names))) == 38
    assert "LATIN SMALL LETTER A" in names
    assert len(names) == len(set(names))
    docs = data.load_corpus("python-docs")
    assert len(docs) > 300_000
    assert "statement" in docs
    assert data.load_corpus("unicode-names", limit=3) == ["SPACE", "EXCLAMATION MARK", "QUOTATION MARK"]


def test_news_is_the_same_everywhere_and_like_news() -> None:
    news = data.load_corpus("news")
    assert len(news) == 10_000
    assert len(set(news)) > 9_990
    assert 60 <= len(set("".join(news))) <= 82
    assert set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") <= set("".join(news))
    assert min(map(len, news)) > 110
    assert data.load_corpus("news", limit=50) == news[:50]
    assert "  " not in "".join(news)
    assert not set("{}|=") & set("".join(news))
    assert zlib.crc32("\n".join(news[:500]).encode()) == 2030125717


# Splits


def test_a_text_is_split_by_position() -> None:
    assert data.split("abcdefghij", 0.2) == ("abcdefgh", "ij")
    assert data.split("ab", 0.01) == ("a", "b") == data.split("ab", 0.99)
    assert data.split("abc", 0) == ("abc", "")


def test_documents_are_split_by_hash() -> None:
    documents = [f"document {i}" for i in range(1000)]
    train, valid = data.split(documents, 0.1)
    assert len(valid) == 100
    assert sorted(train + valid) == sorted(documents)
    assert train == [d for d in documents if d in set(train)]
    # Neither order nor repetition moves a document to the other side.
    again, held = data.split(documents[::-1] + documents, 0.1)
    assert set(held) == set(valid)
    assert not set(again) & set(held)
    assert data.split(documents, 0.1, seed=1)[1] != valid
    assert data.split(["a", "b"], 0.01)[1] in (["a"], ["b"])
    assert data.split(["a"], 0) == (["a"], [])


def test_bad_splits() -> None:
    for corpus in ("a", "", ["a"], ["a", "a"], []):
        with pytest.raises(data.CorpusError, match="cannot be split"):
            data.split(corpus, 0.1)
    for fraction in (-0.1, 1, float("nan")):
        with pytest.raises(data.CorpusError, match="from 0 to below 1"):
            data.split("abc", fraction)


def test_as_documents() -> None:
    assert data.as_documents("a\n\n b\u2028c\n \n") == ["a", " b\u2028c"]
    assert data.as_documents(("x", "")) == ["x", ""]
