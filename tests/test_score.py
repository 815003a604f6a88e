"""Prefilled states and scores: a state is its prompt, a score is the cross-entropy of a plain loop."""

import math
from pathlib import Path

import pytest
import torch
from small_models import TEXT, make
from torch import nn
from torch.nn import functional as F

import oracle
from fastrnn.models import LanguageModel
from fastrnn.sequence import SequenceState


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make()


def test_a_prefilled_text_is_the_prompt(lm: LanguageModel, tmp_path: Path) -> None:
    state = lm.prefill("the quick ")
    options = {"seed": 3, "max_new_tokens": 10, "num_return_sequences": 4}
    expected = [g.text for g in lm.generate("the quick ", **options)]
    assert [g.text for g in lm.generate(state=state, **options)] == expected
    state.save(tmp_path / "s.safetensors")
    assert [g.text for g in lm.generate(state=SequenceState.load(tmp_path / "s.safetensors"), **options)] == expected
    continued = lm.generate("brown", state=state, **options)
    assert continued[0].usage["prompt_tokens"] == 15
    assert "".join(lm.stream(state=state, seed=3, max_new_tokens=10)) == expected[0]


def plain_losses(lm: LanguageModel, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cross-entropy of ids[1:] by a torch.nn model, one prefix at a time."""
    config = lm.config
    rnn = nn.GRU(config.input_size, config.hidden_size, config.num_layers).to(dtype)
    rnn.load_state_dict(lm.rnn.state_dict())
    losses = []
    with torch.no_grad():
        for t in range(1, len(ids)):
            seen = ids[max(0, t - config.window) : t] if config.window else ids[:t]
            y = rnn(lm.embedding.weight.to(dtype)[seen])[0]
            logits = F.linear(y[-1], lm.head.weight.to(dtype), lm.head.bias.to(dtype))
            losses.append(F.cross_entropy(logits, ids[t]))
    return torch.stack(losses).sum() if losses else torch.zeros((), dtype=dtype)


@pytest.mark.parametrize("window", [None, 4, 60])
def test_scores_are_the_cross_entropy_of_a_plain_loop(window: int | None) -> None:
    lm = make(**({"state": "window", "window": window} if window else {}))
    texts = [TEXT, "the", "q", "", "jumps over"]
    scores = lm.score(texts)
    for text, score in zip(texts, scores, strict=True):
        ids = torch.tensor(lm.tokenizer.encode(text))
        found = torch.tensor(score.nll, dtype=torch.float32)
        if len(text) > 1:
            oracle.assert_close(found, plain_losses(lm, ids, torch.float64), plain_losses(lm, ids, torch.float32))
            assert score.perplexity == pytest.approx(math.exp(score.nll / (len(text) - 1)))
            assert score.bits_per_char == pytest.approx(score.nll / math.log(2) / (len(text) - 1))
        assert score.tokens == score.chars == max(len(text) - 1, 0)
    assert scores.total.nll == pytest.approx(sum(s.nll for s in scores))
    assert scores.total.chars == sum(max(len(t) - 1, 0) for t in texts)
    assert math.isnan(scores[3].perplexity)
    assert lm.score(TEXT).nll == pytest.approx(scores[0].nll, rel=1e-5)


def test_the_score_of_generated_text_is_its_nll() -> None:
    """With a start token every token counts, and a complete text counts its end: likelihoods of whole lines."""
    lm = make(specials=("bos", "eos"))
    with torch.no_grad():
        lm.head.bias[lm.tokenizer.eos_id] += 5
    lines = lm.generate("", num_return_sequences=30, seed=5, max_new_tokens=200, return_nll=True, temperature=0.8)
    whole = [g for g in lines if g.finish_reason == "eos" and "<" not in g.text]
    plain = [g for g in whole if lm.tokenizer.encode(g.text) == g.token_ids[:-1]]
    assert len(plain) > 10
    scores = lm.score([g.text for g in plain])
    for line, score in zip(plain, scores, strict=True):
        assert score.nll == pytest.approx(line.nll, rel=1e-4, abs=1e-4)
        assert score.tokens == len(line.token_ids)
        assert score.chars == len(line.text)
    assert lm.score("the", complete=False).tokens == 3
    with pytest.raises(ValueError, match="complete=True needs a tokenizer with an eos token"):
        make().score("the", complete=True)
