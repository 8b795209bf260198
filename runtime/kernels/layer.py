"""Decoder layers of the Llama family as one kernel, so that a step costs one call, however many layers a stage has.

Between two layers the caches are full of weights, and whatever runs there runs cold: a call of its own for each layer cost 40 us
instead of the 9 that it takes when it is repeated alone.

How it works: RMSNorm, fused q/k/v product, rotary embedding (with the optional norm of each head) straight into the
pages, paged attention, output product onto the residual, RMSNorm, gate and up product with SiLU, down product onto the
residual. Tokens pass through the products in blocks of `ROW_BLOCK`, so the scratch stays small whatever the step. The members of a
team (`team`) divide the columns of each product, the queries of attention and the tokens of everything else, and meet between them.

What is never true: the residual is rounded to the serving dtype only where a layer of `transformers` rounds it; in
between values stay in float32 unless they are the input of a product.
"""

import math

import numpy as np

from runtime.kernels.clock import ATTENTION, PRODUCTS, add, start_clock
from runtime.kernels.lanes import address, array_at, kernel, part
from runtime.kernels.paged import attention_share
from runtime.kernels.products import ADD, PLAIN, ROW_BLOCK, SILU_MUL, product_share
from runtime.kernels.spans import rotate_head, store_scaled, store_weighted, sum_of_squares
from runtime.kernels.team import barrier, on_team, share

SHORT = 4
"""Tokens up to which every member of a team makes all norms for itself: that takes less time than to meet."""
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@kernel
def rms_norm(x, first, count, weight, eps, out, out_first):
    """out[out_first:][:count] = x / sqrt(mean(x * x) + eps) * weight, for rows ``first ..`` of x; `weight` float32."""
    width = x.shape[1]
    for i in range(count):
        source = address(x) + (first + i) * width * x.itemsize
        target = address(out) + (out_first + i) * width * out.itemsize
        factor = _ONE / np.float32(math.sqrt(sum_of_squares(x, source, width) / np.float32(width) + eps))
        store_weighted(x, out, source, width, factor, address(weight), target)


@kernel
def decoder_layers(
    team, tiles, product_tiles, hidden, out, rows, weight, eps, cos, sin, pool, block_tables, query_starts, context_lens,
    prompt_lens, scale, normed, qkv, q, attended, activated, sums, widened, floats, packed, places, spent,
):  # fmt: skip
    """out = the layers applied to hidden ``[T, hidden_size]``, one after the other; -1, or the first that lacks a page (nothing
    is safe then).

    Row i of `rows`, int64, says where the arrays of layer i are: those of `layer_row`, then its ``page_of_block``, then its
    window. `weight` is any array of the weights' storage type. `cos` and `sin` are float32 ``[T, head_dim / 2]``. The
    arguments from `normed` on are scratch: that one for each member of the team, ``[members, rows, hidden_size]``; `q` and `attended` are ``[T, num_heads, head_dim]``, and those from `sums` on are of
    `product_scratch` and `attention_scratch`. The last, `spent`, is int64: empty, or where the time of products and attention is
    added (see `clock`). `team` is `team.current()`.
    """
    operands = (
        tiles, product_tiles, hidden, out, rows, weight, eps, cos, sin, pool, block_tables, query_starts, context_lens, prompt_lens,
        scale, normed, qkv, q, attended, activated, sums, widened, floats, packed, places, spent,
    )  # fmt: skip
    return on_team(team, _layers_share, operands)


@kernel
def _layers_share(
    me, tiles, product_tiles, hidden, out, rows, weight, eps, cos, sin, pool, block_tables, query_starts, context_lens, prompt_lens,
    scale, normed, qkv, q, attended, activated, sums, widened, floats, packed, places, spent,
):  # fmt: skip
    """A member's share of `decoder_layers`, with its result."""
    timed = spent if me[1] == 0 else spent[:0]
    for i in range(len(rows)):
        row, source = address(rows) + i * rows.shape[1] * 8, hidden if i == 0 else out
        page_of_block = array_at(row, 10, block_tables)
        if not _has_pages(page_of_block, block_tables, query_starts, context_lens, pool.shape[2]):
            return i
        _decoder_layer(
            me,
            tiles,
            product_tiles,
            source,
            out,
            array_at(row, 0, cos),
            array_at(row, 1, weight),
            array_at(row, 2, cos),
            array_at(row, 3, cos),
            array_at(row, 4, cos),
            array_at(row, 5, weight),
            array_at(row, 6, cos),
            array_at(row, 7, cos),
            array_at(row, 8, weight),
            array_at(row, 9, weight),
            eps,
            cos,
            sin,
            pool,
            page_of_block,
            block_tables,
            query_starts,
            context_lens,
            prompt_lens,
            scale,
            rows[i, -1],
            normed,
            qkv,
            q,
            attended,
            activated,
            sums,
            widened,
            floats,
            packed,
            places,
            timed,
        )
    return -1


ROW_LENGTH = 2 * 11 + 1
"""Entries of a row for `decoder_layers`: address and length of ten arrays and of ``page_of_block``, and the window."""


def layer_row(
    input_norm,
    qkv_weight,
    qkv_bias,
    q_norm,
    k_norm,
    o_weight,
    o_bias,
    post_norm,
    gate_up_weight,
    down_weight,
    window: int,
) -> np.ndarray:
    """A layer's row for `decoder_layers`, int64 ``[ROW_LENGTH]``, valid while the arrays live; without its ``page_of_block`` yet.

    Weights are packed; norms and biases are float32, empty for none; `window` is 0 for none.
    """
    row = np.zeros(ROW_LENGTH, np.int64)
    arrays = (
        input_norm, qkv_weight, qkv_bias, q_norm, k_norm, o_weight, o_bias, post_norm, gate_up_weight, down_weight
    )  # fmt: skip
    for index, array in enumerate(arrays):
        row[2 * index : 2 * index + 2] = array.ctypes.data, array.size
    row[-1] = window
    return row


@kernel
def _decoder_layer(
    me,
    tiles,
    product_tiles,
    hidden,
    out,
    input_norm,
    qkv_weight,
    qkv_bias,
    q_norm,
    k_norm,
    o_weight,
    o_bias,
    post_norm,
    gate_up_weight,
    down_weight,
    eps,
    cos,
    sin,
    pool,
    page_of_block,
    block_tables,
    query_starts,
    context_lens,
    prompt_lens,
    scale,
    window,
    normed,
    qkv,
    q,
    attended,
    activated,
    sums,
    widened,
    floats,
    packed,
    places,
    spent,
):
    """out = a layer applied to hidden, which may be out. The members wait for each other in what they are timed in, where they can."""
    num_tokens, hidden_size = hidden.shape
    attended_flat = attended.reshape(num_tokens, q.shape[1] * q.shape[2])
    nothing = qkv_bias[:0]
    given = normed[me[1] if num_tokens <= SHORT else 0]
    for first in range(0, num_tokens, ROW_BLOCK):
        count = min(num_tokens - first, ROW_BLOCK)
        begin, stop = share(me, count)
        _norm(me, hidden, first, count, input_norm, eps, given)
        begun = start_clock(spent)
        product_share(
            me, product_tiles, given, 0, count, qkv_weight, PLAIN, qkv_bias, qkv, qkv, 0, qkv.shape[1], sums, widened
        )
        barrier(me)
        add(spent, PRODUCTS, begun)
        _rotate(qkv, first, begin, stop, q_norm, k_norm, eps, cos, sin, q)
        _write_rows(qkv, first, begin, stop, q.shape[1], page_of_block, block_tables, query_starts, context_lens, pool)
    barrier(me)
    begun = start_clock(spent)
    attention_share(
        me, tiles, q, pool, page_of_block, block_tables, query_starts, context_lens, prompt_lens, scale, window, _ZERO,
        attended, floats, packed, places,
    )  # fmt: skip
    barrier(me)
    add(spent, ATTENTION, begun)
    for first in range(0, num_tokens, ROW_BLOCK):
        count = min(num_tokens - first, ROW_BLOCK)
        begun = start_clock(spent)
        product_share(
            me,
            product_tiles,
            attended_flat,
            first,
            count,
            o_weight,
            ADD,
            o_bias,
            hidden,
            out,
            first,
            hidden_size,
            sums,
            widened,
        )
        barrier(me)
        add(spent, PRODUCTS, begun)
        _norm(me, out, first, count, post_norm, eps, given)
        begun = start_clock(spent)
        product_share(
            me,
            product_tiles,
            given,
            0,
            count,
            gate_up_weight,
            SILU_MUL,
            nothing,
            given,
            activated,
            0,
            activated.shape[1],
            sums,
            widened,
        )
        barrier(me)
        product_share(
            me,
            product_tiles,
            activated,
            0,
            count,
            down_weight,
            ADD,
            nothing,
            out,
            out,
            first,
            hidden_size,
            sums,
            widened,
        )
        barrier(me)
        add(spent, PRODUCTS, begun)


@part
def _norm(me, x, first, count, weight, eps, out):
    """`rms_norm` of `count` rows of x from `first` on: all of them by every member into an `out` of its own, or divided, into one for all."""
    if len(x) <= SHORT:
        rms_norm(x, first, count, weight, eps, out, 0)
    else:
        begin, stop = share(me, count)
        rms_norm(x, first + begin, stop - begin, weight, eps, out, begin)
        barrier(me)


@part
def _rotate(qkv, block, first, stop, q_norm, k_norm, eps, cos, sin, q):
    """Norm (if any) and rotate the heads of q and k in place, tokens [first, stop) of the block of tokens that begins at `block`; the
    finished q goes to `q`."""
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    half = head_dim // 2
    for i in range(first, stop):
        for h in range(num_heads + num_kv_heads):
            head = address(qkv) + (i * qkv.shape[1] + h * head_dim) * 4
            norm = q_norm if h < num_heads else k_norm
            if len(norm):
                square = sum_of_squares(qkv, head, head_dim) / np.float32(head_dim)
                factor = _ONE / np.float32(math.sqrt(square + eps))
                store_weighted(qkv, qkv, head, head_dim, factor, address(norm), head)
            shift = (block + i) * half * 4
            rotate_head(head, half, address(cos) + shift, address(sin) + shift)
            if h < num_heads:
                place = address(q) + ((block + i) * num_heads + h) * head_dim * q.itemsize
                store_scaled(q, head, head_dim, _ONE, place)


@part
def _write_rows(qkv, block, first, stop, num_heads, page_of_block, block_tables, query_starts, context_lens, pool):
    """Put the k and v of the same tokens into their pages."""
    block_size, width, size = pool.shape[2], pool.shape[3] * pool.shape[4], pool.itemsize
    head_dim = pool.shape[4]
    for r in range(len(context_lens)):
        for t in range(max(block + first, query_starts[r]), min(block + stop, query_starts[r + 1])):
            position = context_lens[r] - query_starts[r + 1] + t
            page = page_of_block[block_tables[r, position // block_size]]
            source = address(qkv) + ((t - block) * qkv.shape[1] + num_heads * head_dim) * 4
            target = address(pool) + (page * 2 * block_size + position % block_size) * width * size
            store_scaled(pool, source, width, _ONE, target)
            store_scaled(pool, source + width * 4, width, _ONE, target + block_size * width * size)


@part
def _has_pages(page_of_block, block_tables, query_starts, context_lens, block_size):
    """Whether all blocks that this step writes to have a page."""
    for r in range(len(context_lens)):
        position = context_lens[r] - query_starts[r + 1] + query_starts[r]
        stop = (context_lens[r] + block_size - 1) // block_size if query_starts[r + 1] > query_starts[r] else 0
        for block in range(position // block_size, stop):
            if page_of_block[block_tables[r, block]] < 0:
                return False
    return True
