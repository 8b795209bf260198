"""Attention of decode rows over pages, in Triton: pages of any size, windows, softcaps. Imported only where Triton is.

One program takes the query heads of one group of one row, and a part of the row's context, a *split*, so that few
rows with much context still keep the whole device busy. A second kernel adds the splits up. How many there are is a constant
of the compiled kernel: a captured step chooses it by its bucket, all others share one.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl

PROGRAMS = 256
"""About so many should run at once."""
SPLIT_CONTEXT = 256
"""A split is not made shorter than this."""
EAGER_SPLITS = 8
_BLOCK_BYTES = 32 << 10
"""Keys that a program holds at a time. On an H200, 128 keys of 128 numbers in bfloat16 were faster than 64 (at 1,500 positions by a sixth); in
float32 as many would not fit into what a block may share."""


def attend_decode(
    q: torch.Tensor,
    data: torch.Tensor,
    pages: torch.Tensor,
    context_lens: torch.Tensor,
    splits: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """q ``[R, num_heads, head_dim]`` over the pool ``[P, 2, block_size, num_kv_heads, head_dim]``; the same shape.

    `pages` is int32 ``[R, B]``, `context_lens` int32 ``[R]``; `splits` a power of two.
    """
    rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = data.shape[2:4]
    if q.stride(2) != 1:
        q = q.contiguous()
    out = torch.empty(rows, num_heads, head_dim, dtype=q.dtype, device=q.device)
    sums = stats = out
    if splits > 1:
        sums = torch.empty(rows, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(rows, num_heads, splits, 2, dtype=torch.float32, device=q.device)
    group = num_heads // num_kv_heads
    block_d = triton.next_power_of_2(max(16, head_dim))
    _split[rows, num_kv_heads, splits](
        q,
        data,
        pages,
        context_lens,
        sums,
        stats,
        out,
        q.stride(0),
        q.stride(1),
        pages.stride(0),
        scale,
        softcap or 1.0,
        window or 0,
        softcap is not None,
        group,
        num_kv_heads,
        head_dim,
        block_size,
        splits,
        triton.next_power_of_2(max(16, group)),
        block_d,
        min(128, max(16, _BLOCK_BYTES // (block_d * q.element_size()))),
    )
    if splits > 1:
        _merge[rows, num_heads](sums, stats, out, num_heads, head_dim, splits, block_d)
    return out


def num_splits(num_programs: int, max_context: int) -> int:
    """A power of two: as many as fill the device, but none shorter than `SPLIT_CONTEXT`."""
    wanted = min(PROGRAMS // max(1, num_programs), max_context // SPLIT_CONTEXT, 32)
    return 1 << max(0, wanted.bit_length() - 1)


# What differs from step to step must not make another variant, which would be compiled in a request.
@triton.jit(do_not_specialize=["pages_stride"], do_not_specialize_on_alignment=["pages", "context_lens"])
def _split(
    q,
    data,
    pages,
    context_lens,
    sums,
    stats,
    out,
    q_row_stride,
    q_head_stride,
    pages_stride,
    scale,
    softcap,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_lens + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    length = tl.cdiv(tl.cdiv(context - first, SPLITS), BLOCK_N) * BLOCK_N
    begin = first + split * length
    end = tl.minimum(begin + length, context)

    member, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    is_member, is_column = member < GROUP, column < HEAD_DIM
    head = kv_head * GROUP + member
    at = row * q_row_stride + head[:, None] * q_head_stride + column[None, :]
    query = tl.load(q + at, mask=is_member[:, None] & is_column[None, :], other=0.0)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < end
        page = tl.load(pages + row * pages_stride + position // PAGE, mask=inside, other=0).to(tl.int64)
        place = (page * 2 * PAGE + position % PAGE) * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        key = tl.load(data + place[None, :] + column[:, None], mask=inside[None, :] & is_column[:, None], other=0.0)
        score = tl.dot(query, key, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        score = tl.where(inside[None, :], score, float("-inf"))
        highest = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp(score - highest[:, None])
        keep = tl.exp(largest - highest)
        total = total * keep + tl.sum(weight, 1)
        there = data + place[:, None] + PAGE * KV_HEADS * HEAD_DIM + column[None, :]
        value = tl.load(there, mask=inside[:, None] & is_column[None, :], other=0.0)
        acc = acc * keep[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        largest = highest

    to = (row * (KV_HEADS * GROUP) + head) * SPLITS + split
    if SPLITS == 1:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + to[:, None] * HEAD_DIM + column[None, :], result, mask=is_member[:, None] & is_column[None, :])
    else:
        tl.store(sums + to[:, None] * HEAD_DIM + column[None, :], acc, mask=is_member[:, None] & is_column[None, :])
        tl.store(stats + to * 2, largest, mask=is_member)
        tl.store(stats + to * 2 + 1, total, mask=is_member)


@triton.jit
def _merge(sums, stats, out, num_heads, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    is_column = column < HEAD_DIM
    largest = tl.load(stats + (at * SPLITS + split) * 2)
    total = tl.load(stats + (at * SPLITS + split) * 2 + 1)
    weight = tl.exp(largest - tl.max(largest, 0))
    part = tl.load(
        sums + (at * SPLITS + split)[:, None] * HEAD_DIM + column[None, :], mask=is_column[None, :], other=0.0
    )
    result = tl.sum(part * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + at * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=is_column)
