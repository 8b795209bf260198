"""What a folder says about its model, and every way in which it can be refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from runtime.model.config import ModelError, inspect_model, load_config, load_transformers_config
from runtime.model.plain_config import PlainConfig
from tests.tiny_models import KINDS, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def write_config(folder: Path, config: Any, architecture: str) -> Path:
    config.architectures = [architecture]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_parameters(kind: str, dtype: str, tmp_path: Path):
    folder = write_tiny(kind, tmp_path)
    spec = inspect_model(folder, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    size = model.dtype.itemsize
    for layer, module in enumerate(model.model.layers):
        assert spec.layer_bytes[layer] == size * sum(parameter.numel() for parameter in module.parameters())
    assert spec.embedding_bytes == size * model.model.embed_tokens.weight.numel()
    assert spec.lm_head_bytes == size * (model.lm_head.weight.numel() + model.model.norm.weight.numel())
    assert spec.lm_head_flops_per_token == 2 * model.lm_head.weight.numel()
    assert spec.architecture == type(model).__name__
    assert (spec.num_layers, spec.vocab_size) == (len(model.model.layers), model.lm_head.out_features)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.hidden_size) == (4, 2, 16, 64)
    assert spec.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_alone_gives_the_same_spec(kind: str, tmp_path: Path):
    real = write_tiny(kind, tmp_path / "real")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(real / "config.json", bare)
    with_weights = inspect_model(real, dtype="bfloat16", name="m")
    without = inspect_model(bare, dtype="bfloat16", load_format="dummy", name="m")
    for field in with_weights.__struct_fields__:
        if field not in ("folder", "load_format"):
            assert getattr(with_weights, field) == getattr(without, field), field


def test_only_chosen_experts_cost_time(tmp_path: Path):
    dense = inspect_model(write_tiny("mixtral", tmp_path), dtype="float32")
    attention, router, expert = 2 * 64 * 64 + 2 * 64 * 32, 4 * 64, 3 * 64 * 128
    assert dense.layer_flops_per_token[0] == 2 * (attention + router + 2 * expert)
    assert dense.layer_bytes[0] == 4 * (attention + router + 4 * expert + 2 * 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_auto_keeps_the_dtype_of_the_checkpoint(dtype: str, tmp_path: Path):
    folder = write_tiny("llama", tmp_path, dtype=dtype)
    assert inspect_model(folder, dtype="auto").dtype == dtype
    change_config(folder, dtype=None)
    assert inspect_model(folder, dtype="auto").dtype == dtype


def test_end_tokens_of_both_files_count_once(folder: Path):
    change_config(folder, eos_token_id=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert inspect_model(folder, dtype="auto").eos_token_ids == (7, 2)
    (folder / "generation_config.json").unlink()
    assert inspect_model(folder, dtype="auto").eos_token_ids == (2,)
    change_config(folder, eos_token_id=None)
    assert inspect_model(folder, dtype="auto").eos_token_ids == ()


def test_the_context_can_be_lowered_not_raised(folder: Path):
    assert inspect_model(folder, dtype="auto").max_context == 512
    assert inspect_model(folder, dtype="auto", max_context=100).max_context == 100
    for wrong in (513, 0, -1):
        with pytest.raises(ModelError, match=f"context of {wrong} tokens .* takes 1 to 512"):
            inspect_model(folder, dtype="auto", max_context=wrong)


def test_yarn_stretches_the_original_context(folder: Path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    change_config(folder, rope_parameters=yarn)
    assert inspect_model(folder, dtype="auto").max_context == 2048


@pytest.mark.parametrize(("kind", "window"), [("mistral_sliding", 24), ("mistral", None), ("qwen2_sliding", None)])
def test_a_window_is_told_when_every_layer_has_it(kind: str, window: int | None, tmp_path: Path):
    assert inspect_model(write_tiny(kind, tmp_path), dtype="auto").sliding_window == window


def test_the_name_is_the_folders_unless_given(folder: Path):
    assert inspect_model(folder, dtype="auto").name == "model"
    assert inspect_model(folder, dtype="auto", name="other").name == "other"


def refused(folder: Path, match: str, **arguments: Any) -> None:
    with pytest.raises(ModelError, match=match):
        inspect_model(folder, **{"dtype": "auto", **arguments})


def test_folders_that_are_no_model(tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(tmp_path, r"holds no config\.json")
    (tmp_path / "config.json").write_text("{not json")
    refused(tmp_path, r"cannot read .*config\.json")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "holds no JSON object")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, r"transformers cannot read .*config\.json")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    refused(tmp_path, "model type no_such_model")


def test_wrong_wishes(folder: Path):
    refused(folder, "dtype 'int4' cannot be served; choose auto, float32, bfloat16, float16", dtype="int4")
    refused(folder, "load format 'gguf' is unknown", load_format="gguf")


def test_weights_missing_or_damaged(folder: Path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    refused(folder, "is cut short: its tensors end at byte")
    weights.write_bytes(b"\xff" * 100)
    refused(folder, "is not a safetensors file")
    weights.write_bytes(b"")
    refused(folder, "is not a safetensors file")
    weights.unlink()
    refused(folder, "holds no weights.*--load-format dummy")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(folder, r"holds pytorch_model\.bin but no safetensors")


def test_layers_missing(folder: Path):
    refused(change_config(folder, num_hidden_layers=5), "hold no tensor of layer 4")


def test_shards_missing(tmp_path: Path):
    folder = write_tiny("llama", tmp_path, sharded=True)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = sorted(folder.glob("*.safetensors"))[-1]
    with safe_open(last, "pt") as opened:
        inside = sorted(opened.keys())[0]
    content["weight_map"]["model.layers.0.not_there.weight"] = last.name
    index.write_text(json.dumps(content))
    refused(folder, r"lacks the tensor model\.layers\.0\.not_there\.weight")
    last.unlink()
    refused(folder, f"lacks 1 of the .* shards .*{last.name}")
    del content["weight_map"][inside]
    index.write_text("{}")
    refused(folder, "is not a safetensors index")


def test_models_that_are_refused_by_name(folder: Path, tmp_path: Path):
    t5 = write_config(tmp_path / "t5", transformers.T5Config(), "T5ForConditionalGeneration")
    refused(t5, "T5ForConditionalGeneration cannot be served: it is an encoder-decoder")
    mamba = write_config(tmp_path / "mamba", transformers.MambaConfig(), "MambaForCausalLM")
    refused(mamba, "MambaForCausalLM cannot be served: its config has no num_attention_heads")
    bert = write_config(tmp_path / "bert", transformers.BertConfig(), "BertForMaskedLM")
    refused(bert, "BertForMaskedLM .*cannot be served: it is not a decoder-only")
    classifier = write_config(tmp_path / "classifier", transformers.LlamaConfig(), "LlamaForSequenceClassification")
    refused(classifier, "LlamaForSequenceClassification .*cannot be served")
    gpt2 = write_config(tmp_path / "gpt2", transformers.GPT2Config(), "GPT2LMHeadModel")
    refused(gpt2, "GPT2LMHeadModel cannot be served: it is not a chain")
    gemma3 = write_config(tmp_path / "gemma3", transformers.Gemma3Config(), "Gemma3ForConditionalGeneration")
    refused(gemma3, "Gemma3ForConditionalGeneration cannot be served: it is a multimodal model")
    hybrid = write_config(tmp_path / "next", transformers.Qwen3NextConfig(), "Qwen3NextForCausalLM")
    refused(hybrid, "layers of type linear_attention")
    quantised = change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(quantised, r"LlamaForCausalLM cannot be served: its weights are quantised \(gptq\)")


def test_longrope_ends_where_its_tables_change(folder: Path):
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    change_config(folder, rope_parameters={**longrope, "original_max_position_embeddings": 256})
    assert inspect_model(folder, dtype="auto").max_context == 256
    refused(folder, "context of 257 tokens .* takes 1 to 256", max_context=257)


def test_unknown_rotary_tables_are_refused(folder: Path):
    change_config(folder, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4})
    refused(folder, "rope scaling 'proportional'")


def test_other_architectures_must_prove_themselves(tmp_path: Path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    granite = transformers.GraniteConfig(
        **shape, num_key_value_heads=2, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5
    )
    folder = write_config(tmp_path / "granite", granite, "GraniteForCausalLM")
    assert inspect_model(folder, dtype="auto", load_format="dummy").architecture == "GraniteForCausalLM"
    sinks = transformers.GptOssConfig(**shape, num_key_value_heads=2, head_dim=16, num_local_experts=4)
    refused(
        write_config(tmp_path / "sinks", sinks, "GptOssForCausalLM"),
        "GptOssForCausalLM cannot be served: .* passes s_aux",
        load_format="dummy",
    )


def test_phi3_of_real_shape_proves_itself_up_to_its_original_length(tmp_path: Path):
    longrope = {"rope_type": "longrope", "short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [4.0] * 48}
    phi3 = transformers.Phi3Config(
        num_hidden_layers=3,
        rope_parameters={**longrope, "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        sliding_window=262144,
    )
    spec = inspect_model(write_config(tmp_path, phi3, "Phi3ForCausalLM"), dtype="bfloat16", load_format="dummy")
    assert (spec.max_context, spec.head_dim, spec.vocab_size) == (4096, 96, 32064)


def test_a_proof_that_fails_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The comparison is a real one: break what happens between the layers, and it must notice."""
    import runtime.model.generic as generic

    granite = transformers.GraniteConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, embedding_multiplier=3.0
    )
    folder = write_config(tmp_path, granite, "GraniteForCausalLM")
    original = generic.GenericEmbedding.__init__
    monkeypatch.setattr(generic.GenericEmbedding, "__init__", lambda self, module, _: original(self, module, 1.0))
    refused(folder, "GraniteForCausalLM cannot be served: run layer by layer, .* differs", load_format="dummy")


PLAIN = ["llama", "llama_tied", "llama_bias", "qwen2", "qwen3", "mistral", "mistral_sliding"]
OLD_STYLE = {
    "rope_parameters": None,
    "rope_theta": 5000.0,
    "rope_scaling": None,
    "dtype": None,
    "torch_dtype": "float16",
}


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("changes", [{}, OLD_STYLE, {"head_dim": 8}, {"eos_token_id": [2, 0]}])
def test_a_plain_reading_is_what_transformers_reads(kind: str, changes: dict[str, Any], tmp_path: Path):
    folder = change_config(write_tiny(kind, tmp_path), **changes)
    raw = json.loads((folder / "config.json").read_text())
    change_config(folder, sliding_window=raw.get("sliding_window"))
    plain, expected = load_config(folder), load_transformers_config(folder)
    assert isinstance(plain, PlainConfig)
    for field in PlainConfig.__dataclass_fields__:
        found, wanted = getattr(plain, field), getattr(expected, field, None)
        if field == "dtype":
            assert f"torch.{found}" == str(wanted)
        elif field == "layer_types" and wanted is not None and set(wanted) == {"full_attention"}:
            assert found in (None, wanted)
        else:
            assert found == wanted or not (found or wanted), field


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(PLAIN)))
def test_what_is_not_plain_is_left_to_transformers(kind: str, tmp_path: Path):
    assert not isinstance(load_config(write_tiny(kind, tmp_path)), PlainConfig)


def test_a_field_left_to_a_default_is_not_guessed(tmp_path: Path):
    folder = write_tiny("qwen3", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    for field in (
        "head_dim",
        "rms_norm_eps",
        "num_key_value_heads",
        "use_sliding_window",
        "tie_word_embeddings",
        "rope_parameters",
    ):
        (folder / "config.json").write_text(json.dumps({name: raw[name] for name in raw if name != field}))
        assert not isinstance(load_config(folder), PlainConfig), field
