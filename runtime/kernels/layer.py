"""A whole decoder layer of the Llama family as one kernel, so that a step costs one call per layer.

How it works: RMSNorm, fused q/k/v product, rotary embedding (with the optional norm of each head) straight into the
pages, paged attention, output product onto the residual, RMSNorm, gate and up product with SiLU, down product onto the
residual. Tokens pass through the products in blocks of `ROW_BLOCK`, so the scratch stays small whatever the step.

What is never true: the residual is rounded to the serving dtype only where a layer of `transformers` rounds it; in
between values stay in float32 unless they are the input of a product.
"""

import math

import numpy as np

from runtime.kernels.lanes import kernel, narrow, widen
from runtime.kernels.paged import paged_attention
from runtime.kernels.products import ROW_BLOCK, linear, linear_add, linear_silu_mul
from runtime.kernels.spans import store_scaled

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@kernel
def rms_norm(x, weight, eps, out):
    """out = x / sqrt(mean(x * x) + eps) * weight, row by row; `weight` float32."""
    width = x.shape[1]
    for i in range(len(x)):
        total = _ZERO
        for j in range(width):
            value = widen(x[i, j])
            total += value * value
        factor = _ONE / np.float32(math.sqrt(total / np.float32(width) + eps))
        for j in range(width):
            out[i, j] = narrow(out, widen(x[i, j]) * factor * weight[j])


@kernel
def decoder_layer(
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
    scale,
    window,
    normed,
    qkv,
    q,
    attended,
    activated,
    sums,
    floats,
    packed,
    places,
):
    """out = the layer applied to hidden ``[T, hidden_size]``; False when a block has no page (nothing is safe then).

    Weights are packed, norms and biases float32 (empty for none), `cos` and `sin` float32 ``[T, head_dim / 2]``.
    The arguments from `normed` on are scratch; `q` and `attended` are ``[T, num_heads, head_dim]``.
    """
    num_tokens, hidden_size = hidden.shape
    num_heads, head_dim = q.shape[1], q.shape[2]
    attended_flat = attended.reshape(num_tokens, num_heads * head_dim)
    for first in range(0, num_tokens, ROW_BLOCK):
        stop = min(num_tokens, first + ROW_BLOCK)
        count = stop - first
        rms_norm(hidden[first:stop], input_norm, eps, normed[:count])
        linear(normed[:count], qkv_weight, qkv.shape[1], qkv_bias, qkv[:count], sums)
        _rotate(qkv[:count], first, q_norm, k_norm, eps, cos, sin, q)
        if not _write_rows(
            qkv[:count], first, num_heads, page_of_block, block_tables, query_starts, context_lens, pool
        ):
            return False
    paged_attention(
        q,
        pool,
        page_of_block,
        block_tables,
        query_starts,
        context_lens,
        scale,
        window,
        _ZERO,
        attended,
        floats,
        packed,
        places,
    )
    for first in range(0, num_tokens, ROW_BLOCK):
        stop = min(num_tokens, first + ROW_BLOCK)
        count = stop - first
        linear_add(attended_flat[first:stop], o_weight, hidden_size, o_bias, hidden[first:stop], out[first:stop], sums)
        rms_norm(out[first:stop], post_norm, eps, normed[:count])
        linear_silu_mul(normed[:count], gate_up_weight, activated.shape[1], activated[:count], sums)
        linear_add(activated[:count], down_weight, hidden_size, qkv_bias[:0], out[first:stop], out[first:stop], sums)
    return True


@kernel
def _rotate(qkv, first, q_norm, k_norm, eps, cos, sin, q):
    """Norm (if any) and rotate the heads of q and k in place; the finished q goes to `q`, tokens `first` and on."""
    num_heads, head_dim = q.shape[1], q.shape[2]
    num_kv_heads = (qkv.shape[1] // head_dim - num_heads) // 2
    half = head_dim // 2
    for i in range(len(qkv)):
        for h in range(num_heads + num_kv_heads):
            head = qkv[i, h * head_dim : (h + 1) * head_dim]
            norm = q_norm if h < num_heads else k_norm
            if len(norm):
                total = _ZERO
                for d in range(head_dim):
                    total += head[d] * head[d]
                factor = _ONE / np.float32(math.sqrt(total / np.float32(head_dim) + eps))
                for d in range(head_dim):
                    head[d] = head[d] * factor * norm[d]
            for d in range(half):
                low, high, c, s = head[d], head[half + d], cos[first + i, d], sin[first + i, d]
                head[d] = low * c - high * s
                head[half + d] = high * c + low * s
            if h < num_heads:
                for d in range(head_dim):
                    q[first + i, h, d] = narrow(q, head[d])


@kernel
def _write_rows(qkv, first, num_heads, page_of_block, block_tables, query_starts, context_lens, pool):
    """Put the k and v of tokens ``first .. first + len(qkv)`` into their pages; False when one has no page."""
    block_size, width, size = pool.shape[2], pool.shape[3] * pool.shape[4], pool.itemsize
    head_dim, stop = pool.shape[4], first + len(qkv)
    for r in range(len(context_lens)):
        for t in range(max(first, query_starts[r]), min(stop, query_starts[r + 1])):
            position = context_lens[r] - query_starts[r + 1] + t
            page = page_of_block[block_tables[r, position // block_size]]
            if page < 0:
                return False
            source = qkv.ctypes.data + ((t - first) * qkv.shape[1] + num_heads * head_dim) * 4
            target = pool.ctypes.data + (page * 2 * block_size + position % block_size) * width * size
            store_scaled(pool, source, width, _ONE, target)
            store_scaled(pool, source + width * 4, width, _ONE, target + block_size * width * size)
    return True
