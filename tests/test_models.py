"""LanguageModel: text in and out, streaming, stop strings, prompts, and every option a caller can get wrong."""

import math

import pytest
import torch
from small_models import TEXT, make, outcome
from torch import nn

from fastrnn.models import LanguageModel
from fastrnn.network import NetworkConfig
from fastrnn.reading import TextReader
from fastrnn.results import Generation
from fastrnn.text import TokenizerError, from_vocabulary


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make()


def test_a_text_gives_one_result_and_a_list_gives_a_list(lm: LanguageModel) -> None:
    one = lm.generate("the ", max_new_tokens=12, seed=1, return_logprobs=True, return_nll=True)
    assert isinstance(one, Generation)
    assert len(one.text) == len(one.token_ids) == len(one.logprobs) == 12
    assert one.text == lm.tokenizer.decode(one.token_ids)
    assert one.nll == pytest.approx(-math.fsum(one.logprobs), rel=1e-12)
    assert one.usage == {"prompt_tokens": 4, "completion_tokens": 12}
    many = lm.generate(["the ", "quick", "q"], max_new_tokens=12, seed=1, return_logprobs=True)
    assert [m.usage["prompt_tokens"] for m in many] == [4, 5, 1]
    assert outcome(many[0]) == outcome(one)
    assert many[0].nll is None
    assert lm.generate([], seed=1) == []
    assert lm.generate(["the "], seed=1, max_new_tokens=3)[0].text == one.text[:3]


def test_output_i_of_a_list_is_the_call_alone_with_its_sequence_id(lm: LanguageModel) -> None:
    prompts = [TEXT[i : i + 1 + i % 9] for i in range(30)]
    options = {"max_new_tokens": 15, "seed": 9, "num_return_sequences": 3, "return_logprobs": True}
    together = lm.generate(prompts, batch_size=7, **options)
    for i in (0, 1, 17, 29):
        alone = lm.generate(prompts[i], sequence_id=i, **options)
        assert [outcome(g) for g in alone] == [outcome(g) for g in together[3 * i : 3 * i + 3]]
        assert len({g.text for g in alone}) > 1, "the outputs of a prompt differ"
        assert [(g.seed, g.sequence >> 32, g.sequence & 0xFFFFFFFF) for g in alone] == [(9, i, j) for j in range(3)]
    fewer = lm.generate(prompts[4], sequence_id=4, **{**options, "num_return_sequences": 1, "max_new_tokens": 6})
    assert fewer.token_ids == together[12].token_ids[:6]


def test_a_seed_per_prompt_means_the_same_text_alone(lm: LanguageModel) -> None:
    many = lm.generate(["the ", "dog", "the "], seed=[5, 6, 7], max_new_tokens=10)
    assert [g.text for g in many] == [
        lm.generate(p, seed=s, max_new_tokens=10).text for p, s in [("the ", 5), ("dog", 6), ("the ", 7)]
    ]


def test_without_a_seed_torch_s_generator_decides(lm: LanguageModel) -> None:
    texts = [lm.generate("the ", max_new_tokens=20).text for _ in range(3)]
    assert len(set(texts)) == 3
    torch.manual_seed(0)
    assert [lm.generate("the ", max_new_tokens=20).text for _ in range(3)] == texts


def test_values_per_prompt_and_a_sweep_over_one_prompt(lm: LanguageModel) -> None:
    heat = [0.0, 0.3, 1.0, 1.8]
    sweep = lm.generate("the ", temperature=torch.tensor(heat), max_new_tokens=9, seed=3)
    assert [g.text for g in sweep] == [lm.generate("the ", temperature=t, max_new_tokens=9, seed=3).text for t in heat]
    rows = lm.generate(
        ["a", "dog", "fox"], max_new_tokens=[2, 0, 5], top_k=[1, 2, 3], repetition_penalty=[1.0, 2.0, 1.5], seed=3
    )
    assert [len(g.token_ids) for g in rows] == [2, 0, 5]
    for i, (prompt, n, k, penalty) in enumerate([("a", 2, 1, 1.0), ("dog", 0, 2, 2.0), ("fox", 5, 3, 1.5)]):
        alone = lm.generate(prompt, max_new_tokens=n, top_k=k, repetition_penalty=penalty, seed=3, sequence_id=i)
        assert alone.token_ids == rows[i].token_ids
    with pytest.raises(ValueError, match="top_k has 2 values but there are 3 prompts"):
        lm.generate(["a", "b", "c"], top_k=[1, 2], seed=0)
    with pytest.raises(ValueError, match="the other lists have 3"):
        lm.generate("a", top_k=[1, 2], temperature=[1.0, 0.5, 0.2], seed=0)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_stop_strings_end_a_text_wherever_tokens_break(kind: str) -> None:
    """The text is that of the free run up to the first stop string, even one that spans tokens."""
    corpus = "söme ünïcode 🎉 text, and the words repeat and repeat. " * 20
    lm = make(kind, corpus=corpus)
    options = {"max_new_tokens": 60, "num_return_sequences": 24, "seed": 4}
    prompt = "the words"
    free = lm.generate(prompt, **options)
    middle = free[0].text[len(free[0].text) // 2 :][:3]
    stops = ["e", " a", middle, "zzz not there"]
    stopped = lm.generate(prompt, stop_strings=stops, batch_size=5, **options)
    ended = 0
    for whole, cut in zip(free, stopped, strict=True):
        ends = [at for at in map(whole.text.find, stops) if at >= 0]
        assert cut.text == (whole.text[: min(ends)] if ends else whole.text)
        assert cut.finish_reason == ("stop" if ends else "length")
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        ended += bool(ends)
    assert ended


def test_eos_ends_a_text_and_is_not_part_of_it() -> None:
    lm = make(specials=("bos", "eos"))
    eos = lm.tokenizer.eos_id
    with torch.no_grad():
        lm.head.bias[eos] += 6
    results = lm.generate("", num_return_sequences=40, seed=1, max_new_tokens=30)
    done = [g for g in results if g.finish_reason == "eos"]
    assert len(done) > 20
    assert all(g.token_ids[-1] == eos and eos not in g.token_ids[:-1] for g in done)
    assert all(g.text == lm.tokenizer.decode(g.token_ids[:-1]) and "<eos>" not in g.text for g in done)
    longer = lm.generate("", seed=1, max_new_tokens=30, eos_token_id=())
    assert longer.finish_reason == "length"
    newline = lm.tokenizer.id("\n")
    lines = lm.generate("the", num_return_sequences=40, seed=1, eos_token_id=[eos, newline], max_new_tokens=80)
    assert all("\n" not in g.text for g in lines)
    with pytest.raises(ValueError, match="eos_token_id must be in"):
        lm.generate("a", eos_token_id=999)


def test_the_streamer_gets_every_output_s_pieces_and_can_stop_one(lm: LanguageModel) -> None:
    got: dict[int, str] = {}

    def streamer(index: int, piece: str) -> bool:
        got[index] = got.get(index, "") + piece
        return index == 1 and len(got[1]) >= 4

    results = lm.generate(["the ", "a", "dog"], seed=2, max_new_tokens=11, stop_strings=["qu"], streamer=streamer)
    assert [got.get(i, "") for i in range(3)] == [g.text for g in results]
    assert (results[1].finish_reason, len(results[1].text)) == ("stop", 4)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_streamed_pieces_joined_are_the_text(kind: str) -> None:
    lm = make(kind, corpus="naïve café 🎉🎊 and more ünïcode text, again and again " * 9)
    for seed in range(4):
        options = {"max_new_tokens": 80, "seed": seed, "temperature": 1.5, "stop_strings": ["é e", "xx"]}
        pieces = list(lm.stream("and", **options))
        assert "".join(pieces) == lm.generate("and", **options).text
        assert all(pieces)
        "".join(pieces).encode()  # a lone surrogate would raise


def test_a_stream_can_be_left_at_any_time(lm: LanguageModel) -> None:
    lm.train()
    pieces = lm.stream("the ", seed=1, max_new_tokens=1000)
    first = next(pieces) + next(pieces)
    assert lm.training
    assert torch.is_grad_enabled()
    pieces.close()
    assert first == lm.eval().generate("the ", seed=1, max_new_tokens=2).text
    with pytest.raises(TypeError, match="stream has no option banana"):
        lm.stream("the", banana=1)
    with pytest.raises(ValueError, match="stream yields one output and these options ask for 3"):
        lm.stream("the", num_return_sequences=3)


def test_text_reader_holds_back_what_may_become_a_stop_string(lm: LanguageModel) -> None:
    reader = TextReader(lm.tokenizer.stream_decoder(), ["fox jumps", "x q"])
    pieces = [reader.push(token) for token in lm.tokenizer.encode("the fox dog")]
    assert "".join(pieces) == "the fox dog"
    assert pieces[4:8] == ["", "", "", ""], "f, o, x and the space wait"
    reader = TextReader(lm.tokenizer.stream_decoder(), ["dog"])
    pieces = [reader.push(token) for token in lm.tokenizer.encode("lazy do")]
    assert "".join(pieces) == "lazy "
    assert reader.finish() == "do"


@pytest.mark.parametrize(("head", "state"), [("last", "window"), ("all", "carried")])
def test_tutorial_002_s_own_loop_gives_the_same_text(head: str, state: str) -> None:
    """Its generation cell: the whole window through nn.LSTM for each character, the most frequent of 80 draws."""
    vocab = sorted(set(TEXT))
    prompt = TEXT[:20]
    torch.manual_seed(0)
    lstm, linear = nn.LSTM(1, 16, 2, batch_first=True, dropout=0.2), nn.Linear(16, len(vocab))
    linear.weight.data.mul_(8)
    model = LanguageModel(
        NetworkConfig(
            len(vocab), input="scalar", hidden_size=16, num_layers=2, head=head, state=state,
            window=len(prompt) if state == "window" else None,
        ),
        from_vocabulary(vocab),
    )  # fmt: skip
    weights = {f"lstm.{k}": v for k, v in lstm.state_dict().items()}
    model.load_renamed_state_dict(weights | {f"linear.{k}": v for k, v in linear.state_dict().items()})
    lstm.eval().double(), linear.double()
    ids, text = [vocab.index(c) for c in prompt], ""
    with torch.no_grad():
        for _ in range(40):
            x = torch.tensor(ids, dtype=torch.float64).view(1, -1, 1) / len(vocab)
            best = int(linear(lstm(x)[0][:, -1]).argmax())
            text += vocab[best]
            ids = [*ids, best] if state == "carried" else [*ids, best][1:]
    assert model.generate(prompt, temperature=0, max_new_tokens=40).text == text
    options = {"max_new_tokens": 20, "seed": 0, "num_return_sequences": 30, "return_nll": True, "temperature": 1.1}
    single, voted = model.generate(prompt, **options), model.generate(prompt, mode_of=80, **options)
    assert sum(g.nll for g in voted) < sum(g.nll for g in single), "a vote of 80 prefers likely characters"


# --- prompts ---


def test_empty_prompts_need_a_start_token(lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"the prompt is empty and this model has no start token \(bos or eos\)"):
        lm.generate("", seed=0)
    lines = make(specials=("eos",))
    assert lines.generate("", max_new_tokens=3, seed=0).usage["prompt_tokens"] == 1
    assert lines.encode("").tolist() == [lines.tokenizer.eos_id]
    assert lines.encode("the").tolist() == lines.tokenizer.encode("the")
    lines.generation_config.start_token_id = lines.tokenizer.eos_id
    assert lines.encode("the").tolist() == [lines.tokenizer.eos_id, *lines.tokenizer.encode("the")]
    both = make(specials=("bos", "eos"))
    assert both.encode("the").tolist() == [both.tokenizer.bos_id, *both.tokenizer.encode("the")]


def test_unknown_characters_are_named_or_skipped(lm: LanguageModel) -> None:
    with pytest.raises(TokenizerError, match=r"'ß'.*U\+00DF") as caught:
        lm.generate(["the", "straße"], seed=0)
    assert isinstance(caught.value, ValueError)
    skipped = lm.generate("straße", unk="skip", seed=0, max_new_tokens=5)
    assert skipped.text == lm.generate("strae", seed=0, max_new_tokens=5).text
    with pytest.raises(ValueError, match="the prompt is empty"):
        lm.generate("ßßß", unk="skip", seed=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature must be 0"),
        ({"top_p": 0}, ValueError, "top_p must be above 0"),
        ({"min_p": 2}, ValueError, "min_p must be between 0 and 1"),
        ({"top_k": -3}, ValueError, "top_k must be at least 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be a whole number of at least 0"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be a whole number of at least 1"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be positive"),
        ({"stop_strings": [""]}, ValueError, "stop_strings must be texts of at least one character"),
        ({"sequence_id": -1}, ValueError, "sequence_id must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"window": 5}, ValueError, "needs a network with state='window'"),
    ],
)
def test_bad_options_say_what_is_wrong_before_anything_runs(lm, options, error, message) -> None:
    with pytest.raises(error, match=message):
        lm.generate("the ", **{"seed": 0, **options})


def test_no_new_tokens(lm: LanguageModel) -> None:
    result = lm.generate("the ", max_new_tokens=0, return_logprobs=True, return_nll=True)
    assert outcome(result) == ("", [], [], "length")
    assert result.nll == 0
    assert list(lm.stream("the ", max_new_tokens=0)) == []


def test_weights_that_are_nan_give_errors_and_not_text(lm: LanguageModel) -> None:
    broken = make()
    with torch.no_grad():
        broken.head.bias[0] = math.nan
    result = broken.generate("the ", seed=0)
    assert (result.text, result.finish_reason) == ("", "error")
    assert "NaN among the logits" in result.error
    with pytest.raises(RuntimeError, match="NaN among the logits"):
        list(broken.stream("the ", seed=0))


def test_ten_megabytes_of_prompt() -> None:
    """A prompt of any length runs through in pieces."""
    lm = make("byte", hidden_size=8, embedding_dim=4)
    prompt = "0123456789abcdef" * 655_360
    result = lm.generate(prompt, max_new_tokens=3, temperature=0)
    assert result.usage == {"prompt_tokens": 10_485_760, "completion_tokens": 3}
    assert len(result.token_ids) == 3


def test_a_model_without_a_tokenizer_takes_ids() -> None:
    lm = LanguageModel(NetworkConfig(20, hidden_size=8))
    result = lm.generate([3, 4], max_new_tokens=5, seed=0)
    assert (result.text, len(result.token_ids)) == ("", 5)
    assert lm.generate([[3, 4], torch.tensor([1])], max_new_tokens=5, seed=0)[0].token_ids == result.token_ids
    assert lm.score([3, 4, 5]).tokens == 2
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        lm.generate("text", seed=0)
    with pytest.raises(ValueError, match="the tokenizer has 31 tokens but the config says vocab_size=20"):
        LanguageModel(NetworkConfig(20), from_vocabulary([chr(65 + i) for i in range(31)]))
