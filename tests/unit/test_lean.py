"""The lean layer against `transformers`' own, on tiny random models: chunked prefill, then decode, equals one pass."""

import copy
import time

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen2MoeConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from runtime import attention
from runtime.batch import NOT_TIMED, LayerKV, StepBatch
from runtime.kernels.clock import ATTENTION, NUM_PARTS, PRODUCTS
from runtime.model import lean
from runtime.model.lean import LeanEmbedding, LeanHead, LeanLayer, supports

pytestmark = pytest.mark.usefixtures("kernel_threads")

SHAPE = dict(
    hidden_size=72,
    intermediate_size=104,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=133,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
CONFIGS = {
    **{f"llama-{name}": LlamaConfig(**SHAPE, rope_parameters=dict(rope)) for name, rope in ROPES.items()},
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True),
    "llama-head64": LlamaConfig(**(SHAPE | {"head_dim": 64})),
    "qwen2": Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "qwen2-window": Qwen2Config(
        **{k: v for k, v in SHAPE.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=9,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=11),
}
BLOCK_SIZE = 8


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(len(request.param))
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class Lean:
    """All of a model in lean parts, over one page pool, fed with (sequence, tokens) rows."""

    def __init__(self, model, dtype=torch.float32):
        config = model.config
        self.dtype = dtype
        self.layers = [
            LeanLayer(config, i, layer.state_dict(), "cpu", dtype) for i, layer in enumerate(model.model.layers)
        ]
        self.embedding = LeanEmbedding(model.model.embed_tokens.weight, "cpu", dtype)
        self.head = LeanHead(model.model.norm.weight, model.lm_head.weight, config.rms_norm_eps, "cpu", dtype)
        num_blocks, layer = 64, self.layers[0]
        pages = np.random.default_rng(0).permutation(num_blocks * len(self.layers)).astype(np.int32)
        pool = torch.full((len(pages), 2, BLOCK_SIZE, layer.num_kv_heads, layer.head_dim), torch.nan, dtype=dtype)
        self.kvs = [
            LayerKV(layer=i, data=pool, page_of_block=pages[i * num_blocks : (i + 1) * num_blocks])
            for i in range(len(self.layers))
        ]
        self.lengths = {}
        self.spent = NOT_TIMED
        self.in_one_call = True

    def step(self, rows):
        """Hidden states after the last layer, one tensor per row."""
        counts = [len(tokens) for _, tokens in rows]
        starts = [self.lengths.get(sequence, 0) for sequence, _ in rows]
        tables = [[(sequence * 31 + j) % 64 for j in range(31)] for sequence, _ in rows]
        batch = StepBatch(
            positions=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]),
            query_starts=np.cumsum([0, *counts]).astype(np.int32),
            context_lens=np.array([s + n for s, n in zip(starts, counts, strict=True)], np.int32),
            block_tables=np.array(tables, np.int32),
            spent=self.spent,
        )
        hidden = self.embedding(torch.cat([tokens for _, tokens in rows]))
        if self.in_one_call:
            hidden = self.layers[0].run_together(self.layers, hidden, batch, self.kvs)
        else:
            for layer, kv in zip(self.layers, self.kvs, strict=True):
                hidden = layer(hidden, batch, kv)
                assert hidden.dtype == self.dtype
        assert hidden.dtype == self.dtype
        for (sequence, _), context in zip(rows, batch.context_lens, strict=True):
            self.lengths[sequence] = int(context)
        return hidden.split(counts)


def reference_logits(model, tokens):
    with torch.inference_mode():
        return model(tokens[None]).logits[0]


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_chunked_prefill_then_decode_equals_one_pass(model, path, monkeypatch):
    if path == "torch":
        for module in (attention, lean):
            monkeypatch.setattr(module, "has_kernels", lambda device, dtype: False)
    check_against_transformers(model)


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_timing_the_parts_changes_no_bit(path, monkeypatch):
    """Whoever asks learns where the time of a layer went, within what the call took; nobody else pays or is told."""
    if path == "torch":
        for module in (attention, lean):
            monkeypatch.setattr(module, "has_kernels", lambda device, dtype: False)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], attn_implementation="eager").float().eval()
    plain, timed = Lean(model), Lean(model)
    timed.spent = np.zeros(NUM_PARTS, np.int64)
    tokens = torch.randint(0, 133, (40,))
    for part in (tokens[:33], tokens[33:34]):
        begun_ns = time.perf_counter_ns()
        before = timed.spent.copy()
        hidden = timed.step([(1, part)])[0]
        taken_ns = time.perf_counter_ns() - begun_ns
        assert torch.equal(hidden, plain.step([(1, part)])[0])
        spent = timed.spent - before
        assert spent[ATTENTION] > 0
        assert (spent[PRODUCTS] > 0) == (path == "kernels")
        assert spent.sum() < taken_ns
    assert not len(NOT_TIMED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", ["qwen2-window", "llama-biased"])
def test_layers_in_one_call_are_the_layers_one_by_one(config, dtype):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[config], attn_implementation="eager").eval()
    tokens = torch.randint(0, SHAPE["vocab_size"], (40,))
    results = []
    for in_one_call in (True, False):
        lean_model = Lean(model, dtype)
        lean_model.in_one_call = in_one_call
        with torch.inference_mode():
            results.append([lean_model.step([(0, tokens[:30])]), lean_model.step([(0, tokens[30:31]), (1, tokens)])])
    for together, alone in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def check_against_transformers(model):
    assert supports(model.config)
    parts = Lean(model)
    first, second = torch.randint(0, 133, (83,)), torch.randint(0, 133, (31,))
    hidden = {1: [], 2: []}
    schedule = [[(1, first[:40])], [(1, first[40:61]), (2, second[:29])], [(2, second[29:30]), (1, first[61:80])]]
    schedule += [[(1, first[80:81]), (2, second[30:31])], [(1, first[81:82])], [(1, first[82:83])]]
    for rows in schedule:
        for (sequence, _), part in zip(rows, parts.step(rows), strict=True):
            hidden[sequence].append(part)
    for sequence, tokens in ((1, first), (2, second)):
        logits = parts.head(torch.cat(hidden[sequence]))
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, reference_logits(model, tokens), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(CONFIGS["qwen3"]).float().eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_whatever_runs_beside_it(small, dtype):
    tokens = torch.randint(0, 133, (60,))
    alone, crowded = Lean(small, dtype), Lean(small, dtype)
    others = [torch.randint(0, 133, (n,)) for n in (1, 7, 45)]
    for start, stop in ((0, 40), (40, 58), (58, 59), (59, 60)):
        (expected,) = alone.step([(1, tokens[start:stop])])
        before, middle, after = ((9 + i, other) for i, other in enumerate(others))
        crowded.lengths = {1: crowded.lengths.get(1, 0)}
        result = crowded.step([before, middle, (1, tokens[start:stop]), after])[2]
        assert torch.equal(result, expected)
        assert torch.equal(crowded.head(result), alone.head(expected))


def test_the_bits_of_a_prefill_do_not_depend_on_its_chunks(small):
    tokens = torch.randint(0, 133, (200,))
    (whole,) = Lean(small).step([(1, tokens)])
    chunked = Lean(small)
    parts = [chunked.step([(1, tokens[a:b])])[0] for a, b in ((0, 13), (13, 100), (100, 200))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_as_close_as_transformers_own(small, dtype):
    tokens = torch.randint(0, 133, (50,))
    exact = reference_logits(small, tokens)
    theirs = reference_logits(copy.deepcopy(small).to(dtype), tokens).float()
    ours = Lean(small, dtype)
    logits = ours.head(ours.step([(1, tokens)])[0])
    assert (logits - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


def test_nbytes_counts_what_is_held(small):
    layer = LeanLayer(small.config, 0, small.model.layers[0].state_dict(), "cpu", torch.bfloat16)
    plain = sum(p.numel() * 2 for p in small.model.layers[0].parameters())
    assert plain <= layer.nbytes <= 2.5 * plain
    assert LeanEmbedding(small.model.embed_tokens.weight, "cpu", torch.float16).nbytes == 133 * 72 * 2


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, hidden_act="gelu"),
        LlamaConfig(**SHAPE, mlp_bias=True),
        LlamaConfig(**(SHAPE | {"intermediate_size": 103})),
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        Qwen2MoeConfig(),
        GemmaConfig(),
    ],
)
def test_what_it_does_not_know_is_refused(config):
    assert not supports(config)
    with pytest.raises(ValueError, match=f"does not cover this {config.model_type} model"):
        LeanLayer(config, 0, {}, "cpu", torch.float32)
