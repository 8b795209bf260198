"""What the pipeline says is what `transformers` says: token for token, for every architecture, split anywhere."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.server import Server
from tests.tiny_models import KINDS, write_tiny

NUM_NEW = 24
OPTIONS = ("--dtype", "float32", "--kv-memory", "4M", "--step-tokens", "24", "--block-size", "8")


def make_prompts(seed: int, count: int = 12) -> list[list[int]]:
    """Random prompts; some begin alike, so that the prefix cache is hit."""
    rng = random.Random(seed)
    shared = [rng.randrange(5, 280) for _ in range(40)]
    prompts = []
    for index in range(count):
        own = [rng.randrange(5, 280) for _ in range(rng.choice((1, 3, 17, 50)))]
        prompts.append([*shared[: rng.randint(8, 40)], *own] if index % 2 else own)
    return prompts


def generate(model: Any, prompt: list[int]) -> list[int]:
    """`transformers`' own greedy generation."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def load_reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


async def check(server: Server, model: Any, prompts: list[list[int]]) -> None:
    bodies = [
        {
            "prompt": prompt, "max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "logprobs": 1,
        }
        for prompt in prompts
    ]  # fmt: skip
    answers = await server.post_all("/v1/completions", bodies)
    for prompt, answer in zip(prompts, answers, strict=True):
        got = answer["choices"][0]["token_ids"]
        expected = generate(model, prompt)
        assert got == expected, f"prompt {prompt} differs at {_first_difference(got, expected)}"
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + got])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits.float(), -1)[range(NUM_NEW), got]
        found = torch.tensor(answer["choices"][0]["logprobs"]["token_logprobs"])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    audit = server.audit()
    assert audit["problems"] == []
    assert audit["sequences"] == 0


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


IN_CI = {"llama_rope_scaled", "qwen2", "qwen3", "mistral_sliding", "qwen2_sliding", "mixtral", "qwen3_moe", "gemma3"}
"""One server each; the other kinds differ in what the unit tests compare with `transformers` too."""

ON_TEAMS = {"qwen3", "mixtral", "gemma3", "phi3"}
"""These have workers of two threads."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in IN_CI else pytest.mark.slow) for kind in sorted(KINDS)]
)
async def test_every_architecture(kind: str, tmp_path: Path) -> None:
    folder = write_tiny(kind, tmp_path / kind, sharded=kind == "qwen2")
    threads = "2" if kind in ON_TEAMS else "1"
    with Server(folder, "--layers", "1,3", "--threads", threads, *OPTIONS, log=tmp_path / "log") as server:
        await check(server, load_reference(folder), make_prompts(1))


@pytest.mark.parametrize(("layers", "threads"), [("4", "1"), ("1,1,1,1", "1"), ("4", "3")])
async def test_every_number_of_stages_and_threads(layers: str, threads: str, tiny_llama: Path, tmp_path: Path) -> None:
    with Server(tiny_llama, "--layers", layers, "--threads", threads, *OPTIONS, log=tmp_path / "log") as server:
        model = load_reference(tiny_llama)
        await check(server, model, make_prompts(2))
        await check(server, model, make_prompts(2))


async def test_a_seed_says_it_all(tiny_llama: Path, tmp_path: Path) -> None:
    """A sampled request gives the same tokens whatever the batch, the number of stages, the chunks and the timing."""
    draw = random.Random(7)
    bodies = [
        {
            "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, "seed": index,
            "temperature": draw.choice((0.7, 1.0, 1.5)), "top_p": draw.choice((1.0, 0.9)),
            "top_k": draw.choice((-1, 20)), "min_p": draw.choice((0.0, 0.02)),
            "frequency_penalty": draw.choice((0.0, 0.5)), "repetition_penalty": draw.choice((1.0, 1.2)),
        }
        for index, prompt in enumerate(make_prompts(6))
    ]  # fmt: skip
    with Server(tiny_llama, "--layers", "4", *OPTIONS, log=tmp_path / "one") as server:
        together = await server.post_all("/v1/completions", bodies)
    options = ("--dtype", "float32", "--kv-memory", "4M", "--step-tokens", "7", "--block-size", "16")
    with Server(tiny_llama, "--layers", "1,2,1", *options, log=tmp_path / "three") as server:
        alone = [(await server.post_all("/v1/completions", [body]))[0] for body in bodies]
    tokens = [answer["choices"][0]["token_ids"] for answer in together]
    assert tokens == [answer["choices"][0]["token_ids"] for answer in alone]
    assert len({tuple(one) for one in tokens}) == len(tokens)


async def test_the_transformers_layers_too(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--stages", "2", "--implementation", "transformers", *OPTIONS)
    with Server(tiny_llama, *options, log=tmp_path / "log") as server:
        await check(server, load_reference(tiny_llama), make_prompts(3))


async def test_preemption_and_eviction_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    """A pool that holds two or three of twelve sequences at once."""
    options = ("--layers", "2,2", "--dtype", "float32", "--kv-memory", "80K", "--step-tokens", "24")
    with Server(tiny_llama, *options, "--block-size", "8", log=tmp_path / "log") as server:
        await check(server, load_reference(tiny_llama), make_prompts(4))
        _, stats = server.get("/admin/stats")
        assert stats["preemptions"] > 0, "the pool was not small enough to show anything"
