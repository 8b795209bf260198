"""Reading one unit reads that unit and nothing else, from one file or from shards, and random weights are reproducible."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.model.checkpoint import DummyWeights, ModelError, SafetensorsWeights, Unit, Weights, unit_of
from tests.tiny_models import NUM_LAYERS, write_tiny


def read_unit(weights: Weights, unit: Unit, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: stored.whole() for name, stored in weights.stored(unit, dtype).items()}


UNITS = ["embedding", *range(NUM_LAYERS), "lm_head"]


def open_tiny(folder: Path, tied: bool = False) -> SafetensorsWeights:
    return SafetensorsWeights(folder, num_layers=NUM_LAYERS, tied_embeddings=tied)


@pytest.mark.parametrize("sharded", [False, True])
def test_every_tensor_arrives_in_its_unit(sharded: bool, tmp_path: Path):
    folder = write_tiny("qwen2", tmp_path, sharded=sharded)
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = open_tiny(folder)
    seen = 0
    for unit in UNITS:
        for name, tensor in read_unit(weights, unit).items():
            full = {"embedding": "model.embed_tokens.", "lm_head": "" if name.startswith("lm") else "model."}
            assert torch.equal(tensor, expected[full.get(unit, f"model.layers.{unit}.") + name])
            seen += 1
    assert seen == len(expected)


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    weights = open_tiny(write_tiny("llama", tmp_path))
    assert weights.bytes_read == 0
    for count, unit in enumerate([2, 3, "lm_head"], start=1):
        before = weights.bytes_read
        tensors = read_unit(weights, unit, torch.bfloat16)
        assert weights.bytes_read - before == sum(4 * tensor.numel() for tensor in tensors.values())
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}, count
    before, head = weights.bytes_read, weights.stored("lm_head", torch.float32)
    assert weights.bytes_read == before, "known is not read"
    head["norm.weight"].whole()
    assert weights.bytes_read - before == 4 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 64, 1000])
def test_blocks_are_the_whole_in_order(num_rows: int, dtype: torch.dtype, tmp_path: Path):
    tiny, drawn = open_tiny(write_tiny("llama", tmp_path)), DummyWeights(SHAPES, std=0.02, tied_embeddings=False)
    for weights, unit in ((tiny, 1), (drawn, "embedding")):
        for name, stored in weights.stored(unit, dtype).items():
            blocks = [block.clone() for block in stored.blocks(num_rows)]
            assert {len(block) for block in blocks[:-1]} <= {num_rows}, name
            assert torch.equal(torch.cat(blocks), stored.whole()), name
            assert stored.whole().dtype == stored.dtype == dtype


def test_a_tied_head_takes_the_embeddings_weight(tmp_path: Path):
    weights = open_tiny(write_tiny("llama_tied", tmp_path), tied=True)
    assert torch.equal(
        read_unit(weights, "lm_head")["lm_head.weight"],
        read_unit(weights, "embedding")["weight"],
    )
    with pytest.raises(ModelError, match=r"no lm_head\.weight and the config does not tie it"):
        open_tiny(tmp_path, tied=False)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_with_and_without_the_models_prefix(prefix: str):
    assert unit_of(f"{prefix}layers.12.self_attn.q_proj.weight") == (12, "self_attn.q_proj.weight")
    assert unit_of(f"{prefix}embed_tokens.weight") == ("embedding", "weight")
    assert unit_of(f"{prefix}norm.weight") == ("lm_head", "norm.weight")
    assert unit_of(f"{prefix}layers.0.self_attn.rotary_emb.inv_freq") is None
    assert unit_of(f"{prefix}vision_tower.layers.0.weight") is None


def test_weights_that_are_no_floats_are_an_error(tmp_path: Path):
    tensors = load_file(write_tiny("llama", tmp_path) / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="weights of dtype I8"):
        read_unit(open_tiny(tmp_path), 1)


def test_a_file_that_vanishes_is_an_error(tmp_path: Path):
    weights = open_tiny(write_tiny("llama", tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors"):
        read_unit(weights, 0)


def test_the_peak_is_one_unit(tmp_path: Path):
    """In a process of its own: reading 8 layers of 32 MB one by one, keeping 2, never holds more than 3 of them."""
    layer_bytes = 32 << 20
    tensors = {f"model.layers.{i}.w{part}.weight": torch.ones(2048, 1024) for i in range(8) for part in range(4)}
    tensors |= {"model.embed_tokens.weight": torch.ones(8, 8), "model.norm.weight": torch.ones(8)}
    save_file({**tensors, "lm_head.weight": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    code = f"""
import torch
from pathlib import Path
from runtime.model.checkpoint import SafetensorsWeights
weights = SafetensorsWeights(Path({str(tmp_path)!r}), num_layers=8, tied_embeddings=False)
torch.ones(1 << 20)
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before, kept = peak(), []
for layer in range(8):
    unit = {{name: stored.whole() for name, stored in weights.stored(layer, torch.float32).items()}}
    if layer in (3, 4):
        kept.append(unit)
    del unit
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert 2 * layer_bytes <= int(done.stdout) <= 3.25 * layer_bytes


SHAPES = {
    "embedding": {"weight": (300, 64)},
    0: {"mlp.up_proj.weight": (2048, 1024), "input_layernorm.weight": (64,), "self_attn.q_proj.bias": (64,)},
    1: {"mlp.up_proj.weight": (2048, 1024)},
    "lm_head": {"norm.weight": (64,), "lm_head.weight": (300, 64)},
}


def test_random_weights_depend_on_seed_and_name_alone():
    def read(seed: int, order: list) -> dict:
        weights = DummyWeights(SHAPES, std=0.02, tied_embeddings=False, seed=seed)
        return {(unit, name): tensor for unit in order for name, tensor in read_unit(weights, unit).items()}

    forward, backward, other = read(0, list(SHAPES)), read(0, list(SHAPES)[::-1]), read(1, list(SHAPES))
    assert all(torch.equal(tensor, backward[key]) for key, tensor in forward.items())
    key = (0, "mlp.up_proj.weight")
    assert not torch.equal(forward[key], other[key])
    assert not torch.equal(forward[key], forward[1, "mlp.up_proj.weight"])
    assert forward[key].unique(dim=0).shape == forward[key].shape  # no two rows are alike, though numbers repeat
    assert abs(float(forward[key].std()) - 0.02) < 0.001
    assert torch.equal(forward[0, "input_layernorm.weight"], torch.ones(64))
    assert torch.equal(forward[0, "self_attn.q_proj.bias"], torch.zeros(64))


def test_random_ends_are_one_when_tied():
    weights = DummyWeights(SHAPES, std=0.02, tied_embeddings=True)
    embedding, head = read_unit(weights, "embedding"), read_unit(weights, "lm_head")
    assert torch.equal(embedding["weight"], head["lm_head.weight"])
