"""Triton's kernels compile for the devices that the project is for, and fit into what a block may share there. No device is needed, only Triton."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from runtime.cuda import decode, kernels, prompts  # noqa: E402

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}
"""A block's most, by compute capability: A100, L40S, H100."""
SHAPES = [(8, 128, 4), (8, 128, 8), (3, 64, 3), (4, 256, 2), (32, 128, 1)]
"""KV heads, head size, query heads of each: those of Llama-3, SmolLM2, Gemma 2, and of models without groups."""


class Compiled:
    """Stands in for a kernel: a launch compiles it for `capability` with the constants that it was called with."""

    def __init__(self, kernel: Any, capability: int, shared: list[int]) -> None:
        self._kernel, self._capability, self._shared = kernel, capability, shared

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any, **options: Any) -> None:
        kernel, kinds, constants, attributes = self._kernel, {}, {}, {}
        for parameter, value in zip(kernel.params, args, strict=True):
            if parameter.is_constexpr:
                constants[(parameter.num,)] = value
                kinds[parameter.name] = "constexpr"
            elif hasattr(value, "data_ptr"):
                kinds[parameter.name] = "*" + _NAMES[str(value.dtype)]
                if not parameter.do_not_specialize_on_alignment:
                    attributes[(parameter.num,)] = [["tt.divisibility", 16]]
            else:
                kinds[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", self._capability, 32)
        self._shared.append(triton.compile(source, target=target, options=options).metadata.shared)


_NAMES = {
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.int32": "i32",
    "torch.int64": "i64",
}


@pytest.fixture(params=SHARED_BYTES, ids=["A100", "L40S", "H100"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches compile, and at the end each must fit."""
    found: list[int] = []
    for module in (decode, kernels, prompts):
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction):
                monkeypatch.setattr(module, name, Compiled(kernel, request.param, found))
    yield
    assert found
    assert max(found) <= SHARED_BYTES[request.param]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kv_heads", "head_dim", "group"), SHAPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (512, 30.0)])
def test_attention(
    shared: None, dtype: Any, kv_heads: int, head_dim: int, group: int, window: Any, softcap: Any
) -> None:
    data = torch.empty(4, 2, 256, kv_heads, head_dim, dtype=dtype)
    q, pages, lens = (
        torch.empty(3, kv_heads * group, head_dim, dtype=dtype),
        torch.zeros(3, 2).int(),
        torch.ones(3).int(),
    )
    for splits in (1, 8):
        decode.attend_decode(q, data, pages, lens, splits, 0.1, window, softcap)
    blocks = torch.zeros(2, 5).int()
    prompts.attend_rows(q, data, pages, torch.arange(4).int(), lens, blocks, 0.1, window, softcap)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_between_the_products(shared: None, dtype: Any) -> None:
    x, weight = torch.empty(3, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    kernels.rms_norm(x, weight, 1e-5)
    kernels.add_rms_norm(x, x, weight, 1e-5)
    kernels.silu_mul(torch.empty(3, 28672, dtype=dtype))
    data, norm = torch.empty(4, 2, 256, 8, 128, dtype=dtype), torch.empty(128, dtype=dtype)
    for norms in (None, (norm, norm)):
        angles = torch.empty(3, 64)
        slots = torch.zeros(3, dtype=torch.int64)
        kernels.rotate_into_pages(torch.empty(3, 48, 128, dtype=dtype), angles, angles, slots, data, 32, norms, 1e-5)
