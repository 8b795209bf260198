"""The builder's units, whichever implementation it picks, give what `transformers` gives, and hold what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import pages
from runtime.model import builder as builder_module
from runtime.model.builder import UnitBuilder
from runtime.model.config import ModelError, inspect_model
from tests.tiny_models import KINDS, write_tiny
from tests.unit.model_harness import Chain, assert_equal_logits, reference_logits

LEAN = ["llama", "llama_tied", "llama_rope_scaled", "qwen2_sliding", "qwen3", "mistral_sliding"]


def built_chain(folder: Path, dtype: str = "float32", load_format: str = "safetensors", **arguments: Any) -> Chain:
    spec = inspect_model(folder, dtype=dtype, load_format=load_format)
    builder = UnitBuilder(spec, device="cpu", **arguments)
    return Chain(spec, builder.embedding(), {i: builder.layer(i) for i in range(spec.num_layers)}, builder.lm_head())


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that has no kernels of ours: weights of `transformers`' layers are not packed."""
    monkeypatch.setattr(builder_module, "has_kernels", lambda device, dtype: False)


def some_tokens(length: int) -> torch.Tensor:
    return torch.randint(3, 280, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("kind", KINDS)
def test_the_automatic_choice_equals_transformers(kind: str, tmp_path: Path):
    folder = write_tiny(kind, tmp_path)
    tokens = some_tokens(50)
    found = built_chain(folder, implementation="auto").run(tokens, (19, 1, 29, 1))
    assert_equal_logits(found, reference_logits(folder, tokens))


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["lean", "transformers"])
def test_half_precision_is_close_to_float32(implementation: str, dtype: str, tmp_path: Path):
    folder = write_tiny("llama", tmp_path)
    tokens = some_tokens(30)
    expected = reference_logits(folder, tokens)
    found = built_chain(folder, dtype, implementation=implementation).run(tokens, (29, 1))
    assert found.dtype == torch.float32
    error = (found - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < (0.06 if dtype == "bfloat16" else 0.01)


@pytest.mark.parametrize("kind", LEAN)
def test_lean_is_chosen_where_it_can(kind: str, tmp_path: Path):
    spec = inspect_model(write_tiny(kind, tmp_path), dtype="float32")
    assert UnitBuilder(spec, device="cpu", implementation="auto").implementation == "lean"
    assert UnitBuilder(spec, device="cpu", implementation="transformers").implementation == "transformers"


@pytest.mark.parametrize(
    ("kind", "load_format", "quantize"),
    [("mixtral", "safetensors", ""), ("llama", "safetensors", ""), ("llama", "dummy", ""), ("llama", "dummy", "int8")],
)
def test_it_rests_while_it_builds(kind: str, load_format: str, quantize: str, tmp_path: Path):
    """Random weights are drawn without a rest, so there it is the packing that is seen."""
    folder = write_tiny(kind, tmp_path)
    spec = inspect_model(folder, dtype="bfloat16", load_format=load_format, quantize=quantize)
    builder = UnitBuilder(spec, device="cpu")
    rests: list[None] = []
    builder.rest = lambda: rests.append(None)
    builder.layer(0)
    assert len(rests) >= 4, "not even once for each matrix"
    in_layer = len(rests)
    builder.lm_head()
    assert len(rests) > in_layer
    if load_format == "safetensors":
        before = len(rests)
        builder.embedding()
        assert len(rests) > before


def test_lean_is_refused_where_it_cannot(tmp_path: Path):
    spec = inspect_model(write_tiny("mixtral", tmp_path), dtype="float32")
    assert UnitBuilder(spec, device="cpu", implementation="auto").implementation == "transformers"
    with pytest.raises(ModelError, match="lean implementation does not support MixtralForCausalLM"):
        UnitBuilder(spec, device="cpu", implementation="lean")


def test_workers_with_and_without_packed_weights_do_not_exchange_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = inspect_model(write_tiny("mixtral", tmp_path), dtype="float32")
    packed = UnitBuilder(spec, device="cpu").form()
    monkeypatch.setattr(builder_module, "has_kernels", lambda device, dtype: False)
    assert UnitBuilder(spec, device="cpu").form() != packed


def test_parts_that_came_one_by_one_lie_together_in_the_layer(tmp_path: Path):
    """As weights from a peer on another host do; those of one on this host lie together already."""
    folder = write_tiny("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
    (folder / "config.json").write_text(json.dumps(config))
    spec = inspect_model(folder, dtype="float32", load_format="dummy")
    builder = UnitBuilder(spec, device="cpu")
    first = builder.layer(1)
    if pages.lend(first.parts["down"]) is None:
        pytest.skip("there are no files in memory here")
    arrived = {name: pages.empty(tuple(part.shape), part.dtype).copy_(part) for name, part in first.parts.items()}
    second = builder.layer(1, arrived)
    large = [name for name, part in first.parts.items() if part.nbytes >= pages.OWN_PAGES_BYTES]
    assert len(large) == 4
    for layer in (first, second):
        assert len({pages.lend(layer.parts[name]).file for name in large}) == 1  # type: ignore[union-attr]
    third = builder.layer(1, second.parts)
    assert all(third.parts[name].data_ptr() == second.parts[name].data_ptr() for name in large)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("kind", KINDS)
def test_units_weigh_what_the_spec_says(kind: str, tmp_path: Path):
    chain = built_chain(write_tiny(kind, tmp_path), "bfloat16", implementation="transformers")
    assert tuple(chain.layers[layer].nbytes for layer in chain.layers) == chain.spec.layer_bytes
    assert (chain.lm_head.nbytes, chain.embedding.nbytes) == (chain.spec.lm_head_bytes, chain.spec.embedding_bytes)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("head_first", [False, True])
def test_tied_ends_share_one_tensor(head_first: bool, tmp_path: Path):
    spec = inspect_model(write_tiny("llama_tied", tmp_path), dtype="float32")
    builder = UnitBuilder(spec, device="cpu", implementation="transformers")
    first = builder.lm_head() if head_first else builder.embedding()
    second = builder.embedding() if head_first else builder.lm_head()
    assert first.weight.data_ptr() == second.weight.data_ptr()  # type: ignore[attr-defined]


def test_a_tied_end_that_is_gone_is_read_again(tmp_path: Path):
    folder = write_tiny("llama_tied", tmp_path)
    chain = built_chain(folder, implementation="transformers")
    expected = chain.run(some_tokens(5), (5,))
    builder = UnitBuilder(chain.spec, device="cpu", implementation="transformers")
    builder.embedding()  # not kept
    chain.lm_head = builder.lm_head()
    assert torch.equal(chain.run(some_tokens(5), (5,)), expected)


@pytest.mark.usefixtures("unpacked")
def test_untied_ends_are_two_tensors(tmp_path: Path):
    chain = built_chain(write_tiny("llama", tmp_path), implementation="transformers")
    assert chain.embedding.weight.data_ptr() != chain.lm_head.weight.data_ptr()
    assert not torch.equal(chain.embedding.weight, chain.lm_head.weight)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen3_moe", "gemma3"])
def test_random_weights_run_and_do_not_depend_on_the_split(kind: str, tmp_path: Path):
    config = write_tiny(kind, tmp_path) / "config.json"
    (tmp_path / "model.safetensors").unlink()
    assert config.is_file()
    arguments: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "implementation": "transformers"}
    whole, half, other = (built_chain(tmp_path, seed=seed, **arguments) for seed in (7, 7, 8))
    expected = whole.run(some_tokens(20), (20,))
    assert torch.isfinite(expected).all()
    assert float(expected.std()) > 0
    whole.layers[2], whole.layers[3], whole.lm_head = half.layers[2], half.layers[3], half.lm_head
    assert torch.equal(whole.run(some_tokens(20), (20,)), expected)
    assert not torch.equal(other.run(some_tokens(20), (20,)), expected)
