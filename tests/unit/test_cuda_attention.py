"""Attention of the device back end: those candidates that are plain torch, against the kernels; and how one is chosen."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.page_pool import PagePool
from runtime.attention import attend
from runtime.batch import LayerKV, StepBatch
from runtime.cuda import attention as device_attention
from runtime.cuda.attention import Gathered, Packed, Rows, Shape, Varlen, attend_paged, check, choose, find
from runtime.cuda.step import attach

CPU = torch.device("cpu")


def make_shape(**changes):
    shape = Shape(CPU, torch.float32, 4, 2, 16, 8, 0.25)
    return dataclasses.replace(shape, **changes)


def make_step(rows, shape, seed=0):
    """A pool of two layers with random pages, a batch of (before, new) rows over them, and its q, k, v."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    contexts = [before + new for before, new in rows]
    widths = [-(-context // shape.block_size) for context in contexts]
    total = sum(widths)
    pool = PagePool(2 * total + 2, shape.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype, "cpu")
    pool.data.fill_(torch.nan)  # a page that nobody took must never be read
    pool.hold((3, 5))
    pool.ensure(rng.permutation(total) + 1)
    blocks = iter((rng.permutation(total) + 1).tolist())
    tables = np.zeros((len(rows), max(widths)), np.int32)
    for row, width in enumerate(widths):
        tables[row, :width] = [next(blocks) for _ in range(width)]
        for layer in (3, 5):
            for block in tables[row, :width]:
                pool.write_page(layer, int(block), torch.randn(pool.data.shape[1:]))
    batch = StepBatch(
        positions=torch.cat([torch.arange(before, before + new) for before, new in rows]),
        query_starts=np.cumsum([0] + [new for _, new in rows]).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        block_tables=tables,
    )
    tokens = sum(new for _, new in rows)
    q = torch.randn(tokens, shape.num_heads, shape.head_dim)
    k, v = (torch.randn(tokens, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    return batch, pool, q, k, v


def both(rows, shape, backend=None, seed=0):
    """What the kernels say, and what `backend` (or the chosen one) says, in layer 5 after layer 3."""
    results = []
    for device in (False, True):
        batch, pool, q, k, v = make_step(rows, shape, seed)
        if device:
            attach(batch, pool, (3, 5), CPU)
        for layer in (3, 5):
            kv = LayerKV(layer, pool.data, pool.page_of(layer))
            args = dict(scale=shape.scale, sliding_window=shape.sliding_window, softcap=shape.softcap)
            if device and backend is not None:
                batch.paged.write(k, v, kv)
                out = backend(q, pool.data, batch.paged.pages(layer), batch.paged, shape)
            elif device:
                out = attend_paged(q, k, v, batch.paged, kv, **args)
            else:
                out = attend(q, k, v, batch, kv, **args)
        pages = torch.from_numpy(pool.pages_of((3, 5), np.unique(batch.block_tables[batch.block_tables > 0])))
        results.append((out, pool.data[pages.long()].clone()))
    return results


def assert_equal(results):
    (expected, pages), (found, found_pages) = results
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-5)
    assert torch.equal(pages, found_pages), "K and V were written elsewhere"


row = st.tuples(st.integers(0, 40), st.integers(1, 19))
window = st.sampled_from([None, 1, 7, 30])
softcap = st.sampled_from([None, 5.0])


@settings(max_examples=40, deadline=None)
@given(st.lists(row, min_size=1, max_size=5), window, softcap, st.integers(0, 99))
def test_any_step_is_attended_as_by_the_kernels(rows, window, softcap, seed):
    assert_equal(both(rows, make_shape(sliding_window=window, softcap=softcap), seed=seed))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=6), window, softcap, st.integers(0, 99))
def test_decode_rows_at_once(contexts, window, softcap, seed):
    shape = make_shape(sliding_window=window, softcap=softcap, is_decode=True)
    assert_equal(both([(context, 1) for context in contexts], shape, Gathered(), seed))


def test_decode_has_its_own_and_a_graph_takes_only_what_can_be_captured():
    assert choose(make_shape()).name == "rows"
    assert choose(make_shape(is_decode=True)).name == "gathered"
    chosen = choose(make_shape(is_decode=True, must_capture=True))
    assert chosen.captures
    with pytest.raises(RuntimeError, match="nothing on this machine"):
        choose(make_shape(must_capture=True))


def test_libraries_that_want_a_device_or_a_dtype_say_so():
    cuda = torch.device("cuda", 0)
    assert "CUDA" in Varlen("varlen", with_key_starts=False).fits(make_shape())
    assert "dtype" in Packed().fits(make_shape(device=cuda))
    assert "softcap" in Packed().fits(make_shape(device=cuda, dtype=torch.bfloat16, softcap=1.0))
    assert "head size" in Packed().fits(make_shape(device=cuda, dtype=torch.bfloat16, head_dim=260))


def test_flash_attention_is_told_no_limit_where_there_is_none(monkeypatch):
    """With one it reads keys and values for each query head anew."""
    told = []

    def attend(q, k, v, starts, key_starts, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table):
        told.append(window_size)
        return q

    monkeypatch.setattr(device_attention, "_varlen", lambda: (attend, frozenset(("enable_gqa",))))
    for is_decode, window in ((True, None), (True, 7), (False, None), (False, 7)):
        shape = make_shape(is_decode=is_decode, sliding_window=window)
        batch, pool, q, _, _ = make_step([(9, 1)], shape)
        attach(batch, pool, (3, 5), CPU)
        Varlen("varlen", with_key_starts=False)(q, pool.data, batch.paged.pages(3), batch.paged, shape)
    assert told == [(-1, -1), (6, 0), (-1, 0), (6, 0)]


class Broken:
    """Right in most places: one position too many is seen."""

    name, captures, reads_all = "broken", True, False

    def __init__(self, fault):
        self._fault = fault

    def fits(self, shape):
        return ""

    def __call__(self, q, data, pages, step, shape, /):
        if self._fault == "raises":
            raise OSError("no such kernel\nwith a long story")
        out = Rows()(q, data, pages, step, shape)
        if self._fault == "off":
            out[-1, -1] *= 1.01
        if self._fault == "nan":
            out[0, 0, 0] = torch.nan
        return out


@pytest.mark.parametrize(("fault", "said"), [("raises", "no such kernel"), ("off", "off by"), ("nan", "off by inf")])
def test_what_is_wrong_is_found_before_a_request_is(fault, said, monkeypatch):
    shape = make_shape(scale=0.5)
    assert check(Broken("none"), shape) == ""
    assert said in check(Broken(fault), shape)
    assert "long story" not in check(Broken(fault), shape)
    monkeypatch.setattr(device_attention, "candidates", lambda: (Broken(fault), Rows()))
    find.cache_clear()
    assert choose(shape).name == "rows"
    find.cache_clear()
