"""Paged attention: write this step's K and V into the pages, then attend over them.

How it works: `attend` is what a decoder layer calls, whoever wrote the layer. On the CPU it hands over to the kernels
in `runtime.kernels.paged`, for a step that is there as tensors (`StepBatch.paged`) to a library of the device's
(`runtime.cuda.attention`); everywhere else it gathers the pages of each row and calls torch's
`scaled_dot_product_attention`. The last is plain torch on any device and any dtype, and the tests' second opinion.

Positions of a row are consecutive and end at its context length; position p lives in block ``p // block_size`` of the
row's block table, at offset ``p % block_size`` of that block's page. What is never true: attention never reads a
position that this step or an earlier one has not written.
"""

from time import perf_counter_ns

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from runtime.batch import LayerKV, StepBatch
from runtime.kernels import has_kernels, storage, team
from runtime.kernels.clock import ATTENTION
from runtime.kernels.paged import paged_attention, scratch_sizes, write_pages
from runtime.kernels.tiles import tile_address

SCRATCH_BYTES = 256 << 20
"""What all members of a team may have for attention: half of what a worker keeps free (`runtime.messages.MIN_FREE_BYTES`). A chunk of a prompt behind
131,072 tokens takes 81 MiB of it for each member with the heads of Llama-3.1-8B."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: StepBatch,
    kv: LayerKV,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal grouped-query attention of a ragged batch over its pages.

    Args:
        q: ``[T, num_heads, head_dim]``, rotated.
        k: ``[T, num_kv_heads, head_dim]``, rotated; written to the pages first.
        v: as `k`.
        sliding_window: a query at position p sees positions ``p - sliding_window < j <= p``; None sees all ``j <= p``.
        softcap: scores become ``softcap * tanh(score / softcap)`` after scaling.

    Returns:
        ``[T, num_heads, head_dim]`` in q's dtype.
    """
    begun_ns = perf_counter_ns() if len(batch.spent) else 0
    if batch.paged is not None:
        from runtime.cuda.attention import attend_paged

        attended = attend_paged(q, k, v, batch.paged, kv, scale=scale, sliding_window=sliding_window, softcap=softcap)
    elif has_kernels(q.device, q.dtype) and q.shape[2] % 2 == 0:
        attended = _attend_kernels(q, k, v, batch, kv, scale, sliding_window, softcap)
    else:
        attended = attend_torch(q, k, v, batch, kv, scale=scale, sliding_window=sliding_window, softcap=softcap)
    if begun_ns:
        batch.spent[ATTENTION] += perf_counter_ns() - begun_ns
    return attended


def warm_up(device: torch.device | str, dtype: torch.dtype) -> None:
    """Compile what `attend` needs for this dtype, or load it from the disk cache; call it while loading."""
    batch, kv = tiny_step(device, dtype, num_kv_heads=1, head_dim=4)
    q = torch.zeros(batch.num_tokens, 2, 4, dtype=dtype, device=device)
    attend(q, q[:, :1], q[:, :1], batch, kv, scale=1.0, sliding_window=2)


def tiny_step(
    device: torch.device | str, dtype: torch.dtype, num_kv_heads: int, head_dim: int
) -> tuple[StepBatch, LayerKV]:
    """A step of one decode row and one prefill row over a pool of its own, to warm up with."""
    batch = StepBatch(
        positions=torch.arange(-1, 16, device=device).clamp(min=0),
        query_starts=np.array([0, 1, 17], np.int32),
        context_lens=np.array([1, 16], np.int32),
        block_tables=np.array([[0], [1]], np.int32),
    )
    data = torch.zeros(2, 2, 16, num_kv_heads, head_dim, dtype=dtype, device=device)
    return batch, LayerKV(layer=0, data=data, page_of_block=np.arange(2, dtype=np.int32))


def step_arrays(batch: StepBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(block_tables, query_starts, context_lens, prompt_lens) in the one form that the kernels are compiled for."""
    arrays = batch.memo.get("attention.arrays")
    if arrays is None:
        tables, starts, lengths, prompts = (
            np.require(array, np.int32, ["C", "W"])
            for array in (batch.block_tables, batch.query_starts, batch.context_lens, batch.prompt_lens)
        )
        arrays = batch.memo["attention.arrays"] = (tables, starts, lengths, prompts)
    return arrays


def attention_scratch(batch: StepBatch, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
    """The kernels' scratch for this step, as storage arrays (floats, packed, places), a row for each member of the team, as far as
    there is room for them; made once per step and shape."""
    key = ("attention.scratch", num_heads, num_kv_heads, head_dim, dtype)
    scratch = batch.memo.get(key)
    if scratch is None:
        num_floats, num_packed, num_places = scratch_sizes(*step_arrays(batch)[1:], num_heads, num_kv_heads, head_dim)
        own_bytes = 4 * num_floats + dtype.itemsize * num_packed + 8 * num_places
        members = max(1, min(team.num_threads(), SCRATCH_BYTES // own_bytes))
        scratch = (
            np.empty((members, num_floats), np.float32),
            storage(torch.empty((members, num_packed), dtype=dtype)),
            np.empty((members, num_places), np.int64),
        )
        batch.memo[key] = scratch
    return scratch


def pool_storage(batch: StepBatch, kv: LayerKV) -> np.ndarray:
    """The page pool as a storage array; the view is made once per step."""
    key = ("attention.pool", kv.data.data_ptr())
    pool = batch.memo.get(key)
    if pool is None:
        pool = batch.memo[key] = storage(kv.data)
    return pool


def _attend_kernels(q, k, v, batch, kv, scale, sliding_window, softcap):
    num_kv_heads = k.shape[1]
    _, num_heads, head_dim = q.shape
    pool, rows = pool_storage(batch, kv), step_arrays(batch)
    ok = write_pages(
        storage(k.contiguous()),
        storage(v.contiguous()),
        kv.page_of_block,
        *rows[:3],
        pool,
    )
    assert ok, f"layer {kv.layer} has no page for a block of this step"
    scratch = attention_scratch(batch, num_heads, num_kv_heads, head_dim, q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype)
    paged_attention(
        team.current(),
        tile_address(pool.dtype),
        storage(q.contiguous()),
        pool,
        kv.page_of_block,
        *rows,
        np.float32(scale),
        sliding_window or 0,
        np.float32(softcap or 0.0),
        storage(out),
        *scratch,
    )
    return out


# -- plain torch --------------------------------------------------------------------------------------------


def attend_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: StepBatch,
    kv: LayerKV,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`attend` in plain torch operations, on any device: a gather and one attention call per row."""
    pages = _page_tables(batch, kv, q.device)
    write_pages_torch(k, v, batch, kv)
    out = torch.empty_like(q)
    for r in range(batch.num_rows):
        first, stop, context = int(batch.query_starts[r]), int(batch.query_starts[r + 1]), int(batch.context_lens[r])
        num_blocks = -(-context // kv.data.shape[2])
        gathered = kv.data[pages[r, :num_blocks]].transpose(0, 1).flatten(1, 2)[:, :context]
        keys, values = gathered.unbind(0)
        out[first:stop] = attend_row(q[first:stop], keys, values, scale, sliding_window, softcap)
    return out


def write_pages_torch(k: torch.Tensor, v: torch.Tensor, batch: StepBatch, kv: LayerKV) -> None:
    """Write k and v of every token into its page, on any device."""
    pages = _page_tables(batch, kv, k.device)
    block_size = kv.data.shape[2]
    rows = _row_of_token(batch, k.device)
    token_pages = pages[rows, batch.positions // block_size]
    offsets = batch.positions % block_size
    kv.data[token_pages, 0, offsets] = k
    kv.data[token_pages, 1, offsets] = v


def attend_row(q, keys, values, scale, sliding_window, softcap):
    """One sequence: q ``[n, heads, dim]`` are the last n of the positions in keys and values ``[context, kv_heads, dim]``."""
    num_queries, context = len(q), len(keys)
    group = q.shape[1] // keys.shape[1]
    q = q.transpose(0, 1)
    keys = keys.transpose(0, 1).repeat_interleave(group, 0)
    values = values.transpose(0, 1).repeat_interleave(group, 0)
    query_at = torch.arange(context - num_queries, context, device=q.device)[:, None]
    key_at = torch.arange(context, device=q.device)[None, :]
    visible = key_at <= query_at
    if sliding_window is not None:
        visible &= key_at > query_at - sliding_window
    if softcap is None:
        mask = None if num_queries == 1 and bool(visible.all()) else visible
        result = scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask, scale=scale)[0]
    else:
        scores = softcap * torch.tanh(q.float() @ keys.float().transpose(1, 2) * scale / softcap)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        result = (weights @ values.float()).to(q.dtype)
    return result.transpose(0, 1)


def _page_tables(batch: StepBatch, kv: LayerKV, device: torch.device) -> torch.Tensor:
    """int64 ``[R, max_blocks]``: the page of each block of each row in this layer."""
    key = ("attention.pages", kv.layer)
    pages = batch.memo.get(key)
    if pages is None:
        pages = torch.from_numpy(kv.page_of_block[batch.block_tables].astype(np.int64)).to(device)
        batch.memo[key] = pages
    return pages


def _row_of_token(batch: StepBatch, device: torch.device) -> torch.Tensor:
    rows = batch.memo.get("attention.row_of_token")
    if rows is None:
        rows = np.repeat(np.arange(batch.num_rows), np.diff(batch.query_starts))
        rows = batch.memo["attention.row_of_token"] = torch.from_numpy(rows).to(device)
    return rows
