"""Triton kernels for what `runtime.cuda.fused` says in torch operations. Imported only where Triton is.

One program handles one row (or one head of one token), which it holds as a whole. Sizes are compile-time constants of a
model, so a kernel compiles once for each shape of layer and dtype: while loading, in the warm-up.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """For ``[T, n]``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[1]
    if len(x):
        _norm[len(x),](x, x, weight, out, out, eps, size, False, _power(size), num_warps=_norm_warps(size))
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``[T, n]``."""
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[1]
    if len(x):
        _norm[len(x),](x, residual, weight, total, out, eps, size, True, _power(size), num_warps=_norm_warps(size))
    return total, out


def rotate_into_pages(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    data: torch.Tensor,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> torch.Tensor:
    """q ``[T, num_heads, head_dim]``, normed where there are `norms` and rotated; k, treated alike, and v go into the pool `data`.

    qkv is ``[T, num_heads + 2 * num_kv_heads, head_dim]``, contiguous. A token with a negative slot leaves no k and v.
    """
    qkv = qkv.contiguous()
    tokens, heads, size = qkv.shape
    block_size, num_kv_heads = data.shape[2:4]
    q = torch.empty(tokens, num_heads, size, dtype=qkv.dtype, device=qkv.device)
    norm_q, norm_k = norms or (qkv, qkv)
    half = size // 2
    if tokens:
        _rotate_into_pages[tokens, heads](
            qkv,
            cos.contiguous(),
            sin.contiguous(),
            slots,
            data,
            q,
            norm_q,
            norm_k,
            eps,
            norms is not None,
            num_heads,
            num_kv_heads,
            block_size,
            half,
            _power(half),
        )
    return q


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, _power(size))
    if tokens:
        _silu_mul[tokens, -(-size // block)](gate_up, out, size, block)
    return out


def _norm_warps(size: int) -> int:
    """Few rows are bound by how long one takes, so that a thread should have little of it."""
    return 8 if size > 2048 else 4


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


@triton.jit
def _norm(
    x,
    residual,
    weight,
    total,
    out,
    eps,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    value = tl.load(x + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        more = tl.load(residual + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotate_into_pages(
    qkv,
    cos,
    sin,
    slots,
    data,
    q,
    norm_q,
    norm_k,
    eps,
    HAS_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    at = (token * (HEADS + 2 * KV_HEADS) + head) * (2 * HALF) + column
    low = tl.load(qkv + at, mask=inside, other=0.0)
    high = tl.load(qkv + at + HALF, mask=inside, other=0.0)
    slot = tl.load(slots + token)
    if head >= HEADS + KV_HEADS:
        to = ((slot + PAGE) * KV_HEADS + head - HEADS - KV_HEADS) * (2 * HALF) + column
        kept = inside & (slot >= 0)
        tl.store(data + to, low, mask=kept)
        tl.store(data + to + HALF, high, mask=kept)
    else:
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        if HAS_NORM:
            scale = 1.0 / tl.sqrt(tl.sum(wide_low * wide_low + wide_high * wide_high, 0) / (2 * HALF) + eps)
            weight = norm_q
            if head >= HEADS:
                weight = norm_k
            factor_low = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            factor_high = tl.load(weight + HALF + column, mask=inside, other=0.0).to(tl.float32)
            wide_low = (wide_low * scale).to(q.dtype.element_ty).to(tl.float32)
            wide_high = (wide_high * scale).to(q.dtype.element_ty).to(tl.float32)
            wide_low = (wide_low * factor_low).to(q.dtype.element_ty).to(tl.float32)
            wide_high = (wide_high * factor_high).to(q.dtype.element_ty).to(tl.float32)
        c = tl.load(cos + token * HALF + column, mask=inside, other=0.0)
        s = tl.load(sin + token * HALF + column, mask=inside, other=0.0)
        turned_low = (wide_low * c - wide_high * s).to(q.dtype.element_ty)
        turned_high = (wide_high * c + wide_low * s).to(q.dtype.element_ty)
        if head < HEADS:
            to = (token * HEADS + head) * (2 * HALF) + column
            tl.store(q + to, turned_low, mask=inside)
            tl.store(q + to + HALF, turned_high, mask=inside)
        else:
            to = (slot * KV_HEADS + head - HEADS) * (2 * HALF) + column
            kept = inside & (slot >= 0)
            tl.store(data + to, turned_low, mask=kept)
            tl.store(data + to + HALF, turned_high, mask=kept)


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + token * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * SIZE + column, (silu * up).to(out.dtype.element_ty), mask=inside)
