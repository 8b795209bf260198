"""Causal grouped-query attention over KV pages, for ragged batches of decode rows and prefill chunks.

How it works: a row with few queries (decode) walks its pages once per KV head: scores of all its keys, softmax,
weighted sum of the values. A row with many queries (prefill) packs the keys and values of its context once per KV head
into the panels of `products` and works through blocks of queries against blocks of keys with the same tiles as the
weights use, with a running maximum and sum. Blocks of keys lie at fixed positions.

What is never true: a result never depends on the other rows, and within the prefill kernel not on where chunks begin;
no key after a query, and none out of its window, is read into a score.
"""

import math

import numpy as np

from runtime.kernels.lanes import PANEL, TILE_ROWS, depth_step, exp32, kernel, narrow, widen
from runtime.kernels.products import tile_rows

QUERY_BLOCK = 48
"""Query rows (token and head) worked on together in prefill."""
KEY_BLOCK = 256
"""Keys worked on together in prefill; a multiple of every `PANEL`."""
MIN_BLOCKED_QUERIES = 12
"""Query rows from which a sequence takes the prefill kernel."""

_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(-3.0e38)


@kernel
def write_pages(k, v, page_of_block, block_tables, query_starts, context_lens, data):
    """Put k and v ``[T, num_kv_heads, head_dim]`` into their pages; False when a block has no page (nothing is safe)."""
    block_size = data.shape[2]
    for r in range(len(context_lens)):
        first = query_starts[r]
        position = context_lens[r] - (query_starts[r + 1] - first)
        for t in range(first, query_starts[r + 1]):
            page = page_of_block[block_tables[r, position // block_size]]
            if page < 0:
                return False
            data[page, 0, position % block_size] = k[t]
            data[page, 1, position % block_size] = v[t]
            position += 1
    return True


@kernel
def paged_attention(
    q, data, page_of_block, block_tables, query_starts, context_lens, scale, window, softcap, out, floats, packed
):
    """Attention of all rows. `q` and `out` are ``[T, num_heads, head_dim]``; `window` and `softcap` are 0 for none.

    `floats` (float32) and `packed` (storage type) are flat scratch of `scratch_sizes`.
    """
    group = q.shape[1] // data.shape[3]
    for r in range(len(context_lens)):
        first, stop = query_starts[r], query_starts[r + 1]
        start = context_lens[r] - (stop - first)
        pages = block_tables[r]
        if (stop - first) * group < MIN_BLOCKED_QUERIES:
            for t in range(first, stop):
                _attend_one(q[t], data, page_of_block, pages, start + t - first, scale, window, softcap, out[t], floats)
        else:
            _attend_chunk(
                q[first:stop],
                data,
                page_of_block,
                pages,
                start,
                scale,
                window,
                softcap,
                out[first:stop],
                floats,
                packed,
            )


def scratch_sizes(query_starts, context_lens, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """How many elements of `floats` and `packed` scratch `paged_attention` may touch for this batch."""
    group = num_heads // num_kv_heads
    longest = -(-int(context_lens.max(initial=1)) // KEY_BLOCK) * KEY_BLOCK
    decode = group * (longest + head_dim)
    if int(np.diff(query_starts).max(initial=0)) * group < MIN_BLOCKED_QUERIES:
        return decode, 1
    padded = -(-head_dim // PANEL) * PANEL
    floats = QUERY_BLOCK * (KEY_BLOCK + padded + 2)
    packed = longest * (head_dim + padded) + QUERY_BLOCK * (head_dim + KEY_BLOCK)
    return max(decode, floats), packed


# -- one query ----------------------------------------------------------------------------------------------


@kernel
def _attend_one(q, data, page_of_block, pages, position, scale, window, softcap, out, floats):
    """All heads of the query at `position`."""
    num_heads, head_dim = q.shape
    num_kv_heads, block_size = data.shape[3], data.shape[2]
    group = num_heads // num_kv_heads
    stop = position + 1
    start = max(0, stop - window) if window > 0 else 0
    count = stop - start
    scores = floats[: group * count].reshape(group, count)
    queries = floats[group * count : group * (count + head_dim)].reshape(group, head_dim)
    for h in range(num_kv_heads):
        for g in range(group):
            for d in range(head_dim):
                queries[g, d] = widen(q[h * group + g, d]) * scale
        for j in range(start, stop):
            key = data[page_of_block[pages[j // block_size]], 0, j % block_size, h]
            for g in range(group):
                total = _ZERO
                for d in range(head_dim):
                    total += queries[g, d] * widen(key[d])
                scores[g, j - start] = total
        for g in range(group):
            _softmax(scores[g], softcap)
        queries[:] = _ZERO
        for j in range(start, stop):
            value = data[page_of_block[pages[j // block_size]], 1, j % block_size, h]
            for g in range(group):
                weight = scores[g, j - start]
                for d in range(head_dim):
                    queries[g, d] += weight * widen(value[d])
        for g in range(group):
            for d in range(head_dim):
                out[h * group + g, d] = narrow(out, queries[g, d])


@kernel
def _softmax(scores, softcap):
    if softcap > _ZERO:
        _cap(scores, softcap)
    top = _LOWEST
    for j in range(len(scores)):
        top = max(top, scores[j])
    total = _ZERO
    for j in range(len(scores)):
        weight = exp32(scores[j] - top)
        scores[j] = weight
        total += weight
    inverse = _ONE / total
    for j in range(len(scores)):
        scores[j] *= inverse


@kernel
def _cap(scores, softcap):
    for j in range(len(scores)):
        scores[j] = softcap * np.float32(math.tanh(scores[j] / softcap))


# -- many queries -------------------------------------------------------------------------------------------


@kernel
def _attend_chunk(q, data, page_of_block, pages, position, scale, window, softcap, out, floats, packed):
    """All heads of consecutive queries, the first of them at `position`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = data.shape[3]
    group = num_heads // num_kv_heads
    padded = (head_dim + PANEL - 1) // PANEL * PANEL
    stop = position + num_tokens
    start = max(0, position + 1 - window) if window > 0 else 0
    start -= start % KEY_BLOCK
    capacity = (stop - start + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK
    keys, rest = packed[: capacity * head_dim], packed[capacity * head_dim :]
    values, rest = rest[: capacity * padded], rest[capacity * padded :]
    queries, rest = rest[: QUERY_BLOCK * head_dim].reshape(QUERY_BLOCK, head_dim), rest[QUERY_BLOCK * head_dim :]
    weights = rest[: QUERY_BLOCK * KEY_BLOCK].reshape(QUERY_BLOCK, KEY_BLOCK)
    scores = floats[: QUERY_BLOCK * KEY_BLOCK].reshape(QUERY_BLOCK, KEY_BLOCK)
    rest_floats = floats[QUERY_BLOCK * KEY_BLOCK :]
    sums, rest_floats = (
        rest_floats[: QUERY_BLOCK * padded].reshape(QUERY_BLOCK, padded),
        rest_floats[QUERY_BLOCK * padded :],
    )
    tops, totals = rest_floats[:QUERY_BLOCK], rest_floats[QUERY_BLOCK : 2 * QUERY_BLOCK]
    for h in range(num_kv_heads):
        _pack_context(data, page_of_block, pages, h, start, stop, capacity, keys, values)
        for first in range(0, num_tokens * group, QUERY_BLOCK):
            num_rows = min(QUERY_BLOCK, num_tokens * group - first)
            for i in range(num_rows):
                queries[i] = q[(first + i) // group, h * group + (first + i) % group]
            tops[:] = _LOWEST
            totals[:] = _ZERO
            sums[:] = _ZERO
            last = position + (first + num_rows - 1) // group
            lowest = max(start, position + first // group + 1 - window) if window > 0 else start
            for block in range((lowest - start) // KEY_BLOCK, (last - start) // KEY_BLOCK + 1):
                origin = start + block * KEY_BLOCK
                depth = min(KEY_BLOCK, last + 1 - origin)
                depth += depth % 2
                _score_block(queries, num_rows, keys, block, depth, scores)
                for i in range(num_rows):
                    query = position + (first + i) // group
                    low = max(0, query + 1 - window - origin) if window > 0 else 0
                    high = min(KEY_BLOCK, query + 1 - origin)
                    _weigh(scores[i], low, high, depth, scale, softcap, tops, totals, i, sums[i], weights[i])
                _add_values(weights, num_rows, values, block, capacity, depth, sums)
            for i in range(num_rows):
                inverse = _ONE / totals[i]
                target = out[(first + i) // group, h * group + (first + i) % group]
                for d in range(head_dim):
                    target[d] = narrow(out, sums[i, d] * inverse)


@kernel
def _pack_context(data, page_of_block, pages, h, start, stop, capacity, keys, values):
    """The keys of head `h` as panels of a matrix ``[head_dim, keys]``, its values as one of ``[keys, head_dim]``."""
    head_dim, block_size = data.shape[4], data.shape[2]
    step = depth_step(data)
    num_value_panels = (head_dim + PANEL - 1) // PANEL
    for j in range(capacity):
        base = j // PANEL * PANEL * head_dim + j % PANEL * step
        place = j // step * PANEL * step + j % step
        if start + j < stop:
            position = start + j
            page = page_of_block[pages[position // block_size]]
            key, value = data[page, 0, position % block_size, h], data[page, 1, position % block_size, h]
            for d in range(0, head_dim, step):
                for s in range(step):
                    keys[base + d * PANEL + s] = key[d + s]
            for d in range(head_dim):
                values[d // PANEL * PANEL * capacity + place + d % PANEL * step] = value[d]
        elif j < (stop - start + PANEL + 1) // PANEL * PANEL:
            for d in range(0, head_dim, step):
                for s in range(step):
                    keys[base + d * PANEL + s] = 0
            for d in range(num_value_panels * PANEL):
                values[d // PANEL * PANEL * capacity + place + d % PANEL * step] = 0


@kernel
def _score_block(queries, num_rows, keys, block, depth, scores):
    head_dim, size = queries.shape[1], queries.itemsize
    for panel in range((depth + PANEL - 1) // PANEL):
        w = keys.ctypes.data + (block * KEY_BLOCK + panel * PANEL) * head_dim * size
        for i in range(0, num_rows, TILE_ROWS):
            tile_rows(
                queries,
                min(TILE_ROWS, num_rows - i),
                queries.ctypes.data + i * head_dim * size,
                head_dim * size,
                w,
                head_dim,
                scores.ctypes.data + (i * KEY_BLOCK + panel * PANEL) * 4,
                KEY_BLOCK * 4,
                False,
            )


@kernel
def _weigh(scores, low, high, depth, scale, softcap, tops, totals, i, sums, weights):
    """One query against one block of keys: raise its maximum, rescale its sums, and turn scores into weights."""
    if high <= low:
        for j in range(depth):
            weights[j] = 0
        return
    top = tops[i]
    for j in range(low, high):
        scores[j] *= scale
    if softcap > _ZERO:
        _cap(scores[low:high], softcap)
    for j in range(low, high):
        top = max(top, scores[j])
    factor = exp32(tops[i] - top)
    tops[i] = top
    total = _ZERO
    for j in range(low):
        weights[j] = 0
    for j in range(low, high):
        weight = exp32(scores[j] - top)
        total += weight
        weights[j] = narrow(weights, weight)
    for j in range(high, depth):
        weights[j] = 0
    totals[i] = totals[i] * factor + total
    for d in range(len(sums)):
        sums[d] *= factor


@kernel
def _add_values(weights, num_rows, values, block, capacity, depth, sums):
    size, padded = weights.itemsize, sums.shape[1]
    for panel in range(padded // PANEL):
        w = values.ctypes.data + (panel * capacity + block * KEY_BLOCK) * PANEL * size
        for i in range(0, num_rows, TILE_ROWS):
            tile_rows(
                weights,
                min(TILE_ROWS, num_rows - i),
                weights.ctypes.data + i * KEY_BLOCK * size,
                KEY_BLOCK * size,
                w,
                depth,
                sums.ctypes.data + (i * padded + panel * PANEL) * 4,
                padded * 4,
                True,
            )
