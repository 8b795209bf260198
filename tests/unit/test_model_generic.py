"""Units built from `transformers`' own modules give what the whole model gives, wherever it is split."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from runtime.model import packed_linear
from runtime.model.checkpoint import ModelError
from runtime.model.config import inspect_model, load_transformers_config, open_weights
from runtime.model.generic import GenericModel
from runtime.model.packed_linear import PackedLinear
from tests.tiny_models import KINDS, NUM_LAYERS, write_tiny
from tests.unit.model_harness import Chain, assert_equal_logits, reference_logits

CHUNKS = (17, 1, 30, 1, 1, 5)
"""Prefill in uneven chunks with decode steps between; 55 tokens, past every window."""


def generic_chain(folder: Path, dtype: torch.dtype = torch.float32, *, packs: bool = False) -> Chain:
    config = load_transformers_config(folder)
    weights = open_weights(folder, config, load_format="safetensors")
    model = GenericModel(config, dtype=dtype, device="cpu", packs=packs)
    layers = {index: model.layer(index, weights) for index in range(config.num_hidden_layers)}
    spec = inspect_model(folder, dtype=str(dtype).removeprefix("torch."))
    return Chain(spec, model.embedding(weights), layers, model.lm_head(weights))


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_units_equal_the_whole_model(kind: str, packs: bool, tmp_path: Path):
    folder = write_tiny(kind, tmp_path)
    tokens = torch.randint(3, 280, (2, sum(CHUNKS)), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(folder, tokens)
    chain = generic_chain(folder, packs=packs)
    found = chain.run(tokens, CHUNKS)
    assert_equal_logits(found, expected)
    linears = [
        module for layer in chain.layers.values() for module in layer.module.modules() if type(module) is nn.Linear
    ]
    assert bool(linears) != packs, "a packed layer has no other copy of its weights"


@pytest.mark.parametrize("kind", ["gemma3", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_equal_unit_is_made_of_packed_parts(kind: str, dtype: torch.dtype, tmp_path: Path):
    folder = write_tiny(kind, tmp_path)
    config = load_transformers_config(folder)
    weights = open_weights(folder, config, load_format="safetensors")
    model = GenericModel(config, dtype=dtype, device="cpu", packs=True)
    first = generic_chain(folder, dtype, packs=True)
    again = {index: model.layer(index, weights, first.layers[index].parts) for index in first.layers}
    for index, layer in again.items():
        for name, part in first.layers[index].parts.items():
            assert layer.parts[name].data_ptr() == part.data_ptr(), "what a peer lends is not packed or copied again"
    head = model.lm_head(weights, first.lm_head.parts)
    assert head.weight is None, "there is nothing for an embedding to share"
    tokens = torch.randint(3, 280, (2, 20), generator=torch.Generator().manual_seed(2))
    second = Chain(first.spec, first.embedding, again, head)
    assert torch.equal(first.run(tokens, (20,)), second.run(tokens, (20,)))


def test_a_row_of_a_packed_layer_does_not_depend_on_the_others(tmp_path: Path):
    chain = generic_chain(write_tiny("gemma3", tmp_path), torch.bfloat16, packs=True)
    (linear, *_) = (m for m in chain.layers[0].module.modules() if isinstance(m, PackedLinear))
    x = torch.randn(300, linear.in_features, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = linear(x[None])
    assert whole.shape == (1, 300, linear.out_features)
    assert torch.equal(whole[0, 7:8], linear(x[7:8]))
    assert torch.equal(whole[0, 190:196], linear(x[190:196]))


@pytest.mark.parametrize("shape", [(6, 70), (64, 64), (2, 1)])
def test_a_packed_linear_is_a_linear(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(4)
    for bias in (False, True):
        linear = nn.Linear(*shape, bias=bias)
        module = nn.Sequential(linear)
        state = {
            name: packed_linear.pack_flat(p.detach(), lambda: None) if p.ndim == 2 else p
            for name, p in module.state_dict().items()
        }
        packed_linear.replace(module, packed_linear.packable(module))
        module.load_state_dict(state, assign=True)
        packed_linear.bind(module)
        x = torch.randn(3, 5, shape[0], generator=generator)
        torch.testing.assert_close(module(x.transpose(0, 1)), linear(x.transpose(0, 1)))


def test_a_packed_linear_refuses_what_its_kernel_would_misread():
    """Rows of another type would be read with strides that are not the weight's."""
    module = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16))
    state = {
        name: packed_linear.pack_flat(p, lambda: None) if p.ndim == 2 else p for name, p in module.state_dict().items()
    }
    packed_linear.replace(module, packed_linear.packable(module))
    module.load_state_dict(state, assign=True)
    packed_linear.bind(module)
    with pytest.raises(ValueError, match=r"4 inputs in torch.bfloat16 got \[2, 4\] in torch.float32"):
        module(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"got \[2, 8\]"):
        module(torch.zeros(2, 8, dtype=torch.bfloat16))


def test_what_is_not_a_plain_linear_layer_stays():
    class Own(nn.Linear):
        pass

    module = nn.ModuleDict(
        {"odd": nn.Linear(3, 4), "own": Own(4, 4), "plain": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    )
    assert list(packed_linear.packable(module)) == ["plain"]


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gemma3"])
@pytest.mark.parametrize("cut", range(NUM_LAYERS + 1))
def test_a_split_anywhere_changes_nothing(kind: str, cut: int, tmp_path: Path):
    folder = write_tiny(kind, tmp_path)
    tokens = torch.randint(3, 280, (2, 40), generator=torch.Generator().manual_seed(2))
    whole = generic_chain(folder).run(tokens, (40,))
    first, second = generic_chain(folder), generic_chain(folder)
    for layer in range(cut, NUM_LAYERS):
        first.layers[layer] = second.layers[layer]
    first.lm_head = second.lm_head
    assert torch.equal(first.run(tokens, (40,)), whole)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_sharded_equals_unsharded(kind: str, tmp_path: Path):
    one, many = write_tiny(kind, tmp_path / "one"), write_tiny(kind, tmp_path / "many", sharded=True)
    assert len(list(many.glob("*.safetensors"))) > 2
    tokens = torch.randint(3, 280, (1, 9), generator=torch.Generator().manual_seed(3))
    assert torch.equal(generic_chain(one).run(tokens, (9,)), generic_chain(many).run(tokens, (9,)))


def test_a_layer_that_does_not_fit_the_config_is_an_error(tmp_path: Path):
    folder = write_tiny("llama", tmp_path)
    config = load_transformers_config(folder)
    weights = open_weights(folder, config, load_format="safetensors")
    config.intermediate_size *= 2
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj\.weight of layer 0 has shape"):
        GenericModel(config, dtype=torch.float32, device="cpu").layer(0, weights)
    config.attention_bias = True
    with pytest.raises(ModelError, match=r"layer 0 lack self_attn\.k_proj\.bias"):
        GenericModel(config, dtype=torch.float32, device="cpu").layer(0, weights)


def test_heads_that_do_not_fit_the_pages_never_reach_the_kernels(tmp_path: Path):
    chain = generic_chain(write_tiny("llama", tmp_path))
    for field in ("num_kv_heads", "head_dim"):
        wrong = replace(chain.spec, **{field: getattr(chain.spec, field) // 2})
        with pytest.raises(ModelError, match=r"LlamaAttention attends with .* does not fit KV pages"):
            Chain(wrong, chain.embedding, chain.layers, chain.lm_head).run(torch.ones(1, 4, dtype=torch.int64), (4,))
