"""What a model folder says about itself: shapes, sizes, end-of-sequence tokens, and whether it can be served at all.

Only JSON is read: ``config.json``, ``generation_config.json`` and the headers of the safetensors files. No weight is
touched, and for the tested architectures with real weights no model code of `transformers` is imported, for the
commonest not even its configs. Random weights have no headers, so their shapes come from the model's skeleton on the
meta device.

An architecture that is not in `TESTED` is served only after `runtime.model.proof` has shown, on a tiny model of the
same kind, that running it unit by unit gives what `transformers` gives.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.model.checkpoint import DummyWeights, ModelError, SafetensorsWeights, Unit, Weights
from runtime.model.plain_config import read_plain
from runtime.model.rules import refuse_unservable, trained_context
from runtime.model.spec import ModelSpec

__all__ = ["DTYPES", "TESTED", "ModelError", "inspect_model", "load_config", "load_transformers_config", "open_weights"]

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The dtypes that can be served, with the bytes of an element."""

LOAD_FORMATS = ("safetensors", "dummy")
QUANTIZE = ("", "int8")

TESTED = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""Model types, and the architectures they mean, whose output is compared with `transformers` in the tests."""

_NO_POSITION_LIMIT = 2**31 - 1


def inspect_model(
    folder: str | Path,
    *,
    dtype: str,
    load_format: str = "safetensors",
    max_context: int | None = None,
    name: str | None = None,
    quantize: str = "",
) -> ModelSpec:
    """Read what the head must know of a model.

    `dtype` is "float32", "bfloat16", "float16" or "auto", which keeps the checkpoint's. With ``load_format="dummy"`` the
    folder needs nothing but a ``config.json``. `max_context` lowers the longest sequence, in tokens; it never raises it.
    The LM head's bytes count its weight also when it is tied to the embedding: that is what a worker needs that holds
    the head but not the embedding. `quantize` is "" or "int8"; the embedding never is. `sliding_window` is set only when every layer slides.

    Raises:
        ModelError: the folder is incomplete, or the model cannot be served.
    """
    folder = Path(folder).expanduser()
    if load_format not in LOAD_FORMATS:
        raise ModelError(f"load format {load_format!r} is unknown; known are {', '.join(LOAD_FORMATS)}")
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} cannot be served; choose auto, {', '.join(DTYPES)}")
    if quantize not in QUANTIZE:
        raise ModelError(f"weights cannot be quantised as {quantize!r}; choose int8, or leave --quantize out")
    config = load_config(folder)
    architecture = _architecture(config)
    weights = open_weights(folder, config, load_format=load_format)
    if dtype == "auto":
        dtype = _own_dtype(config, weights)
    units = ("embedding", "lm_head", *range(config.num_hidden_layers))
    sizes = {unit: _num_bytes(weights, unit, DTYPES[dtype], "" if unit == "embedding" else quantize) for unit in units}
    return ModelSpec(
        name=name or folder.resolve().name,
        folder=str(folder.resolve()),
        architecture=architecture,
        dtype=dtype,
        load_format=load_format,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=_num_kv_heads(config),
        head_dim=_head_dim(config),
        vocab_size=config.vocab_size,
        max_context=_max_context(config, max_context),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        layer_bytes=tuple(sizes[layer] for layer in range(config.num_hidden_layers)),
        embedding_bytes=sizes["embedding"],
        lm_head_bytes=sizes["lm_head"],
        layer_flops_per_token=tuple(_flops(config, weights, layer) for layer in range(config.num_hidden_layers)),
        lm_head_flops_per_token=_flops(config, weights, "lm_head"),
        eos_token_ids=_eos_token_ids(config, folder),
        sliding_window=_sliding_window(config),
        layer_windows=_layer_windows(config),
        num_experts=_num_experts(config),
        experts_per_token=_experts_per_token(config),
        layer_expert_bytes=tuple(
            DTYPES[dtype] * _expert_elements(weights, layer) for layer in range(config.num_hidden_layers)
        ),
        quantize=quantize,
    )


def load_config(folder: Path) -> Any:
    """The config of a folder: read plainly where that is exact, else the `transformers` one, with the same fields.

    Raises:
        ModelError: no folder, no readable ``config.json``, or a model type that `transformers` does not know.
    """
    raw = _raw_config(folder)
    return read_plain(raw) or _transformers_config(folder, raw)


def load_transformers_config(folder: Path) -> Any:
    """The `transformers` config of a folder, which its model code needs. Raises as `load_config`."""
    return _transformers_config(folder, _raw_config(folder))


def open_weights(folder: Path, config: Any, *, load_format: str, seed: int = 0) -> Weights:
    """The weights of a folder, or random ones for its config; nothing is read but headers.

    Raises:
        ModelError: weights missing, incomplete or damaged.
    """
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if load_format == "safetensors":
        return SafetensorsWeights(folder, num_layers=config.num_hidden_layers, tied_embeddings=tied)
    import torch

    from runtime.model.generic import build_skeleton, unit_shapes

    shapes = unit_shapes(build_skeleton(load_transformers_config(folder), torch.float32))
    std = float(getattr(config, "initializer_range", None) or 0.02)
    return DummyWeights(shapes, std=std, tied_embeddings=tied, seed=seed)


def _raw_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"the model folder {folder} does not exist")
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise ModelError(f"{folder} holds no config.json; a model folder in Hugging Face form is wanted")
    _refuse_by_config(raw)
    return raw


def _transformers_config(folder: Path, raw: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a malformed config makes transformers raise
        kind = raw.get("model_type", "(none)")
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"transformers cannot read {folder / 'config.json'} (model type {kind}): {reason}") from error


def _refuse_by_config(raw: Mapping[str, Any]) -> None:
    """Raises `ModelError` for what can be told from ``config.json`` alone to be out of reach."""
    names = raw.get("architectures") or [raw.get("model_type", "this model")]
    name = names[0]
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{name} cannot be served: it is an encoder-decoder model; only decoder-only models are")
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"{name} cannot be served: its weights are quantised ({method}); use the float32, bfloat16 or float16 weights"
        )
    if "vision_config" in raw or "audio_config" in raw:
        raise ModelError(f"{name} cannot be served: it is a multimodal model; only text models are")


def _architecture(config: Any) -> str:
    """The class that serves this config.

    Raises:
        ModelError: no causal language model, or one that is not served.
    """
    known = TESTED.get(config.model_type) or _causal_language_model(config.model_type)
    claimed = (config.architectures or [known or config.model_type])[0]
    if claimed != known:
        raise ModelError(
            f"{claimed} (model type {config.model_type}) cannot be served: it is not a decoder-only language model that"
            " transformers defines"
        )
    if config.model_type in TESTED:
        _refuse_by_kind(config, claimed)
        return claimed
    from runtime.model.proof import prove

    try:
        _refuse_by_kind(config, claimed)
        prove(config)
    except ModelError:
        raise
    except Exception as error:  # a foreign config may raise anything when it is asked for a field
        raise ModelError(f"{claimed} cannot be served: its config is not that of a plain decoder ({error})") from error
    return claimed


def _causal_language_model(model_type: str) -> str | None:
    # Not at the top: this import pulls in text generation and takes more than a second.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)


def _refuse_by_kind(config: Any, name: str) -> None:
    wanted = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if missing := [field for field in wanted if not isinstance(getattr(config, field, None), int)]:
        raise ModelError(
            f"{name} cannot be served: its config has no {missing[0]}, so it is no chain of attention layers"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelError(f"{name} cannot be served: it attends in both directions, so it does not generate")
    refuse_unservable(config)


def _own_dtype(config: Any, weights: Weights) -> str:
    declared = str(getattr(config, "dtype", None) or "").removeprefix("torch.")
    if declared in DTYPES:
        return declared
    found = weights.float_dtype() if isinstance(weights, SafetensorsWeights) else "float32"
    return found if found in DTYPES else "float32"


def _num_bytes(weights: Weights, unit: Unit, size: int, quantize: str) -> int:
    """With `quantize`, matrices count a byte an element and 2 bytes for each row of 64 (`runtime.kernels.quantized`)."""
    total = 0
    for info in weights.infos(unit).values():
        if quantize and len(info.shape) == 2:
            num_rows, depth = info.shape
            total += num_rows * (depth + 2 * -(-depth // 64))
        else:
            total += size * info.numel
    return total


def _flops(config: Any, weights: Weights, unit: Unit) -> int:
    """Two per weight of every matrix that a token meets; of experts, only the chosen ones. Attention is left out."""
    active = (_experts_per_token(config) or 1) / (_num_experts(config) or 1)
    total = 0.0
    for name, info in weights.infos(unit).items():
        if len(info.shape) >= 2:
            total += 2 * info.numel * (active if _is_expert(name) else 1.0)
    return round(total)


def _num_experts(config: Any) -> int:
    return _first(config, "num_experts", "num_local_experts", "n_routed_experts") or 0


def _experts_per_token(config: Any) -> int:
    return (_first(config, "num_experts_per_tok", "moe_topk") or 1) if _num_experts(config) else 0


def _is_expert(name: str) -> bool:
    """Whether a tensor belongs to routed experts, of which a token meets only some."""
    return ".experts." in f".{name}"


def _expert_elements(weights: Weights, layer: int) -> int:
    return sum(info.numel for name, info in weights.infos(layer).items() if _is_expert(name))


def _num_kv_heads(config: Any) -> int:
    return _first(config, "num_key_value_heads") or config.num_attention_heads


def _head_dim(config: Any) -> int:
    return _first(config, "head_dim") or config.hidden_size // config.num_attention_heads


def _max_context(config: Any, wanted: int | None) -> int:
    limit = trained_context(config) or _NO_POSITION_LIMIT
    if wanted is None:
        return limit
    if not 1 <= wanted <= limit:
        raise ModelError(f"a context of {wanted} tokens is out of range; this model takes 1 to {limit}")
    return wanted


def _sliding_window(config: Any) -> int | None:
    window = _first(config, "sliding_window")
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    return window if kinds is None or set(kinds) == {"sliding_attention"} else None


def _layer_windows(config: Any) -> tuple[int | None, ...]:
    """The window of each layer where some slide and some do not, else nothing."""
    kinds = getattr(config, "layer_types", None)
    window = _first(config, "sliding_window")
    if window is None or getattr(config, "use_sliding_window", True) is False or not kinds or len(set(kinds)) == 1:
        return ()
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _eos_token_ids(config: Any, folder: Path) -> tuple[int, ...]:
    """Of both files, generation config first, each id once."""
    generation = _read_json(folder / "generation_config.json") or {}
    ids: list[int] = []
    for given in (generation.get("eos_token_id"), config.eos_token_id):
        ids += given if isinstance(given, list) else [] if given is None else [given]
    return tuple(dict.fromkeys(ids))


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None when there is no such file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
