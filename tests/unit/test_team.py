"""Teams of threads: each piece of work is done once, nobody passes a barrier too early, and no bit depends on how many there are."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime import attention
from runtime.batch import LayerKV, StepBatch
from runtime.kernels import team
from runtime.kernels.lanes import address, kernel
from runtime.kernels.team import barrier, on_team, share
from runtime.model import lean

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = team.num_threads()
    yield
    team.set_num_threads(before)


@kernel
def _count(me, pieces, seen):
    first, stop = share(me, len(pieces))
    for i in range(first, stop):
        pieces[i] += 1
    seen[me[1]] = me[2]
    return 10 * me[1] + 7


@kernel
def count(members, pieces, seen):
    return on_team(members, _count, (pieces, seen))


@kernel
def _turn(me, left, right, rounds):
    first, stop = share(me, len(left))
    for _ in range(rounds):
        for i in range(first, stop):
            right[i] = left[(i + 1) % len(left)]
        barrier(me)
        for i in range(first, stop):
            left[i] = right[(i + 1) % len(left)]
        barrier(me)


@kernel
def turn(members, left, right, rounds):
    return on_team(members, _turn, (left, right, rounds))


@kernel
def _hold(me, gate, state):
    if me[1] == 0:
        state[0] = me[2]
        team._wait_until(address(gate), 1, 60_000_000_000)


@kernel
def hold(members, gate, state):
    return on_team(members, _hold, (gate, state))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_pieces", [0, 1, 5, 100])
def test_each_piece_is_done_once(size: int, num_pieces: int) -> None:
    team.set_num_threads(size)
    pieces, seen = np.zeros(num_pieces, np.int64), np.zeros(size, np.int64)
    for turn_ in range(1, 50):
        assert count(team.current(), pieces, seen) == 7, "what the caller's own call returned"
        assert (pieces == turn_).all()
        assert (seen == size).all()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_nobody_passes_a_barrier_before_the_last_has_come(size: int) -> None:
    """More members than cores, too, so that some sleep."""
    team.set_num_threads(size)
    left, right = np.arange(11), np.zeros(11, np.int64)
    for rounds in (1, 2, 500):
        expected = np.roll(left, -2 * rounds)
        assert turn(team.current(), left, right, rounds) == 0
        assert np.array_equal(left, expected)


def test_a_second_caller_does_its_work_alone() -> None:
    team.set_num_threads(3)
    gate, state, seen = np.zeros(2, np.int32), np.zeros(1, np.int64), np.zeros(3, np.int64)
    pieces = np.zeros(4, np.int64)
    count(team.current(), pieces, seen)  # so that nothing is compiled below
    other = threading.Thread(target=hold, args=(team.current(), gate, state))
    other.start()
    while state[0] == 0:
        assert other.is_alive()
        time.sleep(0.001)
    seen[:] = 0
    count(team.current(), pieces, seen)
    gate[0] = 1
    other.join()
    assert (state[0], seen.tolist(), pieces.tolist()) == (3, [1, 0, 0], [2] * 4)
    count(team.current(), pieces, seen)
    assert seen.tolist() == [3, 3, 3], "the team is free again"


def test_a_thread_that_works_alone_never_takes_the_team() -> None:
    team.set_num_threads(3)
    pieces, seen, found = np.zeros(4, np.int64), np.zeros(3, np.int64), []

    def work() -> None:
        team.work_alone()
        count(team.current(), pieces, seen)
        found.append(team.num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (seen.tolist(), pieces.tolist(), found) == ([1, 0, 0], [1] * 4, [1])
    assert team.num_threads() == 3, "that is a matter of the thread"


def test_too_few_threads_leave_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        team.set_num_threads(4)
    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)
    pieces, seen = np.zeros(4, np.int64), np.zeros(3, np.int64)
    count(team.current(), pieces, seen)
    assert seen.tolist() == [team.num_threads(), 0, 0] == [1, 0, 0]


BUSY_EXIT = """
import threading, time
import numpy as np
from test_team import count, team
team.set_num_threads(3)
pieces, seen = np.zeros(9, np.int64), np.zeros(3, np.int64)
count(team.current(), pieces, seen)
def work():
    while True:
        count(team.current(), pieces, seen)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
raise SystemExit(7)
"""


def test_a_process_ends_while_its_team_works() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    for _ in range(4):
        run = subprocess.run([sys.executable, "-c", BUSY_EXIT], timeout=60, env=environment, check=False)
        assert run.returncode == 7


def test_who_has_no_room_has_no_part_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt so long that not every member can have scratch for it."""
    torch.manual_seed(3)
    layers = [lean.LeanLayer(CONFIG, i, _state_of(CONFIG), "cpu", torch.float32) for i in range(2)]
    head = lean.LeanHead(torch.rand(200), torch.randn(777, 200), 1e-5, "cpu", torch.float32)
    rows = [(0, 250), (300, 1)]
    team.set_num_threads(1)
    expected = _run(layers, head, rows, torch.float32)
    team.set_num_threads(3)
    for limit in (0, 700_000):
        monkeypatch.setattr(attention, "SCRATCH_BYTES", limit)
        for found, wanted in zip(_run(layers, head, rows, torch.float32), expected, strict=True):
            assert torch.equal(found, wanted)


def test_its_threads_sleep_without_work_and_end() -> None:
    def kernels() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("kernel-")]

    team.set_num_threads(3)
    pieces, seen = np.zeros(9, np.int64), np.zeros(3, np.int64)
    count(team.current(), pieces, seen)
    assert len(kernels()) == team.num_threads() - 1 == 2
    tasks = [Path(f"/proc/self/task/{thread.native_id}/stat") for thread in kernels()]
    if tasks[0].exists():
        deadline = time.monotonic() + 10
        while any(_state(task) != "S" for task in tasks):
            assert time.monotonic() < deadline, "a member without work does not sleep"
            time.sleep(0.01)
        count(team.current(), pieces, seen)
        assert (pieces == 2).all(), "who sleeps is woken"
    team.set_num_threads(1)
    assert not kernels()


def _state(task: Path) -> str:
    return task.read_text().rpartition(")")[2].split()[0]


def test_a_team_has_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="0 threads for the kernels; at least one is needed"):
        team.set_num_threads(0)


CONFIG = SimpleNamespace(
    model_type="qwen3",
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    hidden_size=200,
    intermediate_size=330,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=32,
    hidden_act="silu",
    rms_norm_eps=1e-5,
    attention_bias=True,
    layer_types=["full_attention", "sliding_attention"],
    sliding_window=70,
)


@pytest.mark.parametrize(("dtype", "quantize"), [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "int8")])
def test_no_bit_of_a_model_depends_on_the_team(dtype: torch.dtype, quantize: str) -> None:
    """Decoding rows, chunks, both together, and more tokens than pass through the products at once."""
    torch.manual_seed(3)
    layers = [lean.LeanLayer(CONFIG, i, _state_of(CONFIG), "cpu", dtype, quantize) for i in range(2)]
    head = lean.LeanHead(torch.rand(200), torch.randn(777, 200), 1e-5, "cpu", dtype, quantize)
    for rows in (
        [(300, 1)],
        [(0, 1), (7, 1), (130, 1)],
        [(0, 250)],
        [(90, 61), (5, 1), (0, 19), (200, 1)],
        [(64, 1)] * 40,
    ):
        outcomes = {}
        for size in (1, 2, 3, 6):
            team.set_num_threads(size)
            outcomes[size] = _run(layers, head, rows, dtype)
        for size, outcome in outcomes.items():
            for found, expected in zip(outcome, outcomes[1], strict=True):
                assert torch.equal(found, expected), f"{size} members, {rows}"


def _state_of(config: SimpleNamespace) -> dict[str, torch.Tensor]:
    hidden, wide, heads, kv = config.hidden_size, config.intermediate_size, 320, 160
    shapes = {"q": (heads, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, heads)}
    state = {f"self_attn.{name}_proj.weight": torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    state |= {f"self_attn.{name}_proj.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    state |= {f"mlp.{name}_proj.weight": torch.randn(wide, hidden) * 0.05 for name in ("gate", "up")}
    state["mlp.down_proj.weight"] = torch.randn(hidden, wide) * 0.05
    state |= {f"{name}_layernorm.weight": torch.rand(hidden) for name in ("input", "post_attention")}
    return state | {f"self_attn.{name}_norm.weight": torch.rand(32) for name in ("q", "k")}


def _run(layers, head, rows, dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, logits and the pages that the step wrote."""
    rng = torch.Generator().manual_seed(5)
    contexts = [before + new for before, new in rows]
    num_blocks = -(-max(contexts) // 16)
    tables = np.arange(len(rows) * num_blocks, dtype=np.int32).reshape(len(rows), -1)
    data = torch.randn(tables.size, 2, 16, 5, 32, generator=rng).to(dtype)
    batch = StepBatch(
        positions=torch.cat([torch.arange(before, before + new) for before, new in rows]),
        query_starts=np.cumsum([0] + [new for _, new in rows]).astype(np.int32),
        context_lens=np.array(contexts, np.int32),
        block_tables=tables,
    )
    hidden = torch.randn(batch.num_tokens, 200, generator=rng).to(dtype)
    kv = LayerKV(0, data, np.arange(tables.size, dtype=np.int32))
    out = layers[0].run_together(layers, hidden, batch, [kv, kv])
    assert bool(torch.isfinite(out).all())
    return out, head(out), data
