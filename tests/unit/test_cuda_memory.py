"""What a device's page pool leaves free, and what is left of it."""

import msgspec
import pytest

from runtime.cuda.memory import ARRIVING_LAYERS, kv_budget, reserve_for
from runtime.cuda.spans import make_buckets
from runtime.model.spec import ModelSpec

GIB = 1 << 30
LLAMA_8B = ModelSpec(
    name="llama-3-8b",
    folder="",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    load_format="dummy",
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_context=8192,
    tied_embeddings=False,
    layer_bytes=(436_224_000,) * 32,
    embedding_bytes=1_050_673_152,
    lm_head_bytes=1_050_673_152,
    layer_flops_per_token=(436_207_616,) * 32,
    lm_head_flops_per_token=1_050_673_152,
    eos_token_ids=(2,),
)


def test_two_layers_can_always_arrive():
    buckets = make_buckets(64, 8192, 256)
    reserve = reserve_for(LLAMA_8B, buckets, 256)
    assert reserve.arriving == ARRIVING_LAYERS * 436_224_000
    assert GIB < reserve.total < 5 * GIB, "a plausible part of a large device"
    assert reserve_for(LLAMA_8B, None, 256).total == reserve.total - reserve.graphs


def test_what_attention_copies_is_counted():
    plain = reserve_for(LLAMA_8B, make_buckets(64, 8192, 16), 16)
    gathered = reserve_for(LLAMA_8B, make_buckets(64, 8192, 16, most_positions=1 << 16), 16)
    assert gathered.graphs - plain.graphs >= 2 * (1 << 16) * LLAMA_8B.kv_bytes_per_token_layer() - plain.graphs


def test_float32_takes_more_room_than_half_of_it():
    wide = msgspec.structs.replace(LLAMA_8B, dtype="float32", layer_bytes=(872_448_000,) * 32)
    assert reserve_for(wide, None, 256).activations == 2 * reserve_for(LLAMA_8B, None, 256).activations


@pytest.mark.parametrize("free", [60 * GIB, 12 * GIB, GIB, 0])
def test_the_pool_and_the_reserve_fit_into_what_is_free(free):
    reserve = reserve_for(LLAMA_8B, make_buckets(64, 8192, 256), 256)
    budget = kv_budget(free, reserve)
    assert budget == max(0, free - reserve.total)
    assert budget + reserve.total <= max(free, reserve.total)
