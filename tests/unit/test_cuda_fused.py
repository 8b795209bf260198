"""Triton's kernels, of the operations between matrix products and of decode attention, against torch's, where there is a Triton.

Without a device Triton can interpret its kernels: ``TRITON_INTERPRET=1 scripts/test tests/unit/test_cuda_fused.py``.
"""

import os

import pytest
import torch

from runtime.cuda import fused
from runtime.cuda.attention import Shape, TritonDecode, check

pytest.importorskip("triton", reason="Triton is not installed")
HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)

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


def test_heads_out_of_a_wider_tensor(kernels):
    torch.manual_seed(2)
    qkv = torch.randn(7, 9, 24, device=DEVICE)
    angles = torch.rand(7, 12, device=DEVICE)
    for heads in (qkv[:, :6], qkv[:, 6:8], qkv):
        found = kernels.rotate(heads, angles.cos(), angles.sin())
        torch.testing.assert_close(found, fused.rotate_torch(heads, angles.cos(), angles.sin()))
        weight = torch.randn(24, device=DEVICE)
        torch.testing.assert_close(kernels.rms_norm(heads, weight, 1e-5), fused.rms_norm_torch(heads, weight, 1e-5))


def test_a_kernel_that_deviates_is_found(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "silu_mul", lambda x: fused.silu_mul_torch(x) * 1.01)
    assert fused.compare(kernels, DEVICE, torch.float32) == "silu_mul deviates"


# Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if HAS_CUDA else [])])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 16), (9, 3, 64), (2, 2, 24)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (11, None), (None, 4.0), (300, 9.0)])
@pytest.mark.parametrize("block_size", [16, 256])
def test_decode_attention(dtype, heads, kv_heads, head_dim, window, softcap, block_size):
    shape = Shape(DEVICE, dtype, heads, kv_heads, head_dim, block_size, head_dim**-0.5, window, softcap, True)
    assert check(TritonDecode(interpreted=True), shape) == ""


def test_few_rows_are_split_and_many_are_not():
    from runtime.cuda.decode import num_splits

    assert num_splits(8, 8192) == 32
    assert num_splits(8, 700) == 2
    assert num_splits(256, 8192) == 1
    assert num_splits(1000, 100) == 1
