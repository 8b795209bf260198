"""Model shapes and brute force for the tests and benchmarks of the planner."""

import itertools
from collections.abc import Iterator

import numpy as np

from runtime.model.spec import ModelSpec
from scheduler.planning.splits import Problem, fits, make_split


def make_spec(
    *,
    name: str = "shape",
    num_layers: int = 30,
    hidden: int = 576,
    intermediate: int = 1536,
    heads: int = 9,
    kv_heads: int = 3,
    head_dim: int = 64,
    vocab: int = 49152,
    tied: bool = True,
    experts: int = 0,
    experts_per_token: int = 0,
    windows: tuple[int | None, ...] = (),
) -> ModelSpec:
    """A Llama-like model in bfloat16 from its shape; the default is SmolLM2-135M's."""
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * intermediate
    held, met = attention + mlp * max(experts, 1), attention + mlp * max(experts_per_token, 1)
    return ModelSpec(
        name=name, folder="", architecture="LlamaForCausalLM", dtype="bfloat16", load_format="dummy",
        num_layers=num_layers, hidden_size=hidden, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        vocab_size=vocab, max_context=8192, tied_embeddings=tied, layer_bytes=(2 * held,) * num_layers,
        embedding_bytes=2 * hidden * vocab, lm_head_bytes=2 * hidden * vocab,
        layer_flops_per_token=(2 * met,) * num_layers, lm_head_flops_per_token=2 * hidden * vocab, eos_token_ids=(),
        layer_windows=windows, num_experts=experts, experts_per_token=experts_per_token,
        layer_expert_bytes=(2 * mlp * experts if experts else 0,) * num_layers,
    )  # fmt: skip


def llama_70b() -> ModelSpec:
    return make_spec(
        name="llama-3-70b", num_layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128,
        vocab=128256, tied=False,
    )  # fmt: skip


def every_split(num_devices: int, num_layers: int, k: int) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Every order of k devices with every way to cut the layers; only the ends may hold none."""
    for order in itertools.permutations(range(num_devices), k):
        for cuts in itertools.combinations_with_replacement(range(num_layers + 1), k - 1):
            bounds = (0, *cuts, num_layers)
            counts = [stop - start for start, stop in itertools.pairwise(bounds)]
            if all(counts[1:-1]):
                yield order, counts


def brute_force(problem: Problem, k: int) -> float:
    """The shortest cycle of all splits, inf where none fits."""
    return min(
        (
            make_split(problem, order, counts).cycle_s(problem)
            for order, counts in every_split(problem.num_devices, problem.num_layers, k)
            if fits(problem, order, counts)
        ),
        default=float("inf"),
    )


def random_problem(rng: np.random.Generator, max_devices: int, max_layers: int) -> Problem:
    """Equal layers or not, devices alike or not, memory short or not, the LM head large or not, any steps in flight."""
    n, num_layers = int(rng.integers(1, max_devices + 1)), int(rng.integers(1, max_layers + 1))

    def costs(*shape: int) -> np.ndarray:
        exact = rng.random() < 0.4  # quarters make ties
        return rng.integers(1, 5, shape) / 4.0 if exact else rng.random(shape) + 1e-3

    uniform = rng.random() < 0.5
    layers = np.repeat(costs(n, 1), num_layers, axis=1) if uniform else costs(n, num_layers)
    layer_bytes = np.full(num_layers, 1.0 + rng.random()) if uniform else 1.0 + rng.random(num_layers)
    stage, last = costs(n) * rng.random(), costs(n) * 4 * rng.random()
    room = np.where(rng.random(n) < 0.5, np.inf, 1.0 + 2 * layer_bytes.sum() * rng.random(n))
    if rng.random() < 0.4:  # some devices alike
        for device in rng.integers(0, n, 2):
            layers[device], stage[device], last[device], room[device] = layers[0], stage[0], last[0], room[0]
    in_flight = float(rng.choice([1.0, 1.5, 2.0, 3.0, n, n + 1]))
    return Problem(stage, layers, last, room, layer_bytes, rng.random(), 3 * rng.random(), in_flight)
