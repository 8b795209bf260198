"""Sampling against a float64 reference, one token at a time, and the statistics of its noise.

Everything random here has a fixed seed, so the statistical tests give the same figure every time.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import sampling as sampling_module
from runtime.draw import _bits, draw, draw_with_tensors, noise_key
from runtime.messages import Sampling, TokenLogprobs
from runtime.sampling import (
    FAILED_TOKEN,
    SampleOutput,
    SamplingRow,
    TokenHistory,
    prompt_logprobs,
    sample,
    warm_up,
)

GREEDY = Sampling(temperature=0.0)

# -- the reference --------------------------------------------------------------------------------------------


def reference_bits(key: int, count: int) -> list[int]:
    """SplitMix64 by the book, in whole numbers."""
    mask, state, outputs = (1 << 64) - 1, key, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def reference_process(x: np.ndarray, s: Sampling, index: int, prompt: list[int], output: list[int]) -> np.ndarray:
    """One step after the other, in float32 as the model's logits are: which tokens tie must not depend on precision."""
    x = x.copy()
    for token, bias in s.logit_bias:
        x[token] += bias
    if index < s.min_tokens:
        for token in s.banned_until_min_tokens:
            x[token] = -np.inf
    for token in set(prompt) | set(output):
        penalty = np.float32(s.repetition_penalty)
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token, count in Counter(output).items():
        x[token] -= np.float32(s.frequency_penalty) * np.float32(count)
        x[token] -= np.float32(s.presence_penalty)
    return x.astype(np.float64)


def reference_draw(x: np.ndarray, s: Sampling, index: int) -> int:
    """Filter as the definitions say, by sorting everything, then Gumbel-max in its textbook form."""
    scaled = (x - x.max()) / s.temperature
    if s.top_k > 0:
        scaled[scaled < np.sort(scaled)[::-1][: s.top_k][-1]] = -np.inf
    if s.top_p < 1.0:
        order = np.argsort(-scaled, kind="stable")
        p = np.exp(scaled[order]) / np.exp(scaled).sum()
        last = order[np.flatnonzero(np.cumsum(p) - p < s.top_p)[-1]] if s.top_p > 0 else order[0]
        scaled[scaled < scaled[last]] = -np.inf
    if s.min_p > 0:
        scaled[scaled < math.log(s.min_p)] = -np.inf
    bits = reference_bits(noise_key(s.seed, index), len(x))
    gumbel = [-math.log(-math.log1p(-((b >> 12) + 0.5) * 2.0**-52)) for b in bits]
    return int(np.argmax(scaled + gumbel))


def chi_square_excess(observed: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations chi-square is above what chance gives (Wilson-Hilferty)."""
    degrees = observed.size - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    return ((chi_square / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def random_logits(num_rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


# -- greedy ---------------------------------------------------------------------------------------------------


def test_greedy_takes_the_largest_and_the_lowest_of_a_tie() -> None:
    logits = random_logits(5, 300)
    logits[2, [17, 40, 200]] = 99.0
    output = sample(logits, [SamplingRow(GREEDY, i) for i in range(5)])
    assert output == SampleOutput([int(row.argmax()) for row in logits.numpy()], [], [])
    assert output.tokens[2] == 17


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, 10), []) == SampleOutput([], [], [])


def test_logits_are_left_alone() -> None:
    logits = random_logits(3, 50)
    before = logits.clone()
    busy = Sampling(logit_bias=((1, 5.0),), repetition_penalty=2.0, top_k=3, min_tokens=2, banned_until_min_tokens=(4,))
    for rows in ([busy] * 3, [GREEDY, busy, GREEDY]):
        sample(logits, [SamplingRow(s, 0, TokenHistory([1, 2, 3])) for s in rows])
        assert torch.equal(logits, before)


def test_half_precision_logits_are_read_as_they_are() -> None:
    logits = random_logits(4, 200)
    rows = [SamplingRow(Sampling(seed=3), i) for i in range(4)]
    assert sample(logits.bfloat16(), rows) == sample(logits.bfloat16().float(), rows)


# -- broken logits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["nan", "inf", "all -inf", "one nan among -inf"])
@pytest.mark.parametrize("settings_", [GREEDY, Sampling(seed=1), Sampling(logit_bias=((0, 1.0),), logprobs=2)])
def test_a_broken_row_fails_alone(broken: str, settings_: Sampling) -> None:
    logits = random_logits(4, 100)
    healthy = sample(logits, [SamplingRow(settings_, i) for i in range(4)])
    logits[1] = {"all -inf": -torch.inf, "one nan among -inf": -torch.inf}.get(broken, logits[1])
    if broken != "all -inf":
        logits[1, 60] = torch.inf if broken == "inf" else torch.nan
    output = sample(logits, [SamplingRow(settings_, i) for i in range(4)])
    assert output.failed == [1]
    assert output.tokens[1] == FAILED_TOKEN
    assert [output.tokens[i] for i in (0, 2, 3)] == [healthy.tokens[i] for i in (0, 2, 3)]
    if settings_.logprobs >= 0:
        assert [entry is None for entry in output.logprobs] == [False, True, False, False]


def test_a_row_that_allows_no_token_fails() -> None:
    ban = Sampling(min_tokens=1, banned_until_min_tokens=tuple(range(8)))
    output = sample(random_logits(2, 8), [SamplingRow(ban, 0), SamplingRow(ban, 1)])
    assert output.failed == [0]
    assert output.tokens[1] >= 0


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [5, 300, 699]] = torch.tensor([0.0, 1.0, 0.5])
    rows = [SamplingRow(Sampling(temperature=5.0, seed=seed), 0) for seed in range(200)]
    tokens = sample(logits.expand(200, -1), rows).tokens
    assert set(tokens) == {5, 300, 699}
    best = np.full(200, 300)
    keys = [noise_key(seed, 0) for seed in range(200)]
    assert draw_with_tensors(logits.expand(200, -1), best, [row.sampling for row in rows], keys) == tokens


# -- against the reference ------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Sampling, int, list[int], list[int]]:
    vocab = draw(st.sampled_from([1, 2, 7, 256, 257, 700]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = (generator.standard_normal(vocab) * draw(st.sampled_from([0.0, 0.5, 4.0, 15.0]))).astype(np.float32)
    if draw(st.booleans()):
        x = np.round(x)  # ties
    token = st.integers(0, vocab - 1)
    tokens = st.lists(token, max_size=8)
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.05, 0.7, 1.0, 3.0])),
        top_p=draw(st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01])),
        top_k=draw(st.sampled_from([0, 1, 3, 50, 1000])),
        min_p=draw(st.sampled_from([0.0, 0.013, 0.31])),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        frequency_penalty=draw(st.sampled_from([0.0, 0.37, -1.5])),
        presence_penalty=draw(st.sampled_from([0.0, 0.81, -0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.23, 0.8])),
        logit_bias=tuple((t, draw(st.sampled_from([-100.0, -1.3, 2.1]))) for t in draw(st.sets(token, max_size=3))),
        min_tokens=draw(st.integers(0, 3)),
        banned_until_min_tokens=tuple(draw(tokens))[: vocab - 1],
    )
    return x, sampling, draw(st.integers(0, 5)), draw(tokens), draw(tokens)


@settings(deadline=None, max_examples=400)
@given(case=cases())
def test_a_drawn_token_is_that_of_the_reference(case: tuple[np.ndarray, Sampling, int, list[int], list[int]]) -> None:
    x, s, index, prompt, output = case
    processed = reference_process(x, s, index, prompt, output)
    got = sample(torch.from_numpy(x)[None], [SamplingRow(s, index, TokenHistory(prompt, output))])
    if processed.max() == -np.inf:
        assert got.failed == [0]
        return
    # Where a threshold falls on a rounding error, either side of it is right.
    near = [-1e-5, 0.0, 1e-5]
    accepted = {
        reference_draw(processed, nudged(s, top_p=s.top_p * (1 + p), min_p=s.min_p * (1 + m)), index)
        for p in near
        for m in near
    }
    assert got.tokens[0] in accepted


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_greedy_takes_the_largest_of_the_processed(
    case: tuple[np.ndarray, Sampling, int, list[int], list[int]],
) -> None:
    x, s, index, prompt, output = case
    processed = reference_process(x, s, index, prompt, output)
    row = SamplingRow(nudged(s, temperature=0.0), index, TokenHistory(prompt, output))
    got = sample(torch.from_numpy(x)[None], [row])
    if processed.max() == -np.inf:
        assert got.failed == [0]
    else:
        assert got.tokens[0] == processed.argmax()


@settings(deadline=None, max_examples=100)
@given(batch=st.lists(cases(), min_size=1, max_size=6), vocab=st.sampled_from([257, 700]))
def test_tensor_operations_draw_what_the_host_draws(batch: list, vocab: int) -> None:
    logits = torch.stack([torch.from_numpy(np.resize(x, vocab)) for x, *_ in batch])
    best = logits.numpy().argmax(1)
    samplings, keys = [s for _, s, *_ in batch], [noise_key(s.seed, index) for _, s, index, *_ in batch]
    on_host, by_tensors = draw(logits, best, samplings, keys), draw_with_tensors(logits, best, samplings, keys)
    for row, (ours, theirs) in enumerate(zip(on_host, by_tensors, strict=True)):
        if ours != theirs:  # only a nucleus that ends on a rounding error may differ
            nudges = [draw(logits[row : row + 1], best[row : row + 1], [nudged(samplings[row], top_p=p)], keys[row : row + 1])
                      for p in (samplings[row].top_p * (1 - 1e-5), samplings[row].top_p * (1 + 1e-5))]  # fmt: skip
            assert [theirs] in nudges


def nudged(s: Sampling, **changes: float) -> Sampling:
    fields = {name: getattr(s, name) for name in s.__struct_fields__} | changes
    return Sampling(**fields)


def test_a_large_vocabulary_draws_the_same_both_ways() -> None:
    logits = random_logits(12, 49_152, seed=5)
    best = logits.numpy().argmax(1)
    for s in (Sampling(), Sampling(temperature=2.5), Sampling(top_k=40), Sampling(top_p=0.8), Sampling(min_p=0.02)):
        keys = [noise_key(7, index) for index in range(12)]
        tokens = draw(logits, best, [s] * 12, keys)
        assert tokens == draw_with_tensors(logits, best, [s] * 12, keys)
        assert len(set(tokens)) > 1


@pytest.mark.parametrize(
    "s",
    [
        Sampling(temperature=0.5, min_p=0.2),
        Sampling(temperature=2.0, min_p=0.3),
        Sampling(top_k=5, top_p=0.6),
        Sampling(temperature=3.0, top_k=12, top_p=0.5, min_p=0.4),
        Sampling(temperature=2.0, top_p=0.3, min_p=0.1),
    ],
)
def test_filters_work_together_the_same_both_ways(s: Sampling) -> None:
    logits = random_logits(400, 40, seed=6, scale=1.0)
    best, keys = logits.numpy().argmax(1), [noise_key(3, index) for index in range(400)]
    mixed = [s if row % 3 else Sampling(top_k=row % 7) for row in range(400)]
    tokens = draw(logits, best, mixed, keys)
    assert tokens == draw_with_tensors(logits, best, mixed, keys)
    assert tokens == [
        reference_draw(row.numpy().astype(np.float64), nudged(each, seed=3), index)
        for index, (row, each) in enumerate(zip(logits, mixed, strict=True))
    ]
    assert np.count_nonzero(np.array(tokens) != best) > 100, "the filters leave something to draw"


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(9, 30)
    best, keys = logits.numpy().argmax(1), [noise_key(1, index) for index in range(9)]
    samplings = [Sampling(top_k=k) for k in range(9)]
    whole = draw_with_tensors(logits, best, samplings, keys)
    monkeypatch.setattr("runtime.draw._ELEMENTS_AT_ONCE", 70)
    assert draw_with_tensors(logits, best, samplings, keys) == whole


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 5e-324])
def test_a_vanishing_temperature_is_greedy_and_safe(temperature: float) -> None:
    logits = random_logits(8, 2000)
    logits[3, 4] = -torch.finfo(torch.float32).max
    rows = [SamplingRow(Sampling(temperature=temperature, top_p=0.9, min_p=0.1, seed=i), i) for i in range(8)]
    greedy = logits.argmax(1)
    assert sample(logits, rows).tokens == greedy.tolist()
    keys = [noise_key(i, i) for i in range(8)]
    assert draw_with_tensors(logits, greedy.numpy(), [row.sampling for row in rows], keys) == greedy.tolist()


@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_filters_that_leave_one_token(only_one: dict) -> None:
    logits = random_logits(50, 500)
    rows = [SamplingRow(Sampling(temperature=4.0, seed=i, **only_one), 0) for i in range(50)]
    assert sample(logits, rows).tokens == logits.argmax(1).tolist()


def test_min_tokens_ends_on_time() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = 50.0
    s = Sampling(temperature=0.0, min_tokens=3, banned_until_min_tokens=(2,))
    assert [sample(logits, [SamplingRow(s, index)]).tokens[0] == 2 for index in range(5)] == [False] * 3 + [True] * 2


def test_a_token_outside_the_vocabulary_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="not below 8"):
        sample(random_logits(1, 8), [SamplingRow(Sampling(logit_bias=((8, 1.0),)), 0)])
    with pytest.raises(AssertionError, match="without its history"):
        sample(random_logits(1, 8), [SamplingRow(Sampling(presence_penalty=1.0), 0)])


# -- the noise ------------------------------------------------------------------------------------------------


def test_the_generator_is_splitmix64() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert reference_bits(1234567, 4) == published
    assert [int(_bits(np.uint64(1234567), i)) for i in range(4)] == published


def test_keys_are_pinned() -> None:
    """A change of these values changes what every seeded request answers."""
    assert noise_key(0, 0) == 0xA706DD2F4D197E6F
    assert noise_key(42, 7) == 0xBC16A3D4CC48678E
    assert noise_key(-1, 0) == noise_key(2**64 - 1, 0)
    keys = {noise_key(seed, index) for seed in range(-100, 100) for index in range(100)}
    assert len(keys) == 20_000


def test_the_same_seed_and_index_draw_the_same_token_in_any_company() -> None:
    rows = [
        SamplingRow(s, index, TokenHistory([1, 2], [3]))
        for index, s in enumerate(
            [
                Sampling(seed=11),
                GREEDY,
                Sampling(seed=11, top_p=0.8),
                Sampling(seed=2, top_k=20, temperature=0.6),
                Sampling(seed=2, presence_penalty=0.4),
                Sampling(seed=9, min_p=0.05, logprobs=3),
                Sampling(seed=5, logit_bias=((4, 3.0),)),
            ]
        )
    ]
    logits = random_logits(len(rows), 1001, seed=8)
    alone = [sample(logits[i : i + 1], [row]).tokens[0] for i, row in enumerate(rows)]
    generator = np.random.default_rng(4)
    num_threads = torch.get_num_threads()
    try:
        for size in [*range(1, 12), 64]:
            torch.set_num_threads(1 + size % 2)
            order = generator.integers(0, len(rows), size)
            assert sample(logits[order], [rows[i] for i in order]).tokens == [alone[i] for i in order]
    finally:
        torch.set_num_threads(num_threads)


NUM_DRAWS = 40_000


@pytest.mark.parametrize("varying", ["seed", "index", "both"])
@pytest.mark.parametrize("case", ["plain", "hot", "top_k", "top_p", "min_p"])
def test_tokens_come_as_often_as_their_probability_says(varying: str, case: str) -> None:
    x = np.array([2.0, 1.5, 1.0, 0.9, 0.5, 0.1, 0.0, -0.2, -0.7, -1.0, -1.1, -2.0], dtype=np.float32)
    s = {
        "plain": Sampling(),
        "hot": Sampling(temperature=2.0),
        "top_k": Sampling(top_k=5),
        "top_p": Sampling(top_p=0.75),
        "min_p": Sampling(min_p=0.2),
    }[case]
    p = np.exp(x.astype(np.float64) / s.temperature)
    p /= p.sum()
    if case == "top_k":
        p[5:] = 0
    elif case == "top_p":
        p[np.cumsum(p) - p >= 0.75] = 0
    elif case == "min_p":
        p[p < 0.2 * p[0]] = 0
    p /= p.sum()
    keys = [noise_key(i * (varying != "index"), i * (varying != "seed")) for i in range(NUM_DRAWS)]
    logits = torch.from_numpy(x).expand(NUM_DRAWS, -1)
    tokens = draw_with_tensors(logits, np.zeros(NUM_DRAWS), [s] * NUM_DRAWS, keys)
    counts = np.bincount(tokens, minlength=len(x))
    assert not counts[p == 0].any(), "a filtered token was drawn"
    assert abs(chi_square_excess(counts[p > 0], p[p > 0] * NUM_DRAWS)) < 3.5


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 1), (0, 2), (256, 0), (1 << 32, 0)])
def test_neighbouring_seeds_and_indices_are_independent(step: tuple[int, int]) -> None:
    vocab = 8
    rows = [Sampling()] * NUM_DRAWS
    pairs = np.zeros((vocab, vocab))
    first = draw_with_tensors(
        torch.zeros(NUM_DRAWS, vocab),
        np.zeros(NUM_DRAWS),
        rows,
        [noise_key(i % 200, i // 200) for i in range(NUM_DRAWS)],
    )
    second = draw_with_tensors(
        torch.zeros(NUM_DRAWS, vocab),
        np.zeros(NUM_DRAWS),
        rows,
        [noise_key(i % 200 + step[0], i // 200 + step[1]) for i in range(NUM_DRAWS)],
    )
    np.add.at(pairs, (first, second), 1)
    assert abs(chi_square_excess(pairs, np.full(pairs.shape, NUM_DRAWS / pairs.size))) < 3.5


def test_the_bits_of_neighbouring_tokens_are_uniform_and_independent() -> None:
    keys = [noise_key(seed, 3) for seed in range(40)]
    bits = np.array([reference_bits(key, 5000) for key in keys], dtype=np.uint64)
    high, low = (bits >> np.uint64(60)).astype(int), (bits >> np.uint64(12) & np.uint64(15)).astype(int)
    for a, b in [(high[:, 1:], high[:, :-1]), (high[1:], high[:-1]), (high, low), (low[:, 1:], low[:, :-1])]:
        counts = np.bincount((16 * a + b).ravel(), minlength=256)
        assert abs(chi_square_excess(counts, np.full(256, counts.sum() / 256))) < 3.5


def test_rare_tokens_are_drawn_as_rarely_as_they_should() -> None:
    """The tail of the noise: 2,000 tokens of probability 1e-6 each must together come in 0.2 % of the draws."""
    x = torch.full((1, 2001), math.log(1e-6))
    x[0, 0] = math.log(1 - 2000e-6)
    num_draws = 20_000
    keys = [noise_key(1, index) for index in range(num_draws)]
    tokens = draw(x.expand(num_draws, -1), np.zeros(num_draws, dtype=int), [Sampling()] * num_draws, keys)
    num_rare = sum(token != 0 for token in tokens)
    assert abs(num_rare - 40) < 3.5 * math.sqrt(40)


# -- log-probabilities ----------------------------------------------------------------------------------------


def reference_logprobs(x: np.ndarray, token: int, top: int) -> TokenLogprobs:
    x = x.astype(np.float64)
    logprobs = x - x.max() - math.log(np.exp(x - x.max()).sum())
    order = np.argsort(-x, kind="stable")[:top]
    return TokenLogprobs(
        token, logprobs[token], int((x > x[token]).sum()), [(int(i), float(logprobs[i])) for i in order]
    )


def assert_same(got: TokenLogprobs | None, expected: TokenLogprobs) -> None:
    assert got is not None
    assert (got.token, got.rank) == (expected.token, expected.rank)
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    assert [token for token, _ in got.top] == [token for token, _ in expected.top]
    assert [logprob for _, logprob in got.top] == pytest.approx([logprob for _, logprob in expected.top], abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 5, 300]),
    tops=st.lists(st.integers(-1, 20), min_size=1, max_size=5),
    has_ties=st.booleans(),
)
def test_logprobs_are_those_of_the_model(seed: int, vocab: int, tops: list[int], has_ties: bool) -> None:
    x = np.random.default_rng(seed).standard_normal((len(tops), vocab)).astype(np.float32) * 8
    x = np.round(x) if has_ties else x
    rows = [
        SamplingRow(Sampling(temperature=0.5, seed=i, top_k=3, logit_bias=((0, 4.0),), logprobs=top), i)
        for i, top in enumerate(tops)
    ]
    output = sample(torch.from_numpy(x), rows)
    if max(tops) < 0:
        assert output.logprobs == []
        return
    for i, top in enumerate(tops):
        if top < 0:
            assert output.logprobs[i] is None
        else:
            assert_same(output.logprobs[i], reference_logprobs(x[i], output.tokens[i], top))


def test_prompt_logprobs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_module, "_ELEMENTS_AT_ONCE", 700)
    logits = random_logits(25, 100)
    targets = list(range(0, 100, 4))
    for top in (0, 4):
        entries = prompt_logprobs(logits, torch.tensor(targets), top)
        assert len(entries) == 25
        for entry, x, target in zip(entries, logits.numpy(), targets, strict=True):
            assert_same(entry, reference_logprobs(x, target, top))
    assert prompt_logprobs(logits[:0], [], 2) == []


def test_large_logits_keep_their_precision() -> None:
    logits = torch.tensor([[30_000.0, 29_999.0, 29_990.0]])
    (entry,) = prompt_logprobs(logits, [1], 0)
    assert entry.logprob == pytest.approx(-1 - math.log1p(math.exp(-1) + math.exp(-10)), abs=1e-5)


# -- histories ------------------------------------------------------------------------------------------------


@given(prompt=st.lists(st.integers(0, 300), max_size=300), output=st.lists(st.integers(0, 300), max_size=300))
def test_a_history_counts_what_was_said(prompt: list[int], output: list[int]) -> None:
    half = len(output) // 2
    history = TokenHistory(prompt, output[:half])
    for token in output[half:]:
        history.add(token)
    ids, counts = history.ids.tolist(), history.counts.tolist()
    assert sorted(ids) == sorted(set(prompt) | set(output))
    assert dict(zip(ids, counts, strict=True)) == {token: output.count(token) for token in ids}


def test_warming_up_compiles_the_draw() -> None:
    from runtime.draw import _race

    warm_up()
    num_compiled = len(_race.signatures)
    sample(random_logits(2, 49), [SamplingRow(Sampling(seed=i), i) for i in range(2)])
    assert len(_race.signatures) == num_compiled, "a request would have waited for the compiler"


# -- other devices --------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_samples_what_the_host_samples() -> None:
    logits = random_logits(40, 5000, seed=3)
    logits[6, 10] = torch.nan
    logits[7, [5, 9]] = 40.0
    variants = [
        GREEDY,
        Sampling(temperature=0.9),
        Sampling(top_k=30),
        Sampling(top_p=0.83),
        Sampling(min_p=0.01),
        Sampling(repetition_penalty=1.2, frequency_penalty=0.3, logprobs=4),
        Sampling(temperature=0.0, logit_bias=((17, 30.0),), logprobs=0),
        Sampling(temperature=0.0, min_tokens=50, banned_until_min_tokens=(5, 6)),
    ]
    rows = [
        SamplingRow(nudged(variants[i % len(variants)], seed=i), i, TokenHistory(range(50), range(20, 90)))
        for i in range(40)
    ]
    host, device = sample(logits, rows), sample(logits.cuda(), rows)
    assert device.tokens == host.tokens
    assert device.failed == host.failed == [6]
    for ours, theirs in zip(host.logprobs, device.logprobs, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same(theirs, ours)
