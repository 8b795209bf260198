"""Triton's kernels, of the operations between matrix products and of decode attention, against torch's, where there is a Triton.

Without a device Triton can interpret its kernels: ``TRITON_INTERPRET=1 scripts/test tests/unit/test_cuda_fused.py``.
"""

import dataclasses
import os

import pytest
import torch

from runtime.cuda import fused
from runtime.cuda.attention import Shape, TritonDecode, TritonRows, check

pytest.importorskip("triton", reason="Triton is not installed")
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

from runtime.cuda import decode  # noqa: E402 - it imports Triton

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def kernels():
    from runtime.cuda import kernels

    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_kernel_says_what_torch_says(kernels, dtype):
    assert fused.compare(kernels, DEVICE, dtype) == ""


@pytest.mark.parametrize("sizes", [(1, 8), (5, 576), (3, 1000), (0, 64)])
def test_rows_of_any_length(kernels, sizes):
    torch.manual_seed(1)
    x, residual, weight = (torch.randn(size, device=DEVICE) for size in (sizes, sizes, sizes[1:]))
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), fused.rms_norm_torch(x, weight, 1e-6))
    total, normed = kernels.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, fused.rms_norm_torch(total, weight, 1e-6))
    torch.testing.assert_close(kernels.silu_mul(x), fused.silu_mul_torch(x))


@pytest.mark.parametrize("has_norms", [False, True])
def test_queries_keys_and_values_out_of_one_product(kernels, has_norms):
    """Heads of a size that is no power of two; a token with a negative place leaves nothing."""
    torch.manual_seed(2)
    qkv, data = torch.randn(7, 10, 24, device=DEVICE), torch.full((4, 2, 5, 2, 24), 9.0, device=DEVICE)
    angles, slots = torch.rand(7, 12, device=DEVICE), torch.tensor([0, 3, -1, 14, 30, -1, 11], device=DEVICE)
    norms = tuple(torch.randn(24, device=DEVICE) for _ in range(2)) if has_norms else None
    q, k, v = fused.rotate_torch(qkv, angles.cos(), angles.sin(), 6, norms, 1e-5)
    expected = torch.full((40, 2, 24), 9.0, device=DEVICE)
    kept = slots >= 0
    expected[slots[kept]], expected[slots[kept] + 5] = k[kept], v[kept]
    found = kernels.rotate_into_pages(qkv, angles.cos(), angles.sin(), slots, data, 6, norms, 1e-5)
    torch.testing.assert_close(found, q)
    torch.testing.assert_close(data.view(40, 2, 24), expected)


def test_a_kernel_that_deviates_is_found(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "silu_mul", lambda x: fused.silu_mul_torch(x) * 1.01)
    assert fused.compare(kernels, DEVICE, torch.float32) == "silu_mul deviates"


# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if HAS_CUDA else [])])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 64), (2, 2, 24)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (11, None), (None, 4.0), (300, 9.0)])
@pytest.mark.parametrize("block_size", [16, 256])
def test_attention(dtype, heads, kv_heads, head_dim, window, softcap, block_size):
    shape = Shape(DEVICE, dtype, heads, kv_heads, head_dim, block_size, head_dim**-0.5, window, softcap, True)
    assert check(TritonDecode(interpreted=True), shape) == ""
    assert check(TritonRows(interpreted=True), dataclasses.replace(shape, is_decode=False)) == ""


@pytest.mark.parametrize("splits", [1, 4])
def test_a_decode_step_in_one_part_or_in_several(splits, monkeypatch):
    monkeypatch.setattr(decode, "EAGER_SPLITS", splits)
    shape = Shape(DEVICE, torch.float32, 4, 2, 16, 256, 0.25, None, None, True)
    assert check(TritonDecode(interpreted=True), shape) == ""


def test_few_rows_are_split_and_many_are_not():
    num_splits = decode.num_splits
    assert num_splits(8, 8192) == 32
    assert num_splits(8, 700) == 2
    assert num_splits(256, 8192) == 1
    assert num_splits(1000, 100) == 1
