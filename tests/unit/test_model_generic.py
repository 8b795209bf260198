"""Units built from `transformers`' own modules give what the whole model gives, wherever it is split."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from runtime.model.checkpoint import ModelError
from runtime.model.config import inspect_model, load_transformers_config, open_weights
from runtime.model.generic import GenericModel
from tests.tiny_models import KINDS, NUM_LAYERS, write_tiny
from tests.unit.model_harness import Chain, assert_equal_logits, reference_logits

CHUNKS = (17, 1, 30, 1, 1, 5)
"""Prefill in uneven chunks with decode steps between; 55 tokens, past every window."""


def generic_chain(folder: Path, dtype: torch.dtype = torch.float32) -> Chain:
    config = load_transformers_config(folder)
    weights = open_weights(folder, config, load_format="safetensors")
    model = GenericModel(config, dtype=dtype, device="cpu")
    layers = {index: model.layer(index, weights) for index in range(config.num_hidden_layers)}
    spec = inspect_model(folder, dtype=str(dtype).removeprefix("torch."))
    return Chain(spec, model.embedding(weights), layers, model.lm_head(weights))


@pytest.mark.parametrize("kind", KINDS)
def test_units_equal_the_whole_model(kind: str, tmp_path: Path):
    folder = write_tiny(kind, tmp_path)
    tokens = torch.randint(3, 280, (2, sum(CHUNKS)), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(folder, tokens)
    found = generic_chain(folder).run(tokens, CHUNKS)
    assert_equal_logits(found, expected)


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
