"""The CPU kernels one by one against float64, their rounding against torch's, and that they never compile twice."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import attention
from runtime.batch import LayerKV, StepBatch
from runtime.kernels import STORAGE_DTYPES, layer, paged, products, storage, team
from runtime.kernels.lanes import LANES, PANEL, address, kernel
from runtime.kernels.products import ADD, PLAIN, SILU_MUL, pack, pack_gate_up, product, product_scratch
from runtime.kernels.quantized import quantized_tile_address
from runtime.kernels.softmax import find_top, weigh
from runtime.kernels.spans import store_scaled, store_silu_mul
from runtime.kernels.tiles import tile_address
from runtime.model import lean

pytestmark = pytest.mark.usefixtures("kernel_threads")

DTYPES = list(STORAGE_DTYPES)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""The relative error that storing a result in the dtype allows, with room for the sums before."""
NOTHING = np.empty(0, np.float32)


def run_product(x, packed, kind, bias=None, residual=None, out_dtype=None):
    out = torch.full((len(x), packed.num_columns), torch.nan, dtype=out_dtype or x.dtype)
    bias = NOTHING if bias is None else bias.numpy()
    residual = storage(out if residual is None else residual)
    arguments = (kind, bias, residual, storage(out), 0, packed.num_columns, *product_scratch(len(x)))
    tiles = quantized_tile_address if packed.data.dtype == np.int8 else tile_address
    product(team.current(), tiles(storage(x).dtype), storage(x), 0, len(x), packed.data, *arguments)
    return out


@st.composite
def products_of(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    rows, depth = draw(st.integers(1, 40)), 2 * draw(st.one_of(st.integers(1, 40), st.integers(250, 700)))
    columns = draw(st.integers(1, 200))
    return torch.randn(rows, depth).to(dtype), (torch.randn(columns, depth) * depth**-0.5).to(dtype)


@given(case=products_of(), biased=st.booleans())
@settings(deadline=None, max_examples=60)
def test_products_match_float64(case, biased):
    x, weight = case
    exact = x.double() @ weight.double().T
    bias = torch.randn(len(weight)) if biased else None
    expected = exact if bias is None else exact + bias.double()
    out = run_product(x, pack(weight), PLAIN, bias, out_dtype=torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-6)
    residual = torch.randn(len(x), len(weight)).to(x.dtype)
    out = run_product(x, pack(weight), ADD, bias, residual)
    tolerance = ROUNDING[x.dtype]
    torch.testing.assert_close(out.double(), expected + residual.double(), rtol=tolerance, atol=4e-6)


@given(case=products_of())
@settings(deadline=None, max_examples=30)
def test_gate_and_up_in_one_product_match_float64(case):
    x, gate = case
    up = torch.randn_like(gate, dtype=torch.float32).to(gate.dtype) * gate.shape[1] ** -0.5
    out = run_product(x, pack_gate_up(gate, up), SILU_MUL)
    x64 = x.double()
    expected = torch.nn.functional.silu(x64 @ gate.double().T) * (x64 @ up.double().T)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[x.dtype], atol=4e-6)


@given(case=products_of())
@settings(deadline=None, max_examples=30)
def test_a_row_of_a_product_has_the_same_bits_alone(case):
    x, weight = case
    packed = pack(weight)
    together = run_product(x, packed, PLAIN, out_dtype=torch.float32)
    alone = torch.cat([run_product(x[i : i + 1], packed, PLAIN, out_dtype=torch.float32) for i in range(len(x))])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heights", [(576, 192, 192), (5, 40, 3), (PANEL - 1, 2), (300, 100, 7)])
def test_weights_are_packed_as_one(heights: tuple[int, ...], dtype: torch.dtype) -> None:
    """Whatever their heights are: several blocks of each, and edges inside a panel."""
    weights = [torch.randn(height, 4096, dtype=dtype) for height in heights]
    together, one = pack(*weights), pack(torch.cat(weights))
    assert (together.num_columns, together.depth) == (one.num_columns, one.depth) == (sum(heights), 4096)
    assert np.array_equal(together.data, one.data)
    padded = torch.nn.functional.pad(torch.cat(weights), (0, 0, 0, -sum(heights) % PANEL))
    unit = 4 // dtype.itemsize
    panels = padded.view(-1, PANEL, 4096 // unit, unit).transpose(1, 2)
    assert np.array_equal(one.data, storage(panels.contiguous().view(-1)))


def test_packed_weights_are_whole_panels_and_no_more():
    packed = pack(torch.randn(PANEL + 1, 6, dtype=torch.float32))
    assert packed.nbytes == 2 * PANEL * 6 * 4
    assert packed.num_columns == PANEL + 1
    with pytest.raises(ValueError, match="even number of inputs, got 7"):
        pack(torch.randn(3, 7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    torch.manual_seed(1)
    x, weight = (torch.randn(5, 77) * 3).to(dtype), torch.randn(77)
    out = torch.empty(3, 77, dtype=dtype)
    layer.rms_norm(storage(x), 2, 3, weight.numpy(), np.float32(1e-5), storage(out), 0)
    wide = x[2:].double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype], atol=1e-6)


@kernel
def round_all(source, out):
    store_scaled(out, address(source), len(source), np.float32(1.0), address(out))


@kernel
def silu_mul_all(gate, up, out):
    store_silu_mul(out, address(gate), address(up), len(gate), address(out))


@kernel
def softmax_all(scores, scale, out):
    top = find_top(address(scores), 0, len(scores))
    total = weigh(out, address(scores), 0, len(scores), len(scores), scale, top, address(out))
    return top, total


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torch_s_to_the_bit(dtype):
    bits = np.random.default_rng(2).integers(0, 2**32, 100_003, dtype=np.uint32)
    bits[:4096] = np.arange(4096, dtype=np.uint32) * 0x1000 + 0x3F800000
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 65504.0, 65520.0, 1e-7, 3.4e38]
    values = np.concatenate([bits.view(np.float32), np.array(special, np.float32)])
    values = values[np.isnan(values) | (np.abs(values) == 0) | (np.abs(values) > 1e-37)]
    source, out = torch.from_numpy(values), torch.empty(len(values), dtype=dtype)
    round_all(values, storage(out))
    expected = source.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(out[finite], expected[finite])


def test_silu_at_its_ends():
    gate = np.array([0.0, 1.0, -1.0, 30.0, -30.0, 87.0, -87.0, 1e4, -1e4, math.inf, math.nan], np.float32)
    out = np.empty_like(gate)
    silu_mul_all(gate, np.full_like(gate, 2.0), out)
    expected = 2 * torch.nn.functional.silu(torch.from_numpy(gate).double())
    torch.testing.assert_close(torch.from_numpy(out).double(), expected, rtol=5e-7, atol=1e-35, equal_nan=True)


@given(count=st.integers(1, 300), spread=st.sampled_from([0.01, 1.0, 30.0, 1000.0]), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_softmax_weights(count, spread, seed):
    scores = (np.random.default_rng(seed).standard_normal(count) * spread).astype(np.float32)
    room = np.full(-(-count // LANES) * LANES, 7.0, np.float32)
    top, total = softmax_all(scores, np.float32(0.5), room)
    assert top == scores.max()
    expected = np.exp(((scores - np.float32(top)) * np.float32(0.5)).astype(np.float64))
    expected[expected < 1.2e-38] = 0.0
    np.testing.assert_allclose(room[:count], expected, rtol=3e-7, atol=2e-38)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
    assert not room[count:].any()


def test_other_dtypes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        storage(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_compiles_after_the_warm_up(dtype):
    lean.warm_up("cpu", dtype)
    dispatchers = [
        value for module in (layer, paged, products) for value in vars(module).values() if hasattr(value, "signatures")
    ]
    assert len(dispatchers) >= 8
    before = {d.py_func.__name__: list(d.signatures) for d in dispatchers}
    run_odd_steps(dtype)
    assert {d.py_func.__name__: list(d.signatures) for d in dispatchers} == before


def run_odd_steps(dtype):
    """Decode, prefill and attention as other modules may call them: read-only, sliced and 64-bit arrays."""
    tables = np.arange(24, dtype=np.int64).reshape(2, 12)[:, ::2]
    tables.flags.writeable = False
    batch = StepBatch(
        positions=torch.tensor([0, *range(20)]),
        query_starts=np.array([0, 1, 21]),
        context_lens=np.frombuffer(np.array([1, 20], np.int32).tobytes(), np.int32),
        block_tables=tables,
    )
    pages = np.arange(96, dtype=np.int32).reshape(4, 24)[2]
    kv = LayerKV(layer=2, data=torch.zeros(100, 2, 4, 2, 16, dtype=dtype), page_of_block=pages)
    q, k = torch.randn(21, 6, 16).to(dtype), torch.randn(21, 2, 16).to(dtype)
    attention.attend(q, k, k.transpose(0, 1).contiguous().transpose(0, 1), batch, kv, scale=0.3, softcap=9.0)
    head = lean.LeanHead(torch.ones(48), torch.randn(50, 48), 1e-5, "cpu", dtype)
    head(torch.randn(21, 48).to(dtype)[::5])


def test_a_block_without_a_page_is_our_bug():
    batch, kv = attention.tiny_step("cpu", torch.float32, num_kv_heads=1, head_dim=4)
    kv.page_of_block[1] = -1
    q = torch.zeros(batch.num_tokens, 1, 4)
    with pytest.raises(AssertionError, match="layer 0 has no page"):
        attention.attend(q, q, q, batch, kv, scale=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features"), [("generic", ""), ("haswell", "+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt")]
)
def test_lesser_processors(name, features, tmp_path):
    """All tests of the kernels again, compiled as for a processor with shorter vectors and no bfloat16."""
    env = os.environ | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    folder = Path(__file__).parent
    files = [str(folder / f"test_{part}.py") for part in ("kernels", "attention", "lean", "quantized")]
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder.parents[1], timeout=900)
    assert run.returncode == 0, run.stdout[-4000:]
