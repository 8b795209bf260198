"""The small operations between a layer's matrix products, one kernel each where Triton is, else a few of torch's.

How it works: each function is defined by its torch operations, which run on any device, round where `transformers` rounds,
and are what the kernels are compared with. The kernels (`runtime.cuda.kernels`) are used for CUDA tensors when Triton can be imported
and they give the same on this device, which is tried once, in the first call.

What is never true: a kernel keeps more precision between two roundings than the torch operations it stands for, or less.
"""

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from torch.nn import functional as F

from runtime.batch import LayerKV
from runtime.cuda.step import PagedStep

log = logging.getLogger("midflight.worker")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``weight * x / rms(x)`` along the last axis; float32 within."""
    kernels = _kernels(x)
    return rms_norm_torch(x, weight, eps) if kernels is None else kernels.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + residual``, and that normed."""
    kernels = _kernels(x)
    if kernels is None:
        total = x + residual
        return total, rms_norm_torch(total, weight, eps)
    return kernels.add_rms_norm(x, residual, weight, eps)


def rotate_into_pages(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    step: PagedStep,
    kv: LayerKV,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Write a step's keys and values into their pages; its queries, ``[T, num_heads, head_dim]``.

    qkv is ``[T, num_heads + 2 * num_kv_heads, head_dim]``; queries and keys are rotated by the tables ``[T, head_dim / 2]``, in float32, after
    they were normed by `norms` (that of q, that of k), if there are any.
    """
    kernels = _kernels(qkv)
    if kernels is not None:
        slots = step.slots[step.row_of_layer[kv.layer]]
        return kernels.rotate_into_pages(qkv, cos, sin, slots, kv.data, num_heads, norms, eps)
    q, k, v = rotate_torch(qkv, cos, sin, num_heads, norms, eps)
    step.write(k, v, kv)
    return q


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``[T, 2 * n]`` to ``[T, n]``: silu of the first half times the second."""
    kernels = _kernels(gate_up)
    return silu_mul_torch(gate_up) if kernels is None else kernels.silu_mul(gate_up)


# -- by torch -------------------------------------------------------------------------------------------------


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate_torch(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of qkv, the first two normed and rotated."""
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        q, k = (rms_norm_torch(x, weight, eps) for x, weight in zip((q, k), norms, strict=True))
    return _turn(q, cos, sin), _turn(k, cos, sin), v


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def silu_mul_torch(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# -- by kernels -----------------------------------------------------------------------------------------------


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it is kernels here, which alone know of tokens that have no place among the pages."""
    return device.type == "cuda" and _tried(device, dtype) is not None


def _kernels(x: torch.Tensor) -> ModuleType | None:
    return _tried(x.device, x.dtype) if x.is_cuda else None


@functools.lru_cache(maxsize=16)
def _tried(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernels, if they work here."""
    if importlib.util.find_spec("triton") is None:
        log.info("no Triton: the operations between matrix products are torch's")
        return None
    try:
        from runtime.cuda import kernels

        why = compare(kernels, device, dtype)
    except Exception as error:  # whatever a compiler or a driver raises
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if why:
        log.warning("Triton's kernels are not used for %s: %s", dtype, why)
        return None
    return kernels


def compare(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernel deviates from torch's operations by more than one rounding; empty when none does."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    x, residual, weight = random(3, 200), random(3, 200), random(200)
    qkv, norms, angles = random(3, 8, 32), (random(32), random(32)), torch.rand(3, 16, generator=generator).to(device)
    cos, sin = angles.cos(), angles.sin()
    total = x + residual

    def rotated(norms: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k and v side by side; the second of three tokens has no place."""
        slots = torch.tensor([19, -1, 2], device=device)
        data = torch.zeros(3, 2, 4, 2, 32, dtype=dtype, device=device)
        expected = torch.cat(rotate_torch(qkv, cos, sin, 4, norms, 1e-5), 1)
        expected[1, 4:] = 0.0
        q = kernels.rotate_into_pages(qkv, cos, sin, slots, data, 4, norms, 1e-5)
        flat, there = data.view(-1, 2, 32), slots[[0, 2]]
        written = torch.zeros_like(expected[:, 4:])
        written[[0, 2]] = torch.cat((flat[there], flat[there + 4]), 1)
        flat[there], flat[there + 4] = 0.0, 0.0
        written[1] = flat.abs().max()  # whatever lies elsewhere
        return torch.cat((q, written), 1), expected

    pairs = {
        "rms_norm": (kernels.rms_norm(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5)),
        "add_rms_norm": (kernels.add_rms_norm(x, residual, weight, 1e-5)[1], rms_norm_torch(total, weight, 1e-5)),
        "the sum of add_rms_norm": (kernels.add_rms_norm(x, residual, weight, 1e-5)[0], total),
        "rotate_into_pages": rotated(None),
        "rotate_into_pages with norms": rotated(norms),
        "silu_mul": (kernels.silu_mul(x), silu_mul_torch(x)),
    }
    for name, (found, expected) in pairs.items():
        limit = 4.0 * torch.finfo(dtype).eps * float(expected.float().abs().max())
        if found.shape != expected.shape or not float((found.float() - expected.float()).abs().max()) <= limit:
            return f"{name} deviates"
    return ""
