"""int8 weights: the product against float64, a layer and a model against their dequantised selves, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels import STORAGE_DTYPES
from runtime.kernels.lanes import PANEL, TILE_ROWS
from runtime.kernels.products import ADD, PLAIN, SILU_MUL, pack_gate_up_int8, pack_int8
from runtime.kernels.quantized import GROUP
from runtime.model import lean
from runtime.model.builder import UnitBuilder
from runtime.model.config import ModelError, inspect_model
from tests.tiny_models import write_tiny
from tests.unit.model_harness import Chain, reference_logits
from tests.unit.test_kernels import ROUNDING, products_of, run_product

pytestmark = pytest.mark.usefixtures("kernel_threads")

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """What int8 makes of a weight, float32, by plain arithmetic."""
    num_rows, depth = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -depth % GROUP)).view(num_rows, -1, GROUP)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    integers = (groups * torch.where(scales > 0, 1 / scales, 0)).round()
    assert integers.abs().max() <= 127
    assert torch.all((groups - integers * scales).abs() <= 0.51 * scales), "more than half a step off"
    return (integers * scales).view(num_rows, -1)[:, :depth]


@given(case=products_of(), biased=st.booleans())
@settings(deadline=None, max_examples=60)
def test_products_match_float64(case: Any, biased: bool) -> None:
    x, weight = case
    bias = torch.randn(len(weight)) if biased else None
    expected = x.double() @ dequantized(weight).double().T + (0.0 if bias is None else bias.double())
    out = run_product(x, pack_int8(weight), PLAIN, bias, out_dtype=torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-6)
    residual = torch.randn(len(x), len(weight)).to(x.dtype)
    out = run_product(x, pack_int8(weight), ADD, bias, residual)
    torch.testing.assert_close(out.double(), expected + residual.double(), rtol=ROUNDING[x.dtype], atol=4e-6)


@given(case=products_of())
@settings(deadline=None, max_examples=30)
def test_gate_and_up_in_one_product_match_float64(case: Any) -> None:
    x, gate = case
    up = torch.randn_like(gate, dtype=torch.float32).to(gate.dtype) * gate.shape[1] ** -0.5
    out = run_product(x, pack_gate_up_int8(gate, up), SILU_MUL)
    x64 = x.double()
    expected = torch.nn.functional.silu(x64 @ dequantized(gate).double().T) * (x64 @ dequantized(up).double().T)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[x.dtype], atol=4e-6)


@given(case=products_of())
@settings(deadline=None, max_examples=30)
def test_a_row_of_a_product_has_the_same_bits_alone(case: Any) -> None:
    x, weight = case
    packed = pack_int8(weight)
    alone = torch.cat([run_product(x[i : i + 1], packed, PLAIN, out_dtype=torch.float32) for i in range(len(x))])
    for count in {*range(1, 2 * TILE_ROWS + 2), len(x)}:
        together = run_product(x[:count], packed, PLAIN, out_dtype=torch.float32)
        assert torch.equal(together, alone[:count])


def test_packed_weights_are_whole_panels_with_their_scales() -> None:
    assert pack_int8(torch.randn(PANEL + 1, GROUP + 6)).nbytes == 2 * PANEL * (GROUP + 6 + 2 * 2)
    with pytest.raises(ValueError, match="even number of inputs, got 7"):
        pack_int8(torch.randn(3, 7))


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-25, 1e30])
def test_groups_of_any_size(size: float) -> None:
    weight = torch.randn(9, 2 * GROUP)
    weight[:, :GROUP] *= size
    out = run_product(torch.eye(2 * GROUP), pack_int8(weight), PLAIN)
    steps = weight.view(9, 2, GROUP).abs().amax(-1, keepdim=True) / 127
    off = (out.T - weight).view(9, 2, GROUP).abs()
    assert torch.all(off <= 0.51 * steps + 127e-30)


def test_what_is_not_finite_is_refused() -> None:
    for bad in (torch.inf, -torch.inf, torch.nan):
        weight = torch.randn(70, 80)
        weight[66, 77] = bad
        with pytest.raises(ValueError, match="cannot be quantised; serve without --quantize"):
            pack_int8(weight)


def chain(folder: Path, dtype: str, quantize: str, builder: UnitBuilder | None = None) -> Chain:
    spec = inspect_model(folder, dtype=dtype, quantize=quantize)
    builder = builder or UnitBuilder(spec, device="cpu", implementation="lean")
    return Chain(spec, builder.embedding(), {i: builder.layer(i) for i in range(spec.num_layers)}, builder.lm_head())


def some_tokens(num_rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 280, (num_rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "qwen3_sliding", "mistral"])
def test_a_model_equals_its_dequantised_self(kind: str, tmp_path: Path) -> None:
    """Whole layers and the head, in float32: int8 costs what rounding the weights costs, and nothing else."""
    from safetensors.torch import load_file, save_file

    folder = write_tiny(kind, tmp_path)
    tokens = some_tokens(2, 40)
    original = chain(folder, "float32", "int8")
    found = original.run(tokens, (30, 1, 9))
    state = load_file(folder / "model.safetensors")
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    matrices = {name: weight for name, weight in state.items() if name.split(".")[-2] in MATRICES and weight.ndim == 2}
    assert len(matrices) >= 7 * original.spec.num_layers
    state |= {name: dequantized(weight) for name, weight in matrices.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    rounded = chain(folder, "float32", "")
    norm, eps = rounded.lm_head.parts["norm"], rounded.lm_head.eps
    rounded.lm_head = lean.LeanHead(norm, dequantized(head), eps, "cpu", torch.float32)
    expected = rounded.run(tokens, (30, 1, 9))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.06), ("bfloat16", 0.08)])
def test_logits_are_close_to_float32(dtype: str, bound: float, tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    tokens = some_tokens(2, 30)
    expected = reference_logits(folder, tokens)
    found = chain(folder, dtype, "int8").run(tokens, (29, 1))
    assert 0 < (found - expected).abs().mean() / expected.abs().mean() < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_do_not_depend_on_what_runs_beside(dtype: str, tmp_path: Path) -> None:
    model = chain(write_tiny("qwen3", tmp_path), dtype, "int8")
    tokens = some_tokens(9, 12)
    together = model.run(tokens, (10, 1, 1))
    for count in (1, 2, 5):
        assert torch.equal(model.run(tokens[:count], (10, 1, 1)), together[:count])


def test_units_weigh_what_the_spec_says(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    model, plain = chain(folder, "bfloat16", "int8"), inspect_model(folder, dtype="bfloat16")
    assert tuple(layer.nbytes for layer in model.layers.values()) == model.spec.layer_bytes
    assert (model.lm_head.nbytes, model.embedding.nbytes) == (model.spec.lm_head_bytes, plain.embedding_bytes)
    assert 0.5 < model.spec.layer_bytes[0] / plain.layer_bytes[0] < 0.53


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_units_from_parts_are_equal_to_the_bit(dtype: str, tmp_path: Path) -> None:
    original = chain(write_tiny("llama_tied", tmp_path), dtype, "int8")
    there = UnitBuilder(original.spec, device="cpu")
    copies = {i: {name: part.clone() for name, part in layer.parts.items()} for i, layer in original.layers.items()}
    copy = Chain(
        original.spec,
        there.embedding(original.embedding.parts),
        {i: there.layer(i, parts) for i, parts in copies.items()},
        UnitBuilder(original.spec, device="cpu").lm_head(original.lm_head.parts),
    )
    tokens = some_tokens(2, 9)
    assert torch.equal(original.run(tokens, (8, 1)), copy.run(tokens, (8, 1)))
    assert [layer.nbytes for layer in original.layers.values()] == [layer.nbytes for layer in copy.layers.values()]


def test_the_form_tells_quantised_apart(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path)
    specs = [inspect_model(folder, dtype="bfloat16", quantize=quantize) for quantize in ("", "int8")]
    assert len({UnitBuilder(spec, device="cpu").form() for spec in specs}) == 2


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "llama")
    spec = inspect_model(folder, dtype="bfloat16", quantize="int8")
    with pytest.raises(ModelError, match="--quantize int8 is for the lean layers"):
        UnitBuilder(spec, device="cpu", implementation="transformers")
    with pytest.raises(ModelError, match="--quantize int8 needs a CPU whose kernels know bfloat16, not cuda:0"):
        UnitBuilder(spec, device="cuda:0")
    mixtral = inspect_model(write_tiny("mixtral", tmp_path / "mixtral"), dtype="bfloat16", quantize="int8")
    with pytest.raises(ModelError, match="MixtralForCausalLM is served by transformers' own"):
        UnitBuilder(mixtral, device="cpu")
    with pytest.raises(ModelError, match="'int4'; choose int8"):
        inspect_model(folder, dtype="bfloat16", quantize="int4")


@pytest.mark.parametrize("dtype", list(STORAGE_DTYPES))
def test_nothing_compiles_after_the_warm_up(dtype: torch.dtype, tmp_path: Path) -> None:
    from runtime.kernels import layer, paged, products

    lean.warm_up("cpu", dtype, "int8")
    dispatchers = [
        value for module in (layer, paged, products) for value in vars(module).values() if hasattr(value, "signatures")
    ]
    before = [list(dispatcher.signatures) for dispatcher in dispatchers]
    for kind in ("qwen2", "qwen3_sliding"):
        model = chain(write_tiny(kind, tmp_path / kind), str(dtype).removeprefix("torch."), "int8")
        assert torch.isfinite(model.run(some_tokens(3, 40), (38, 1, 1))).all()
    assert [list(dispatcher.signatures) for dispatcher in dispatchers] == before
