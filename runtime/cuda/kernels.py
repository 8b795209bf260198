"""Triton kernels for what `runtime.cuda.fused` says in torch operations. Imported only where Triton is.

One program handles one row (or one head of one token), which it holds as a whole. Sizes are compile-time constants of a
model, so a kernel compiles once for each shape of layer and dtype: while loading, in the warm-up.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x ``[..., n]`` with its last axis contiguous: ``[T, n]``, or ``[T, heads, n]`` out of a wider tensor."""
    x = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outer, inner = (x.shape[0], 1) if x.dim() == 2 else (x.shape[0], x.shape[1])
    size = x.shape[-1]
    strides = (x.stride(0), x.stride(1) if x.dim() == 3 else 0)
    if outer:
        _norm[outer, inner](x, x, weight, out, out, *strides, eps, size, False, _power(size))
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``[T, n]``, both contiguous."""
    x, residual = x.contiguous(), residual.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    if len(x):
        _norm[len(x), 1](x, residual, weight, total, out, size, 0, eps, size, True, _power(size))
    return total, out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, size = x.shape
    if tokens:
        half = size // 2
        _rotate[tokens, heads](
            x, cos.contiguous(), sin.contiguous(), out, x.stride(0), x.stride(1), heads, half, _power(half)
        )
    return out


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, _power(size))
    if tokens:
        _silu_mul[tokens, -(-size // block)](gate_up, out, size, block)
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _power(size: int) -> int:
    return triton.next_power_of_2(size)


@triton.jit
def _norm(
    x,
    residual,
    weight,
    total,
    out,
    outer_stride,
    inner_stride,
    eps,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, inner = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    at = row * outer_stride + inner * inner_stride + column
    to = (row * tl.num_programs(1) + inner) * SIZE + column
    value = tl.load(x + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        more = tl.load(residual + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(total + to, value, mask=inside)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = (wide * scale).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + to, (normed * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(x, cos, sin, out, token_stride, head_stride, heads, HALF: tl.constexpr, BLOCK: tl.constexpr):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    at = token * token_stride + head * head_stride + column
    to = (token * heads + head) * (2 * HALF) + column
    low = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + column, mask=inside, other=0.0)
    s = tl.load(sin + token * HALF + column, mask=inside, other=0.0)
    tl.store(out + to, (low * c - high * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + to + HALF, (high * c + low * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + token * 2 * SIZE + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * SIZE + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + token * SIZE + column, (silu * up).to(out.dtype.element_ty), mask=inside)
