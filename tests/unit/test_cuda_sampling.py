"""Sampling as devices with a queue do it, on the CPU: the tokens, failures and log-probabilities of the host's way."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.messages import Sampling
from runtime.sampling import SamplingRow, TokenHistory, sample, sample_queued

VOCAB = 120


def make_row(draw: random.Random) -> SamplingRow:
    sampling = Sampling(
        temperature=draw.choice((0.0, 0.0, 0.3, 1.0, 2.5)),
        top_p=draw.choice((1.0, 0.9, 0.2)),
        top_k=draw.choice((0, 1, 7, 500)),
        min_p=draw.choice((0.0, 0.05)),
        seed=draw.randrange(1 << 40),
        frequency_penalty=draw.choice((0.0, 0.0, 0.7)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
        logit_bias=draw.choice(((), ((3, 4.0), (7, -100.0)))),
        min_tokens=draw.choice((0, 3)),
        banned_until_min_tokens=draw.choice(((), (5, 9))),
        logprobs=draw.choice((-1, -1, 2)),
    )
    history = TokenHistory([1, 2, 3], [draw.randrange(VOCAB) for _ in range(5)])
    return SamplingRow(sampling, draw.randrange(6), history if sampling.needs_history else None)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.booleans())
def test_the_same_tokens_as_on_the_host(seed, num_rows, breaks):
    draw = random.Random(seed)
    logits = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4
    if breaks:
        logits[draw.randrange(num_rows), draw.randrange(VOCAB)] = draw.choice((torch.nan, torch.inf))
        logits[draw.randrange(num_rows)] = -torch.inf
    rows = [make_row(draw) for _ in range(num_rows)]
    before = logits.clone()
    assert sample_queued(logits, rows) == sample(logits, rows)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num()), "the logits were changed"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_of_one_kind(temperature):
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [SamplingRow(Sampling(temperature=temperature, seed=i), 0) for i in range(9)]
    assert sample_queued(logits, rows) == sample(logits, rows)
