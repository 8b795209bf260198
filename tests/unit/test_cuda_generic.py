"""Layers of `transformers` inside what a graph would hold, on the CPU; and what tells which layers a graph can hold."""

from pathlib import Path

import pytest
import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime import attention
from runtime.batch import StepBatch
from runtime.cuda.graphs import StaticInputs
from runtime.cuda.guard import NotStatic, StaticOnly
from runtime.cuda.runner import Runner
from runtime.cuda.spans import Bucket
from runtime.cuda.step import host_step
from runtime.messages import StepPlan
from runtime.model.builder import UnitBuilder
from runtime.model.config import inspect_model
from runtime.stage import make_batch
from runtime.stage_state import StageState
from tests.plan_harness import plans_of
from tests.tiny_models import NUM_LAYERS, write_tiny

CPU = torch.device("cpu")
BLOCK_SIZE = 8
ALL = LayerRange(0, NUM_LAYERS)


class Side:
    """A stage of all layers, as `transformers` has them."""

    def __init__(self, folder: Path) -> None:
        self.spec = spec = inspect_model(str(folder), dtype="float32")
        builder = UnitBuilder(spec, device="cpu", implementation="transformers")
        self.layers = {index: builder.layer(index) for index in ALL}
        self.embedding = builder.embedding()
        self.pool = PagePool(200, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, torch.float32, "cpu")
        self.pool.data.fill_(torch.nan)
        self.pool.hold(ALL)
        self.state = StageState(BLOCK_SIZE, 1)

    def run(self, plan: StepPlan, bucket: Bucket | None) -> torch.Tensor:
        planned = self.state.plan_batch(plan)
        self.pool.ensure(planned.new_blocks)
        if bucket is None:
            return Runner(CPU).run(ALL, self.layers, planned, self.pool, None, self.embedding)
        spec = self.spec
        inputs = StaticInputs(bucket, spec.num_layers, spec.hidden_size, BLOCK_SIZE, torch.float32, CPU)
        batch: StepBatch = make_batch(planned, CPU)
        inputs.fill(ALL, host_step(batch, planned.positions, self.pool, tuple(ALL)), planned.tokens)
        inputs.hidden.copy_(self.embedding(inputs.tokens))
        inputs.run(list(self.layers.items()), self.pool.data)
        return inputs.hidden[: len(planned.context_lens)]


def make_plans() -> list[StepPlan]:
    draw = torch.Generator().manual_seed(2)
    schedule = [[(1, 14), (2, 7)], [(3, 20)], *([[(1, 1), (2, 1), (3, 1)]] * 4)]
    return plans_of(schedule, 4, lambda count: torch.randint(0, 200, (count,), generator=draw).tolist())


@pytest.mark.parametrize("kind", ["llama", "mistral_sliding", "gemma2", "gemma3", "qwen3_moe", "mixtral"])
def test_a_padded_step_over_static_inputs_is_the_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "has_kernels", lambda device, dtype: False)
    folder = write_tiny(kind, tmp_path / kind)
    exact, padded = Side(folder), Side(folder)
    with torch.inference_mode():
        for plan in make_plans():
            is_decode = all(len(row.tokens) == 1 for row in plan.rows)
            expected, found = exact.run(plan, None), padded.run(plan, Bucket(4, 64) if is_decode else None)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded.pool.data, exact.pool.data, atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3", "qwen2_yarn"])
def test_such_layers_may_be_captured(kind: str, tmp_path: Path) -> None:
    side = Side(write_tiny(kind, tmp_path / kind))
    spec = side.spec
    inputs = StaticInputs(Bucket(4, 64), spec.num_layers, spec.hidden_size, BLOCK_SIZE, torch.float32, CPU)
    page = torch.zeros_like(side.pool.data[:1])
    with torch.inference_mode():
        inputs.run(list(side.layers.items()), page)  # what attends is chosen here
        with StaticOnly():
            inputs.run(list(side.layers.items()), page)


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.max().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
        lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
        lambda x: torch.empty(3, device="meta").copy_(x),
    ],
)
def test_what_depends_on_values_is_found(reads) -> None:
    x = torch.tensor([1.0, -1.0, 3.0])
    with torch.inference_mode(), StaticOnly():
        with pytest.raises(NotStatic):
            reads(x)
        x[torch.tensor([0, 2])] = x.abs()[1:] @ torch.ones(2)
        x.index_copy_(0, torch.tensor([1]), x[:1].to(torch.float64).float())


def test_experts_that_are_looped_over_are_found(tmp_path: Path) -> None:
    side = Side(write_tiny("mixtral", tmp_path / "mixtral"))
    for layer in side.layers.values():
        for module in layer.module.modules():
            if hasattr(getattr(module, "config", None), "_experts_implementation"):
                module.config._experts_implementation = "eager"
    spec = side.spec
    inputs = StaticInputs(Bucket(4, 64), spec.num_layers, spec.hidden_size, BLOCK_SIZE, torch.float32, CPU)
    page = torch.zeros_like(side.pool.data[:1])
    with torch.inference_mode():
        inputs.run(list(side.layers.items()), page)
        with StaticOnly(), pytest.raises(NotStatic, match="depends on values"):
            inputs.run(list(side.layers.items()), page)
