"""Attention of any rows over pages, in Triton: prompts in chunks, decode rows among them, windows, softcaps, any dtype. Imported only where Triton is.

One program takes up to `QUERIES` tokens of one row, all query heads of one group, and goes through the row's context by tiles. Which tokens those
are it reads from the device (`runtime.cuda.step.query_blocks`), so one captured launch does for every step of a bucket. It is not what is
fastest for long contexts (a tile is neither shared nor asked for early), which is why it comes after FlashAttention where both would do.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

from runtime.cuda.spans import QUERIES

_TILE_BYTES = 16 << 10
"""Keys that a program holds at a time, if its queries are no more than twice that: so that float32 fits, too, into what a block may share."""
_WIDE = 128
"""Query heads times tokens in a program from which on it has eight warps."""


def attend_rows(
    q: torch.Tensor,
    data: torch.Tensor,
    pages: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """q ``[T, num_heads, head_dim]`` over the pool ``[P, 2, block_size, num_kv_heads, head_dim]``; the same shape.

    `pages` is int32 ``[R, B]``, `query_starts` int32 ``[R + 1]``, `context_lens` int32 ``[R]``, `blocks` int32 ``[2, N]``: the row
    of each block of queries, or -1, and its first token. What no block names is left as the memory was.
    """
    tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = data.shape[2:4]
    if q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty(tokens, num_heads, head_dim, dtype=q.dtype, device=q.device)
    group = num_heads // num_kv_heads
    block_g, block_d = triton.next_power_of_2(group), triton.next_power_of_2(max(16, head_dim))
    head_bytes = block_d * q.element_size()
    block_n = min(64, max(16, _TILE_BYTES // head_bytes))
    if QUERIES * block_g * head_bytes > 2 * _TILE_BYTES:
        block_n = max(16, block_n // 2)
    _attend[blocks.shape[1], num_kv_heads](
        q,
        data,
        pages,
        query_starts,
        context_lens,
        blocks,
        out,
        q.stride(0),
        q.stride(1),
        pages.stride(0),
        blocks.shape[1],
        scale,
        softcap or 1.0,
        window or 0,
        softcap is not None,
        group,
        num_kv_heads,
        head_dim,
        block_size,
        QUERIES,
        block_g,
        block_d,
        block_n,
        num_warps=8 if QUERIES * block_g >= _WIDE else 4,
        num_stages=2,
    )
    return out


# What differs from step to step must not make another variant, which would be compiled in a request.
@triton.jit(
    do_not_specialize=["pages_stride", "num_blocks"],
    do_not_specialize_on_alignment=["pages", "query_starts", "context_lens", "blocks"],
)
def _attend(
    q,
    data,
    pages,
    query_starts,
    context_lens,
    blocks,
    out,
    q_row_stride,
    q_head_stride,
    pages_stride,
    num_blocks,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(blocks + block).to(tl.int64)
    if row >= 0:
        first = tl.load(blocks + num_blocks + block)
        stop = tl.load(query_starts + row + 1)
        context = tl.load(context_lens + row)
        lane, column = tl.arange(0, BLOCK_Q * BLOCK_G), tl.arange(0, BLOCK_D)
        token, member = first + lane // BLOCK_G, lane % BLOCK_G
        position = context - stop + token
        is_query, is_column = (token < stop) & (member < GROUP), column < HEAD_DIM
        head = kv_head * GROUP + member
        at = token.to(tl.int64)[:, None] * q_row_stride + head[:, None] * q_head_stride + column[None, :]
        query = tl.load(q + at, mask=is_query[:, None] & is_column[None, :], other=0.0)
        end = context - stop + tl.minimum(first + BLOCK_Q, stop)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(context - stop + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        largest = tl.full((BLOCK_Q * BLOCK_G,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_Q * BLOCK_G,), tl.float32)
        acc = tl.zeros((BLOCK_Q * BLOCK_G, BLOCK_D), tl.float32)
        for start in range(begin, end, BLOCK_N):
            key_at = start + tl.arange(0, BLOCK_N)
            inside = key_at < end
            page = tl.load(pages + row * pages_stride + key_at // PAGE, mask=inside, other=0).to(tl.int64)
            place = (page * 2 * PAGE + key_at % PAGE) * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
            key = tl.load(data + place[None, :] + column[:, None], mask=inside[None, :] & is_column[:, None], other=0.0)
            score = tl.dot(query, key, input_precision="ieee") * scale
            if HAS_SOFTCAP:
                score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
            seen = key_at[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
            highest = tl.maximum(largest, tl.max(score, 1))
            base = tl.where(highest == float("-inf"), 0.0, highest)  # of a token that sees nothing yet
            weight = tl.exp(score - base[:, None])
            keep = tl.exp(largest - base)
            total = total * keep + tl.sum(weight, 1)
            there = data + place[:, None] + PAGE * KV_HEADS * HEAD_DIM + column[None, :]
            value = tl.load(there, mask=inside[:, None] & is_column[None, :], other=0.0)
            acc = acc * keep[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            largest = highest
        to = (token.to(tl.int64)[:, None] * (KV_HEADS * GROUP) + head[:, None]) * HEAD_DIM + column[None, :]
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + to, result, mask=is_query[:, None] & is_column[None, :])
