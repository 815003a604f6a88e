"""`fastrnn.sampling.sample` and `SamplingParams`: what they accept, what they refuse and how they say so."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastrnn import backends, ops, sampling
from fastrnn import reference_sample as definition
from fastrnn.sampling import SamplingParams, sample


def test_numbers_of_the_kernel():
    assert SamplingParams().numbers() == (1.4426950216293335, 0, 0, math.inf)
    numbers = SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.25).numbers()
    assert numbers == (0.0, 5, 2**62, 2.0)
    assert SamplingParams(min_p=1).numbers().min_p == 0.0
    assert SamplingParams(top_p=math.nextafter(1, 0)).numbers().top_p == 2**63 - 2**10
    assert SamplingParams(top_p=5e-324).numbers().top_p == 1
    for temperature in (1e-30, 0.3, 1.1, 1e30):
        exact = torch.tensor(math.log2(math.e) / temperature, dtype=torch.float64).float()
        assert SamplingParams(temperature).numbers().scale == float(exact)
        assert exact >= definition.SCALE_MIN
    assert dataclasses.replace(SamplingParams(0.5), top_k=3) == SamplingParams(0.5, top_k=3)
    assert hash(SamplingParams()) == hash(SamplingParams())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be 0 (greedy) or between 1e-30 and 1e+30, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be 0 (greedy) or between 1e-30 and 1e+30, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be 0 (greedy) or between 1e-30 and 1e+30, got inf"),
        ({"temperature": 1e-40}, ValueError, "temperature must be 0 (greedy) or between 1e-30 and 1e+30, got 1e-40"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0 (0 = off), got -1"),
        ({"top_k": 2.5}, TypeError, "top_k must be a whole number, got 2.5"),
        ({"top_k": True}, TypeError, "top_k must be a whole number, got True"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1 (1 = off), got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1 (1 = off), got 1.5"),
        ({"top_p": math.nan}, ValueError, "top_p must be above 0 and at most 1 (1 = off), got nan"),
        ({"min_p": -0.1}, ValueError, "min_p must be between 0 and 1 (0 = off), got -0.1"),
        ({"min_p": 1.1}, ValueError, "min_p must be between 0 and 1 (0 = off), got 1.1"),
        ({"mode_of": 0}, ValueError, "mode_of must be at least 1 (1 = a plain draw), got 0"),
        ({"mode_of": 1.0}, TypeError, "mode_of must be a whole number, got 1.0"),
    ],
)
def test_parameters_are_checked(arguments, error, message):
    with pytest.raises(error) as caught:
        SamplingParams(**arguments)
    assert str(caught.value) == message
    with pytest.raises(error) as caught:
        sample(torch.zeros(2, 3), **arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a floating-point tensor, got <class 'list'>"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "floating-point tensor, got torch.int64"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, "logits must be (V,) or (B, V), got (2, 3, 4)"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have 1 to 16777216 columns (tokens), got 0"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor, True = allowed, got torch.float32"),
        (
            {"mask": torch.ones(3, 3, dtype=torch.bool)}, ValueError,
            "mask must be (3,) or (2, 3) because logits are (2, 3), got (3, 3)",
        ),
        ({"temperature": [1.0]}, ValueError, "temperature must be one number or one for each of the 2 rows, got 1"),
        ({"temperature": [1.0, -2.0]}, ValueError, "temperature must be 0 (greedy) or between 1e-30 and 1e+30, got -2"),
        ({"seed": 2**64}, ValueError, f"seed must be an integer of 64 bits, got {2**64}"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
        ({"step": -1}, ValueError, "step must be at least 0 and below 2**32, got -1"),
        ({"sequence": 3}, ValueError, "sequence must have one id for each of the 2 rows, got 3"),
        ({"sequence": torch.arange(3)}, ValueError, "sequence must be one number or one for each of the 2 rows, got 3"),
    ],
)  # fmt: skip
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error) as caught:
        sample(**({"logits": torch.zeros(2, 3)} | arguments))
    assert message in str(caught.value)


def test_rows_that_cannot_be_drawn():
    x = torch.zeros(12, 3)
    x[1, 0] = x[4, 2] = math.nan
    x[2] = -math.inf
    x[3, 1] = math.inf
    with pytest.raises(ValueError, match="cannot draw from") as caught:
        sample(x)
    assert str(caught.value) == (
        "sample: cannot draw from rows 1, 4: NaN among the logits; row 3: +inf among the logits, so that there is no"
        " softmax; row 2: no allowed token (every logit is masked or -inf)"
        " (return_details=True gives each row's status instead)"
    )
    found = sample(x, return_details=True)
    assert found.status.tolist() == [0, 1, 3, 2, 1] + [0] * 7
    assert found.token[1:5].tolist() == [-1] * 4
    assert bool(found.logprob[1:5].isnan().all())
    assert not bool(found.logprob[5:].isnan().any())
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more: no allowed token"):
        sample(torch.zeros(12, 3), mask=torch.zeros(3, dtype=torch.bool))
    assert set(sampling.STATUS_TEXTS) == {
        definition.STATUS_OK, definition.STATUS_NAN, definition.STATUS_INFINITE, definition.STATUS_EMPTY,
        definition.STATUS_PARAMETER,
    }  # fmt: skip


def test_shapes_and_dtypes():
    x = torch.randn(4, 50)
    whole = sample(x, 0.9, seed=3, step=7)
    assert whole.shape == (4,)
    assert whole.dtype == torch.int64
    for r in range(4):
        one = sample(x[r], 0.9, seed=3, step=7, sequence=r)
        assert one.shape == ()
        assert int(one) == int(whole[r])
    details = sample(x[0], 0.9, seed=3, step=7, return_details=True)
    assert [part.shape for part in details] == [()] * 5
    assert int(details.token) == int(whole[0])
    assert sample(torch.empty(0, 50)).shape == (0,)
    assert sample(torch.empty(0, 50), return_details=True).margin.shape == (0,)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(sample(x.to(dtype), seed=3), sample(x.to(dtype).float(), seed=3))
    x.requires_grad_()
    assert not sample(x).requires_grad


def test_a_number_or_one_a_row():
    """Scalars, lists, tensors and arrays that say the same thing give the same draws."""
    x = torch.randn(6, 40)
    base = sample(x, 0.7, top_k=9, top_p=0.8, min_p=0.05, seed=2**64 - 5, step=4)
    same = {"top_k": [9] * 6, "top_p": torch.full((6,), 0.8, dtype=torch.float64), "min_p": np.full(6, 0.05)}
    more = {"seed": torch.full((6,), -5), "step": [4] * 6, "sequence": list(range(6))}
    assert torch.equal(sample(x, [0.7] * 6, **same, **more), base)
    assert torch.equal(sample(x, 0.7, top_k=9, top_p=0.8, min_p=0.05, seed=-5, step=torch.full((6,), 4)), base)
    assert torch.equal(sample(x, np.float64(0.7), top_k=np.int64(9), top_p=0.8, min_p=0.05, seed=-5, step=4), base)
    mixed = sample(x, [0.0, 1.0, 0.0, 1.0, 0.0, 1.0], seed=1)
    assert torch.equal(mixed[::2], x.argmax(-1)[::2])
    assert torch.equal(mixed[1::2], sample(x, seed=1)[1::2])


@pytest.mark.skipif(backends.available()["cpu"] is not None, reason="the C++ extension is not built")
def test_numbers_go_to_the_kernel_as_numbers(monkeypatch):
    """Where each parameter is one number the C++ backend is given those, and draws what its columns draw."""
    x = torch.randn(37, 300)
    x[5, 2], x[9] = math.nan, -math.inf
    given = (*SamplingParams(0.7, 9, 0.8, 0.05).numbers(), -5, 2**32 - 1)
    token, refused = torch.ops.fastrnn_cpu.draw(x, *given)
    fine = [row for row in range(37) if row not in (5, 9)]
    assert refused == 2
    assert torch.equal(token[fine], sample(x, [0.7] * 37, top_k=9, top_p=0.8, min_p=0.05, seed=-5, step=2**32 - 1,
                                           return_details=True).token[fine])  # fmt: skip
    monkeypatch.setattr(ops, "sample", None)
    drawn = sample(x[fine].requires_grad_(), 0.7, top_k=9, top_p=0.8, min_p=0.05, seed=-5, step=2**32 - 1)
    rows = torch.ops.fastrnn_cpu.draw(x[fine], *given)[0]
    assert torch.equal(drawn, rows)
    with pytest.raises(RuntimeError, match=r"sample: logits must be \(B, V\) float32, got \(37, 300\) float64"):
        torch.ops.fastrnn_cpu.draw(x.double(), *given)


def test_a_mask_for_all_or_for_each():
    x = torch.randn(5, 30)
    mask = torch.arange(30) % 3 == 0
    one = sample(x, mask=mask, seed=6)
    assert not bool((one % 3).any())
    assert torch.equal(one, sample(x, mask=mask[None], seed=6))
    assert torch.equal(one, sample(x, mask=mask.expand(5, -1), seed=6))
    assert torch.equal(one, sample(x.masked_fill(~mask, -math.inf), seed=6))


def test_the_inputs_stay_as_they_are():
    x = torch.randn(5, 300)
    before = x.clone()
    sample(x, 0.5, top_k=3, top_p=0.5, min_p=0.1, mask=torch.ones(300, dtype=torch.bool))
    sample(x, 0.5, return_details=True)
    assert torch.equal(x, before)


def test_fake_tensors_are_not_kept():
    """A call under fake tensors leaves nothing behind that a later real call would meet."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = sample(torch.randn(3, 71), 0.77, seed=991, return_details=True)
    assert fake.token.shape == (3,)
    assert sample(torch.randn(3, 71), 0.77, seed=991).tolist()
