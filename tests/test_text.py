"""Tokenizers against their definitions, against the `tokenizers` library reading the same file, and on bad input."""

import codecs
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrnn import text
from fastrnn.textstream import byte_symbols

SAMPLE = (
    "ROMEO: But, soft! what light through yonder window breaks?\nIt is the east (and Juliet is the sun).\n\n"
    "He's 3-times-7 years old; $5 {or} [less] #1... naïve café, Zürich. Ελλάδα 日本 👩‍💻 don't, 'tis 50% off…\tEnd\r\n"
    * 3
)
PATTERN = r" ?\w+|\s|[^\w\s]"
KINDS = {
    "char": {},
    "char-specials": {"specials": ("unk", "bos", "eos", "pad")},
    "char-lower": {"lowercase": True},
    "byte": {"specials": ("eos",)},
    "word": {},
    "word-small": {"vocab_size": 25, "specials": ("<|endoftext|>",)},
    "word-lower": {"lowercase": True, "specials": ("unk",)},
    "regex": {"pattern": PATTERN},
    "bpe": {"vocab_size": 300, "specials": ("eos",)},
}
EXACT = ("char", "char-specials", "byte", "regex", "bpe")

# Every kind of character that has its own trouble: combining, wide, control, line ends, private, above 16 bits.
CHARS = st.characters(exclude_categories=("Cs",))
TEXTS = st.text(st.sampled_from(SAMPLE) | CHARS, max_size=60)


def build(name: str, corpus: str = SAMPLE) -> text.Tokenizer:
    return text.build_tokenizer(name.split("-")[0], corpus, **KINDS[name])


@pytest.fixture(scope="module", params=list(KINDS))
def named(request: pytest.FixtureRequest) -> tuple[str, text.Tokenizer]:
    return request.param, build(request.param)


def stream(tokenizer: text.Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream_decoder()
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def test_same_ids_and_text_as_the_library_from_the_same_file(named, tmp_path: Path) -> None:
    name, tokenizer = named
    path = tmp_path / "tokenizer.json"
    tokenizer.to_file(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    again = text.Tokenizer.from_file(path)
    assert again.kind == tokenizer.kind == name.split("-")[0]
    assert (again.pieces, again.specials, again.vocab_size) == (
        tokenizer.pieces,
        tokenizer.specials,
        library.get_vocab_size(),
    )
    assert (again.unk_id, again.bos_id, again.eos_id, again.pad_id) == (
        tokenizer.unk_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    for sample in (SAMPLE, SAMPLE * 40, "the east", "", "a <eos>b<unk> <|endoftext|><eos>", "café 日本"):
        try:
            ids = tokenizer.encode(sample)
        except text.UnknownTextError:
            assert tokenizer.unk_id is None
            continue
        assert ids == library.encode(sample).ids == again.encode(sample)
        assert tokenizer.decode(ids) == library.decode(ids) == again.decode(ids) == "".join(stream(again, ids))
        assert tokenizer.decode(ids, skip_specials=False) == library.decode(ids, skip_special_tokens=False)
    assert list(tmp_path.iterdir()) == [path]


@given(sample=TEXTS)
def test_any_text_gives_the_ids_of_the_library(sample: str) -> None:
    for name, tokenizer in BUILT.items():
        library = tokenizer.backend
        try:
            ids = tokenizer.encode(sample)
        except text.UnknownTextError:
            # The library drops an unknown character in silence and refuses an unknown word without naming it.
            if tokenizer.kind == "char":
                assert tokenizer.encode(sample, unk="skip") == library.encode(sample).ids
            else:
                with pytest.raises(Exception, match="WordLevel error"):
                    library.encode(sample)
            continue
        assert ids == library.encode(sample).ids, name
        assert tokenizer.decode(ids) == library.decode(ids) == "".join(stream(tokenizer, ids)), name


@given(sample=st.text(st.characters(max_codepoint=127) | st.sampled_from(" \n'ast"), max_size=60))
def test_the_quick_path_of_long_ascii_text_is_the_library_s(sample: str) -> None:
    tokenizer = BUILT["bpe"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastrnn.tokenizer._SHORT", 0)
        assert tokenizer.encode(sample) == tokenizer.backend.encode(sample).ids


def test_long_text_that_is_not_ascii_is_cut_at_piece_boundaries_only() -> None:
    sample = "".join(f"naïve {'x' * (i % 7)} {' ' * (i % 3)}é{i}\n" for i in range(20_000))
    assert BUILT["bpe"].encode(sample) == BUILT["bpe"].backend.encode(sample).ids


@given(sample=TEXTS)
def test_round_trip(sample: str) -> None:
    for name in EXACT:
        kind = name.split("-")[0]
        fresh = text.build_tokenizer(kind, [sample, "x"], **{**KINDS[name], "specials": ()})
        assert fresh.decode(fresh.encode(sample)) == sample, name
    words = text.build_tokenizer("word", [sample, "x"])
    once = words.decode(words.encode(sample))
    assert words.encode(once) == words.encode(sample)


@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_stream_to_the_text_that_decode_and_the_library_give(ids: list[int]) -> None:
    for name, tokenizer in BUILT.items():
        some = [i % tokenizer.vocab_size for i in ids]
        whole = tokenizer.decode(some)
        assert "".join(stream(tokenizer, some)) == whole, name
        assert whole == tokenizer.backend.decode(some), name


@given(data=st.binary(max_size=30))
def test_bytes_stream_whole_code_points_and_replace_by_the_rules_of_utf8(data: bytes) -> None:
    tokenizer = BUILT["byte"]
    pieces = stream(tokenizer, list(data))
    assert "".join(pieces) == data.decode("utf-8", "replace")
    reference = codecs.getincrementaldecoder("utf-8")("replace")
    assert pieces == [*(reference.decode(bytes([b])) for b in data), reference.decode(b"", True)]


BUILT = {name: build(name) for name in KINDS}


def test_half_a_code_point_is_held_back_and_replaced_at_the_end() -> None:
    tokenizer = text.build_tokenizer("byte", "")
    assert stream(tokenizer, list("€".encode())) == ["", "", "€", ""]
    assert stream(tokenizer, list("€".encode()[:2])) == ["", "", "\ufffd"]
    assert stream(tokenizer, [0xE2, 0x41]) == ["", "\ufffdA", ""]
    decoder = tokenizer.stream_decoder()
    decoder.push(0xE2)
    assert (decoder.flush(), decoder.push(0x41), decoder.flush()) == ("\ufffd", "A", "")


def test_char_ids_are_those_of_the_tutorials() -> None:
    hello = text.build_tokenizer("char", "hello world hello world")
    assert hello.pieces == sorted(set("hello world"))
    assert hello.encode("hell") == [3, 2, 4, 4]
    seen = text.build_tokenizer("char", ["Wall St. Bears", "Claw"], order="first-seen")
    assert seen.pieces == list(dict.fromkeys("Wall St. BearsClaw"))
    assert text.build_tokenizer("byte", "").encode("é") == [0xC3, 0xA9]


def test_shakespeare_gives_the_notebook_s_ids(shakespeare: Path) -> None:
    tokenizer = text.build_tokenizer("char", shakespeare.read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == 65
    assert tokenizer.encode("Hello World!") == [20, 43, 50, 50, 53, 1, 35, 53, 56, 50, 42, 2]


def test_word_vocabulary_is_by_frequency_then_alphabet_and_its_limit_counts_everything() -> None:
    corpus = "b a c a b d\nB, b."
    assert text.build_tokenizer("word", corpus).pieces == ["b", "a", "\n", ",", ".", "B", "c", "d"]
    small = text.build_tokenizer("word", corpus, vocab_size=4, specials=("eos",))
    assert small.pieces == ["b", "a", "<unk>", "<eos>"]
    assert (small.unk_id, small.eos_id) == (2, 3)
    assert small.encode("a z b") == [1, 2, 0]
    assert text.build_tokenizer("word", corpus, min_count=2).pieces == ["b", "a", "<unk>"]
    assert text.build_tokenizer("char", "aabc", vocab_size=2).pieces == ["a", "<unk>"]


def test_words_are_joined_as_people_write() -> None:
    line = "Hello, world (a well-known place): it's $5; #1!\nNext... \n(end)"
    words = text.build_tokenizer("word", line)
    assert words.decode(words.encode(line)) == "Hello, world (a well-known place): it's $5; #1!\nNext...\n(end)"


def test_unknown_text_is_named_skipped_or_replaced() -> None:
    tokenizer = text.build_tokenizer("char", "helo wrd")
    with pytest.raises(ValueError) as caught:
        tokenizer.encode("héllo wörld, héh é é")
    message = str(caught.value)
    assert "'é' (U+00E9) at 1, 14, 17 and 1 more" in message
    assert "'ö' (U+00F6) at 7" in message
    assert "unk='skip'" in message
    assert caught.value.pieces == {"é": [1, 14, 17, 19], "ö": [7], ",": [11]}
    assert tokenizer.decode(tokenizer.encode("héllo", unk="skip")) == "hllo"
    with pytest.raises(ValueError, match="needs a vocabulary with an unk piece"):
        tokenizer.encode("é", unk="unk")
    with pytest.raises(ValueError, match="'error', 'skip' or 'unk'"):
        tokenizer.encode("h", unk="drop")
    with_unk = text.build_tokenizer("char", "helo wrd", specials=("unk",))
    assert with_unk.encode("hé") == with_unk.encode("hé", unk="unk") == [with_unk.id("h"), with_unk.unk_id]
    with pytest.raises(text.UnknownTextError, match="reads them as '<unk>'"):
        with_unk.encode("hé", unk="error")
    for kind, options in (("word", {}), ("regex", {"pattern": PATTERN})):
        words = text.build_tokenizer(kind, "to be or", **options)
        with pytest.raises(text.UnknownTextError) as caught:
            words.encode("to zap\u0301 or", unk="error")
        assert list(caught.value.pieces) in (["zap\u0301"], [" zap\u0301"])
    many = "".join(map(chr, range(0x4E00, 0x4E20)))
    with pytest.raises(ValueError, match="and 22 more unknown pieces"):
        tokenizer.encode(many)


def test_unknown_positions_count_from_the_start_of_the_text_past_specials() -> None:
    tokenizer = text.build_tokenizer("char", "ab", specials=("eos",))
    with pytest.raises(text.UnknownTextError) as caught:
        tokenizer.encode("a<eos>bX")
    assert caught.value.pieces == {"X": [7]}


def test_vocabulary_of_a_checkpoint() -> None:
    s2i = {ch: i for i, ch in enumerate("\n !abc")}
    tokenizer = text.from_vocabulary(s2i)
    assert tokenizer.encode("cab!\n") == [s2i[c] for c in "cab!\n"]
    assert tokenizer.kind == "char"
    shuffled = text.from_vocabulary({"b": np.int64(1), "a": torch.tensor(0), "c": 2})
    assert shuffled.pieces == ["a", "b", "c"]
    assert text.from_vocabulary(["to", "be", "\n"], "word", specials=("unk",)).encode("be to\nzap") == [1, 0, 2, 3]


@pytest.mark.parametrize(
    ("vocabulary", "options", "says"),
    [
        (["a", "a"], {}, "'a' twice"),
        ({"a": 0, "b": 2}, {}, "must be 0 to 1"),
        (["ab"], {}, "'ab' cannot be a piece of a char"),
        ([""], {}, "'' cannot be a piece"),
        (["a b"], {"kind": "word"}, "cannot be a piece of a word"),
        (["a"], {"kind": "byte"}, "256 byte symbols"),
        (["a"], {"kind": "bpe"}, "'char', 'byte', 'word' or 'regex'"),
        (["a"], {"unk": "?"}, "neither in the vocabulary"),
        (["a"], {"specials": ("a",)}, "ordinary piece"),
        (["a"], {"specials": ("a b",)}, "without white space"),
        (["\ud800"], {}, r"lone surrogate U\+D800 at position 0"),
        ([], {}, "no pieces"),
    ],
)
def test_bad_vocabularies(vocabulary, options, says: str) -> None:
    with pytest.raises(text.TokenizerError, match=says):
        text.from_vocabulary(vocabulary, **options)


@pytest.mark.parametrize(
    ("kind", "corpus", "options", "says"),
    [
        ("chars", "a", {}, "one of char, byte, word, regex, bpe"),
        ("char", "", {}, "corpus is empty"),
        ("bpe", ["", ""], {}, "corpus is empty"),
        ("word", " \t ", {}, "white space only"),
        ("regex", "a", {}, "needs pattern="),
        ("char", "a", {"pattern": "a"}, "no other kind takes one"),
        ("char", "a", {"order": "random"}, "order must be"),
        ("bpe", "a", {"order": "first-seen"}, "leave order out"),
        ("bpe", "a", {"vocab_size": 256, "specials": ("eos",)}, "at least 257, got 256"),
        ("byte", "a", {"vocab_size": 300}, "takes no vocab_size"),
        ("char", "a", {"vocab_size": 0}, "at least 1, got 0"),
        ("char", "a", {"min_count": 0}, "at least 1, got 0"),
        ("char", "a", {"min_count": 2}, "room for no piece"),
        ("word", "a b", {"vocab_size": 1}, "room for no piece"),
        ("char", "a\udc80", {}, r"lone surrogate U\+DC80 at position 1"),
    ],
)
def test_bad_builds(kind: str, corpus, options, says: str) -> None:
    with pytest.raises(text.TokenizerError, match=says):
        text.build_tokenizer(kind, corpus, **options)


def test_bad_text_and_bad_ids() -> None:
    tokenizer = text.build_tokenizer("char", "abc")
    with pytest.raises(TypeError, match="must be str, got bytes"):
        tokenizer.encode(b"abc")
    with pytest.raises(text.TokenizerError, match="lone surrogate"):
        tokenizer.encode("a\ud800")
    for ids, says in (
        ([3], "from 0 to 2, got 3"),
        ([-1], "got -1"),
        ([[0]], "flat"),
        ([0.5], "float64"),
        (["a"], "flat"),
    ):
        with pytest.raises(text.TokenizerError, match=says):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == "" == tokenizer.decode(iter(()))
    assert tokenizer.encode("") == []
    for ids in (torch.tensor([0, 2]), np.array([0, 2], np.int32), (0, 2), iter([0, 2])):
        assert tokenizer.decode(ids) == "ac"


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        text.Tokenizer.from_file(path)
    whole = text.build_tokenizer("char", "abc").to_str().encode()
    bad = (
        (whole[:-20], "not a whole"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"[]", "no tokenizer.json"),
        (b"{}", "model.vocab"),
    )
    for content, says in bad:
        path.write_bytes(content)
        with pytest.raises(text.TokenizerError, match=says):
            text.Tokenizer.from_file(path)


def test_foreign_tokenizers_run_through_the_library(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({"[UNK]": 0, "new": 1, "##er": 2, "old": 3}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.decoder = tokenizers.decoders.WordPiece()
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    tokenizer = text.Tokenizer.from_file(path)
    assert tokenizer.kind == "other"
    assert tokenizer.encode("newer old") == [1, 2, 3]
    assert "".join(stream(tokenizer, [1, 2, 3])) == tokenizer.decode([1, 2, 3]) == "newer old"
    assert tokenizer.encode("new zap", unk="skip") == [1]
    assert tokenizer.encode("new zap") == [1, 0]
    with pytest.raises(text.UnknownTextError, match="'zap' at 4"):
        tokenizer.encode("new zap", unk="error")


def test_bpe_is_the_same_in_another_process() -> None:
    code = (
        "import sys; from fastrnn import text; sys.stdout.write(text.build_tokenizer("
        "'bpe', sys.stdin.buffer.read().decode(), vocab_size=300, specials=('eos',)).to_str())"
    )
    done = subprocess.run([sys.executable, "-c", code], input=SAMPLE.encode(), capture_output=True, check=True)
    assert json.loads(done.stdout) == json.loads(BUILT["bpe"].to_str())
    assert BUILT["bpe"].vocab_size == 300
    assert BUILT["bpe"].eos_id == 299


def test_byte_symbols_are_the_library_s() -> None:
    assert sorted(byte_symbols()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_symbols())) == 256


def test_text_does_not_import_torch(root: Path) -> None:
    # The package is entered without its __init__, whose imports are another test's business.
    code = (
        "import sys, types; package = types.ModuleType('fastrnn'); package.__path__ = ['fastrnn'];"
        "sys.modules['fastrnn'] = package; import fastrnn.text; raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("name", ["char", "byte", "word", "bpe"])
def test_ten_megabytes_are_encoded(name: str) -> None:
    prompt = ("It is the east, and Juliet is the sun. " * 1000 + "\n") * 256
    ids = BUILT[name].encode(prompt, unk="skip")
    assert len(prompt) > 9_900_000
    assert len(ids) > 2_000_000
    assert BUILT[name].decode(ids[:50]) == BUILT[name].backend.decode(BUILT[name].backend.encode(prompt[:400]).ids[:50])
