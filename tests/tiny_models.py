"""Tiny random models in Hugging Face form, written by `transformers` itself, for tests that need real files.

Every kind has 4 layers, hidden size 64 and a few hundred tokens; greedy choices have clear winners, because the weights
are spread wider than a fresh model's. A small byte-level tokenizer with a chat template comes with each.
"""

from pathlib import Path
from typing import Any

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_LAYERS = 4

CORPUS = (
    "the user asks the assistant a question and the assistant answers it in a few short words; then another user comes,"
    " says hello, and wants to know how many apples are left when somebody has eaten three of them before dinner"
)

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama_rope_scaled": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_rope_linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama_rope_dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama_rope_long": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8],
                "long_factor": [2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.2, 3.4],
                "original_max_position_embeddings": 256,
            }
        },
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_yarn": (
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2_sliding": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 24, "layer_types": _MIXED}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "qwen3_sliding": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": 24, "layer_types": _MIXED}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_sliding": ("MistralConfig", {"sliding_window": 24}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "num_experts": 4, "mlp_only_layers": []}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 15.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": _MIXED, "tie_word_embeddings": True},
    ),
}
"""Kind to (config class, what differs from the common small shape)."""


def write_tiny(kind: str, folder: Path, *, seed: int = 0, dtype: str = "float32", sharded: bool = False) -> Path:
    """Save a random model of `kind` with its tokenizer into `folder` and return it. Same seed, same weights."""
    import transformers

    class_name, changes = KINDS[kind]
    tokenizer = build_tokenizer()
    config = getattr(transformers, class_name)(
        **{**_SMALL, **changes},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.to(getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    tokenizer.save_pretrained(folder)
    return folder


def build_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 320 tokens, trained on a few sentences: any text goes through it unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Overwrite every weight, norms and biases too: an ignored bias or a skipped norm must show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(0.0, 0.2, generator=generator)
            if parameter.dim() == 1 and name.endswith("norm.weight"):
                noise += 1.0
            parameter.copy_(noise)
