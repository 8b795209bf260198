"""`attend`, both back ends, against a dense float64 reference over random ragged batches and scattered pages."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.attention import attend, attend_torch
from runtime.batch import LayerKV, StepBatch

pytestmark = pytest.mark.usefixtures("kernel_threads")

BACK_ENDS = {"kernels": attend, "torch": attend_torch}
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Case:
    """Sequences with all their K and V known, and a pool of pages that holds what came before this step."""

    def __init__(self, rows, num_heads, num_kv_heads, head_dim, block_size, dtype, seed):
        """`rows` is a list of (context before the step, tokens in the step)."""
        torch.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.rows = rows
        contexts = [before + new for before, new in rows]
        num_blocks = [-(-c // block_size) for c in contexts]
        total = sum(num_blocks)
        block_ids = rng.permutation(total + 7)[:total]
        page_of_block = np.full(total + 7, -1, np.int32)
        page_of_block[block_ids] = rng.permutation(total + 3)[:total]
        tables, taken = np.zeros((len(rows), max(num_blocks)), np.int32), 0
        for r, n in enumerate(num_blocks):
            tables[r, :n] = block_ids[taken : taken + n]
            taken += n
        data = torch.full((total + 3, 2, block_size, num_kv_heads, head_dim), float("nan"), dtype=dtype)
        self.keys = [torch.randn(c, num_kv_heads, head_dim).to(dtype) for c in contexts]
        self.values = [torch.randn(c, num_kv_heads, head_dim).to(dtype) for c in contexts]
        for r, (before, _) in enumerate(rows):
            for p in range(before):
                page = page_of_block[tables[r, p // block_size]]
                data[page, 0, p % block_size] = self.keys[r][p]
                data[page, 1, p % block_size] = self.values[r][p]
        self.kv = LayerKV(layer=3, data=data, page_of_block=page_of_block)
        self.q = torch.randn(sum(n for _, n in rows), num_heads, head_dim).to(dtype)
        self.k = torch.cat([k[before:] for k, (before, _) in zip(self.keys, rows, strict=True)])
        self.v = torch.cat([v[before:] for v, (before, _) in zip(self.values, rows, strict=True)])
        positions = np.concatenate([np.arange(before, before + n) for before, n in rows])
        self.batch = StepBatch(
            positions=torch.from_numpy(positions.astype(np.int64)),
            query_starts=np.cumsum([0] + [n for _, n in rows]).astype(np.int32),
            context_lens=np.array(contexts, np.int32),
            block_tables=tables,
        )

    def reference(self, scale, sliding_window=None, softcap=None):
        """The result in float64, without pages and without torch's attention."""
        results, first = [], 0
        for keys, values, (before, new) in zip(self.keys, self.values, self.rows, strict=True):
            q = self.q[first : first + new].double()
            first += new
            group = q.shape[1] // keys.shape[1]
            scores = torch.einsum("qhd,khd->hqk", q, keys.double().repeat_interleave(group, 1)) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            query_at = torch.arange(before, before + new)[:, None]
            key_at = torch.arange(before + new)[None, :]
            hidden = key_at > query_at
            if sliding_window is not None:
                hidden |= query_at - key_at >= sliding_window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            results.append(torch.einsum("hqk,khd->qhd", weights, values.double().repeat_interleave(group, 1)))
        return torch.cat(results)


@st.composite
def cases(draw):
    num_kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 2, 3, 7]))
    row = st.tuples(st.integers(0, 300), st.one_of(st.just(1), st.integers(1, 90)))
    return Case(
        rows=draw(st.lists(row, min_size=1, max_size=4)),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from([2, 8, 16, 48, 64, 80, 128])),
        block_size=draw(st.sampled_from([1, 5, 16, 32])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.mark.parametrize("back_end", BACK_ENDS)
@given(case=cases(), window=st.one_of(st.none(), st.integers(1, 320)), softcap=st.one_of(st.none(), st.just(5.0)))
@settings(deadline=None, max_examples=60)
def test_matches_a_dense_reference(back_end, case, window, softcap):
    scale = 1.3 * case.q.shape[2] ** -0.5
    out = BACK_ENDS[back_end](
        case.q, case.k, case.v, case.batch, case.kv, scale=scale, sliding_window=window, softcap=softcap
    )
    assert out.dtype == case.q.dtype
    assert out.shape == case.q.shape
    torch.testing.assert_close(
        out.double(), case.reference(scale, window, softcap), rtol=0, atol=TOLERANCE[case.q.dtype]
    )


@given(data=st.data(), dtype=st.sampled_from(list(TOLERANCE)), window=st.one_of(st.none(), st.integers(1, 200)))
@settings(deadline=None, max_examples=40)
def test_bits_do_not_depend_on_how_a_sequence_is_cut_into_steps(data, dtype, window):
    """A prompt in one chunk and tokens one by one, beside any cuts: as after cached prefixes, preemptions, crashes."""
    num_prompt, num_more = data.draw(st.integers(1, 300)), data.draw(st.integers(0, 20))
    total = num_prompt + num_more
    seed = data.draw(st.integers(0, 2**31))
    plain = [0, *range(num_prompt, total + 1)]
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=12))})
    expected, found = (_in_steps(steps, num_prompt, dtype, window, seed) for steps in (plain, cuts))
    assert torch.equal(expected, found)


def _in_steps(cuts, num_prompt, dtype, window, seed):
    case = Case([(0, cuts[-1])], num_heads=6, num_kv_heads=2, head_dim=48, block_size=16, dtype=dtype, seed=seed)
    parts = []
    for first, stop in itertools.pairwise(cuts):
        batch = StepBatch(
            positions=torch.arange(first, stop),
            query_starts=np.array([0, stop - first], np.int32),
            context_lens=np.array([stop], np.int32),
            block_tables=case.batch.block_tables,
            prompt_lens=np.array([num_prompt], np.int32),
        )
        rows = slice(first, stop)
        parts.append(attend(case.q[rows], case.k[rows], case.v[rows], batch, case.kv, scale=0.2, sliding_window=window))
    return torch.cat(parts)
