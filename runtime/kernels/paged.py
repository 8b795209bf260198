"""Causal grouped-query attention over KV pages, for ragged batches of decode rows and prefill chunks.

How it works: a query behind its prompt (decode) walks the row's pages twice: once for the scores of all its heads, and,
after the softmax, once for the weighted sum of the values; all the while the cache is asked for what comes some pages later, be
it the row's values or the keys of the next row. Queries inside the prompt (prefill) pack the keys and values of
their context, one KV head after the other, into the panels of `products`, and work through blocks of queries against blocks
of keys with the same tiles as the weights use, with a running maximum and sum. Blocks of keys lie at fixed positions. The members of a
team (`team`) divide the heads of decoding rows and the blocks of queries.

The two kernels round differently, so which one a query takes follows from its position alone. A token that is computed
again after a preemption or a crash takes the one that it took before.

What is never true: a result never depends on the other rows, nor on where chunks begin or end, nor on the team; no key after a query, and
none out of its window, has a weight.
"""

import math

import numpy as np

from runtime.kernels.amx import DEPTH, ROWS
from runtime.kernels.lanes import HAS_AMX, LANES, LOWEST, PANEL, address, depth_step, kernel, part
from runtime.kernels.softmax import (
    find_top,
    mix_1,
    mix_2,
    mix_3,
    mix_4,
    pack_keys,
    pack_values,
    scale_floats,
    score_keys,
    shrink,
    weigh,
)
from runtime.kernels.spans import copy_bytes, store_scaled
from runtime.kernels.team import on_team
from runtime.kernels.tiles import tile_rows

AHEAD = 64
"""Positions by which decode asks the cache for keys and values before it needs them."""
QUERY_BLOCK = 4 * ROWS if HAS_AMX else 48
"""Query rows (token and head) worked on together in prefill: whole tiles."""
KEY_BLOCK = 256
"""Keys worked on together in prefill; a multiple of every `PANEL`."""

_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(LOWEST)


def scratch_sizes(query_starts, context_lens, prompt_lens, num_heads: int, num_kv_heads: int, head_dim: int):
    """How many elements of (float32, storage type, int64) scratch `paged_attention` may touch for this batch."""
    longest = _up(int(context_lens.max(initial=1)), KEY_BLOCK)
    decode = num_heads * (longest + 2 * LANES + _up(head_dim, LANES) + 1)
    if (context_lens - np.diff(query_starts) >= prompt_lens).all():
        return decode, 1, 1
    padded = _up(head_dim, PANEL)
    floats = QUERY_BLOCK * (KEY_BLOCK + padded + 2)
    packed = longest * (head_dim + padded) + QUERY_BLOCK * (head_dim + KEY_BLOCK)
    return max(decode, floats), packed, longest


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@kernel
def write_pages(k, v, page_of_block, block_tables, query_starts, context_lens, data):
    """Put k and v ``[T, num_kv_heads, head_dim]`` into their pages; False when a block has no page (nothing is safe)."""
    block_size, line = data.shape[2], data.shape[3] * data.shape[4] * data.itemsize
    for r in range(len(context_lens)):
        stop = query_starts[r + 1]
        for t in range(query_starts[r], stop):
            position = context_lens[r] - stop + t
            page = page_of_block[block_tables[r, position // block_size]]
            if page < 0:
                return False
            target = address(data) + (page * 2 * block_size + position % block_size) * line
            copy_bytes(target, address(k) + t * line, line)
            copy_bytes(target + block_size * line, address(v) + t * line, line)
    return True


@kernel
def paged_attention(
    team, tiles, q, data, page_of_block, block_tables, query_starts, context_lens, prompt_lens, scale, window, softcap, out, floats,
    packed, places,
):  # fmt: skip
    """Attention of all rows. `q` and `out` are ``[T, num_heads, head_dim]``; `window` and `softcap` are 0 for none.

    `floats`, `packed` and `places` are scratch: a row of `scratch_sizes` for each member of `team` (`team.current()`), or for some, who
    do the work then.
    """
    operands = (
        tiles, q, data, page_of_block, block_tables, query_starts, context_lens, prompt_lens, scale, window, softcap, out, floats,
        packed, places,
    )  # fmt: skip
    on_team(team, attention_share, operands)


@kernel
def attention_share(
    me, tiles, q, data, page_of_block, block_tables, query_starts, context_lens, prompt_lens, scale, window, softcap, out, floats,
    packed, places,
):  # fmt: skip
    """A member's share of `paged_attention`.

    Decoding rows are divided by KV heads and chunks of prompts by blocks of queries of a head: in one long line of them, each
    as long as it takes, a member's are those whose middle lies in its part of the line.
    """
    num_kv_heads, block_size = data.shape[3], data.shape[2]
    group, line = q.shape[1] // num_kv_heads, q.shape[1] * q.shape[2] * q.itemsize
    member, size = me[1], min(me[2], len(packed))
    if member >= size:
        return
    whole = 0
    if size > 1:
        for r in range(len(context_lens)):
            first, stop = query_starts[r], query_starts[r + 1]
            position = context_lens[r] - (stop - first)
            num_prefill = min(max(prompt_lens[r] - position, 0), stop - first)
            for begin in range(0, num_prefill * group, QUERY_BLOCK):
                whole += num_kv_heads * _cost_of_block(begin, num_prefill, position, group, window)
            for t in range(first + num_prefill, stop):
                whole += num_kv_heads * _cost_of_query(position + t - first, window)
    low, high = (2 * whole * member // size, 2 * whole * (member + 1) // size) if size > 1 else (-1, 1 << 62)
    done = 0
    for r in range(len(context_lens)):
        first, stop = query_starts[r], query_starts[r + 1]
        position = context_lens[r] - (stop - first)
        num_prefill = min(max(prompt_lens[r] - position, 0), stop - first)
        if num_prefill > 0:
            query, target = address(q) + first * line, address(out) + first * line
            done = _attend_chunk(
                tiles, query, num_prefill, data, page_of_block, block_tables, r, position, group, scale, window, softcap,
                target, floats[member], packed[member], places[member], done, low, high,
            )  # fmt: skip
        for t in range(first + num_prefill, stop):
            cost = _cost_of_query(position + t - first, window)
            head, end = num_kv_heads, num_kv_heads
            for h in range(num_kv_heads - 1, -1, -1):
                middle = 2 * (done + h * cost) + cost
                head = h if middle >= low else head
                end = h if middle >= high else end
            done += num_kv_heads * cost
            if head >= end:
                continue
            query, target = address(q) + t * line, address(out) + t * line
            following = r if t + 1 < stop else min(r + 1, len(context_lens) - 1)
            lowest = max(0, context_lens[following] - window) // block_size if window > 0 else 0
            _attend_one(
                query, data, page_of_block, block_tables, r, position + t - first, group, scale, window, softcap, target,
                floats[member], following, lowest, (context_lens[following] - 1) // block_size, head, end,
            )  # fmt: skip


@part
def _cost_of_query(position, window):
    """How long a KV head of a decoding query takes, in something like nanoseconds; what is the same for all is left out."""
    seen = position + 1 if window == 0 else min(position + 1, window)
    return 20 * (seen + AHEAD)


@part
def _cost_of_block(first, num_tokens, position, group, window):
    """How long the block of queries from query row `first` on takes, in the same measure."""
    num_rows = min(QUERY_BLOCK, num_tokens * group - first)
    seen = position + (first + num_rows - 1) // group + 1
    if window > 0:
        seen = min(seen, window + num_rows // group)
    return 3 * num_rows * (seen + AHEAD)


# -- one query ----------------------------------------------------------------------------------------------


@part
def _attend_one(
    query, data, page_of_block, block_tables, r, position, group, scale, window, softcap, target, floats, following,
    lowest, highest, first_head, last_head,
):  # fmt: skip
    """KV heads ``first_head .. last_head - 1`` of the query of row `r` at `position`; `query` and `target` are addresses. `lowest` and `highest`
    are the blocks of the row `following` that are read next."""
    block_size, head_dim, size = data.shape[2], data.shape[4], data.itemsize
    head, line = head_dim * size, data.shape[3] * head_dim * size
    num_kv_heads = last_head - first_head
    num_heads, shift = num_kv_heads * group, first_head * head
    query, target = query + group * shift, target + group * shift
    stop = position + 1
    start = max(0, stop - window) if window > 0 else 0
    shape, pace = (num_kv_heads, group, head_dim), head // group
    begin, end = start // block_size, (stop + block_size - 1) // block_size
    ahead_blocks = min(max(1, AHEAD // block_size), end - begin)
    scores_stride = (stop - start + 2 * LANES - 1) // LANES * LANES
    sums_stride = (head_dim + LANES - 1) // LANES * LANES
    scores = address(floats)
    sums = scores + num_heads * scores_stride * 4
    for block in range(begin, end):
        first, last = max(start, block * block_size), min(stop, (block + 1) * block_size)
        page = address(data) + page_of_block[block_tables[r, block]] * 2 * block_size * line
        later = block + ahead_blocks
        if later < end:
            ahead = page_of_block[block_tables[r, later]] * 2
        else:
            ahead = page_of_block[block_tables[r, min(begin + later - end, end - 1)]] * 2 + 1
        ahead = address(data) + ahead * block_size * line + shift
        for j in range(first, last, LANES):
            keys = page + (j - block * block_size) * line + shift
            place = scores + (j - start) * 4
            score_keys(data, query, keys, line, last - j, shape, place, scores_stride * 4, ahead, pace)
            ahead += LANES * line
    totals = num_heads * (scores_stride + sums_stride)
    for h in range(num_heads):
        place = scores + h * scores_stride * 4
        factor = scale
        if softcap > _ZERO:
            _cap(floats, h * scores_stride, stop - start, scale, softcap)
            factor = _ONE
        top = find_top(place, 0, stop - start)
        floats[totals + h] = weigh(floats, place, 0, stop - start, stop - start, factor, top, place)
    for i in range(num_heads * sums_stride):
        floats[num_heads * scores_stride + i] = _ZERO
    for block in range(begin, end):
        first, last = max(start, block * block_size), min(stop, (block + 1) * block_size)
        page = address(data) + (page_of_block[block_tables[r, block]] * 2 + 1) * block_size * line
        values = page + (first - block * block_size) * line + shift
        later = block + ahead_blocks
        if later < end:
            ahead = page_of_block[block_tables[r, later]] * 2 + 1
        else:
            ahead = page_of_block[block_tables[following, min(lowest + later - end, highest)]] * 2
        ahead = address(data) + ahead * block_size * line + shift
        for h in range(num_kv_heads):
            weights = scores + (h * group * scores_stride + first - start) * 4
            _mix_group(
                data, group, weights, scores_stride * 4, values + h * head, line, last - first, head_dim,
                sums + h * group * sums_stride * 4, sums_stride * 4, ahead + h * head, head // 2,
            )  # fmt: skip
    for h in range(num_heads):
        store_scaled(data, sums + h * sums_stride * 4, head_dim, _ONE / floats[totals + h], target + h * head)


@part
def _mix_group(like, group, weights, weights_stride, values, stride, count, head_dim, sums, sums_stride, ahead, pace):
    """`mix` for a group of any size."""
    g = 0
    while g < group:
        w, s = weights + g * weights_stride, sums + g * sums_stride
        if group - g >= 4:
            mix_4(like, w, weights_stride, values, stride, count, head_dim, s, sums_stride, ahead, pace)
        elif group - g == 3:
            mix_3(like, w, weights_stride, values, stride, count, head_dim, s, sums_stride, ahead, pace)
        elif group - g == 2:
            mix_2(like, w, weights_stride, values, stride, count, head_dim, s, sums_stride, ahead, pace)
        else:
            mix_1(like, w, weights_stride, values, stride, count, head_dim, s, sums_stride, ahead, pace)
        g += 4


@part
def _cap(floats, first, count, scale, softcap):
    """Scale scores, then soften them towards +-softcap."""
    for j in range(first, first + count):
        floats[j] = softcap * np.float32(math.tanh(floats[j] * scale / softcap))


# -- many queries -------------------------------------------------------------------------------------------


@part
def _attend_chunk(
    tiles, query, num_tokens, data, page_of_block, block_tables, r, position, group, scale, window, softcap, target, floats,
    packed, places, done, low, high,
):  # fmt: skip
    """The `num_tokens` queries of row `r` from `position` on; `query` and `target` are addresses. Of its blocks, which begin at `done` in the
    line of all work, those whose middle lies in [low / 2, high / 2); where they end."""
    num_kv_heads, head_dim, size = data.shape[3], data.shape[4], data.itemsize
    head, padded = head_dim * size, (head_dim + PANEL - 1) // PANEL * PANEL
    stop = position + num_tokens
    start = max(0, position + 1 - window) if window > 0 else 0
    start -= start % KEY_BLOCK
    capacity = (stop - start + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK
    keys = address(packed)
    values = keys + capacity * head
    queries = values + capacity * padded * size
    weights = queries + QUERY_BLOCK * head
    is_found = False
    for h in range(num_kv_heads):
        is_packed = False
        for first in range(0, num_tokens * group, QUERY_BLOCK):
            cost = _cost_of_block(first, num_tokens, position, group, window)
            middle = 2 * done + cost
            done += cost
            if middle < low or middle >= high:
                continue
            if not is_found:
                _find_keys(data, page_of_block, block_tables, r, start, stop, places)
                is_found = True
            if not is_packed:
                _pack_context(data, places, h * head, stop - start, capacity, keys, values)
                is_packed = True
            num_rows = min(QUERY_BLOCK, num_tokens * group - first)
            for i in range(num_rows):
                index = (first + i) // group * num_kv_heads * group + h * group + (first + i) % group
                copy_bytes(queries + i * head, query + index * head, head)
            _attend_block(
                tiles, data, num_rows, first, position, group, start, capacity, keys, values, queries, weights, scale, window,
                softcap, floats,
            )  # fmt: skip
            sums, totals = address(floats) + QUERY_BLOCK * KEY_BLOCK * 4, QUERY_BLOCK * (KEY_BLOCK + padded + 1)
            for i in range(num_rows):
                index = (first + i) // group * num_kv_heads * group + h * group + (first + i) % group
                factor = _ONE / floats[totals + i]
                store_scaled(data, sums + i * padded * 4, head_dim, factor, target + index * head)
    return done


@part
def _attend_block(
    tiles,
    like,
    num_rows,
    first,
    position,
    group,
    start,
    capacity,
    keys,
    values,
    queries,
    weights,
    scale,
    window,
    softcap,
    floats,
):
    """One block of queries against all the keys it sees: leaves sums and totals, unnormalised, in `floats`."""
    head_dim, size = like.shape[4], like.itemsize
    padded = (head_dim + PANEL - 1) // PANEL * PANEL
    scores = address(floats)
    sums = scores + QUERY_BLOCK * KEY_BLOCK * 4
    tops = QUERY_BLOCK * (KEY_BLOCK + padded)
    totals = tops + QUERY_BLOCK
    for i in range(QUERY_BLOCK * KEY_BLOCK, tops):
        floats[i] = _ZERO
    for i in range(num_rows):
        floats[tops + i] = _LOWEST
        floats[totals + i] = _ZERO
    last = position + (first + num_rows - 1) // group
    lowest = max(start, position + first // group + 1 - window) if window > 0 else start
    for block in range((lowest - start) // KEY_BLOCK, (last - start) // KEY_BLOCK + 1):
        origin = start + block * KEY_BLOCK
        depth = min(KEY_BLOCK, last + 1 - origin)
        depth += -depth % _value_step(like)
        for panel in range((depth + PANEL - 1) // PANEL):
            w = keys + (block * KEY_BLOCK + panel * PANEL) * head_dim * size
            place = scores + panel * PANEL * 4
            tile_rows(tiles, num_rows, queries, head_dim * size, w, head_dim, place, KEY_BLOCK * 4, False)
        for i in range(num_rows):
            at = position + (first + i) // group - origin
            low, high = max(0, at + 1 - window) if window > 0 else 0, max(0, min(KEY_BLOCK, at + 1))
            row, factor = scores + i * KEY_BLOCK * 4, scale
            if softcap > _ZERO:
                _cap(floats, i * KEY_BLOCK, depth, scale, softcap)
                factor = _ONE
            before = floats[tops + i]
            top = max(before, find_top(row, low, high))
            total = weigh(like, row, low, high, depth, factor, top, weights + i * KEY_BLOCK * size)
            if top > before:
                faded = shrink((before - top) * factor) if before > _LOWEST else _ZERO
                floats[tops + i] = top
                floats[totals + i] *= faded
                scale_floats(sums + i * padded * 4, padded, faded)
            floats[totals + i] += total
        for panel in range(padded // PANEL):
            w = values + (panel * capacity + block * KEY_BLOCK) * PANEL * size
            place = sums + panel * PANEL * 4
            tile_rows(tiles, num_rows, weights, KEY_BLOCK * size, w, depth, place, padded * 4, True)


@part
def _value_step(like):
    """Of how many values a weighted sum is made at a time. A part of that many would be summed in another order."""
    return DEPTH if HAS_AMX and depth_step(like) == 2 else depth_step(like)


@part
def _find_keys(data, page_of_block, block_tables, r, start, stop, places):
    """places[j] = the address of key start + j; the last one again up to a multiple of `PANEL`."""
    block_size = data.shape[2]
    line = data.shape[3] * data.shape[4] * data.itemsize
    for j in range((stop - start + PANEL - 1) // PANEL * PANEL):
        position = min(start + j, stop - 1)
        page = page_of_block[block_tables[r, position // block_size]]
        places[j] = address(data) + (page * 2 * block_size + position % block_size) * line


@part
def _pack_context(data, places, shift, count, capacity, keys, values):
    """The keys of one head as panels of a matrix ``[head_dim, keys]``, its values as one of ``[keys, head_dim]``."""
    block_size, num_kv_heads, head_dim, size = data.shape[2], data.shape[3], data.shape[4], data.itemsize
    step = depth_step(data)
    for j in range(0, count, LANES):
        target = keys + (j // PANEL * PANEL * head_dim + j % PANEL * step) * size
        pack_keys(data, address(places) + j * 8, shift, head_dim, target)
    shift += block_size * num_kv_heads * head_dim * size
    for j in range(0, count + -count % _value_step(data), step):
        for d in range(0, head_dim, PANEL):
            first, second = places[j] + shift + d * size, places[j + step - 1] + shift + d * size
            target = values + (d * capacity + j * PANEL) * size
            pack_values(data, first, second, j + 1 < count, min(PANEL, head_dim - d), target)
