"""The simulator's parts: shapes, traces, the fast cost of a stage, the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from api import cli
from kvstore.ids import LayerRange
from runtime.loading import MIN_FREE_BYTES
from runtime.model.config import inspect_model
from scheduler.driver import TICK_INTERVAL_S
from scheduler.planning.cost import TERMS, Facts, Speed, Work, stage_seconds
from scheduler.planning.devices import lookup
from scheduler.simulation import shapes, simulator, worker
from scheduler.simulation.stage_cost import StageCost
from scheduler.simulation.trace import make_trace, read_trace
from scheduler.simulation.world import name_devices, parse_devices

AZURE = Path(__file__).resolve().parents[3] / "shared/data/azure_llm_2023_conv.csv"


@pytest.mark.parametrize("name", shapes.known_shapes())
def test_shipped_shapes_are_what_the_models_skeletons_are(name: str, tmp_path: Path) -> None:
    config = json.loads(shapes._shipped().joinpath(f"{name}.json").read_text())
    config["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    real = inspect_model(tmp_path, dtype="bfloat16", load_format="dummy", name=name)
    counted = shapes.spec_of_config(config, name)
    for field in counted.__struct_fields__:
        if field not in ("folder", "layer_expert_bytes"):
            assert getattr(counted, field) == getattr(real, field), field
    assert sum(counted.layer_expert_bytes) == sum(real.layer_expert_bytes)


def test_shapes_have_their_models_sizes() -> None:
    def parameters(name: str) -> float:
        spec = shapes.load_shape(name)
        head = 0 if spec.tied_embeddings else spec.lm_head_bytes
        return (sum(spec.layer_bytes) + spec.embedding_bytes + head) / 2e9

    assert parameters("llama-3-8b") == pytest.approx(8.03, abs=0.01)
    assert parameters("llama-3-70b") == pytest.approx(70.6, abs=0.1)
    assert parameters("qwen3-30b-a3b") == pytest.approx(30.5, abs=0.1)
    assert parameters("smollm2-135m") == pytest.approx(0.1345, abs=0.001)
    with pytest.raises(ValueError, match="llama-3-8b"):
        shapes.load_shape("llama-4")


def test_constants_are_those_of_the_real_ones() -> None:
    assert worker.MIN_FREE_BYTES == MIN_FREE_BYTES
    assert simulator.TICK_S == TICK_INTERVAL_S


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-30b-a3b"])
def test_the_fast_cost_is_the_cost(name: str) -> None:
    spec, rng = shapes.load_shape(name), np.random.default_rng(0)
    facts = Facts(spec)
    for _ in range(200):
        scale = tuple(float(x) for x in rng.uniform(0.5, 2.0, len(TERMS)))
        speed = Speed(lookup(str(rng.choice(["a100", "l40s", "h200", "cpu"]))), scale)
        start = int(rng.integers(0, spec.num_layers))
        layers = LayerRange(start, int(rng.integers(start, spec.num_layers + 1)))
        decodes, chunk = (int(rng.integers(0, n)) for n in (100, 400))
        context, at = (float(rng.integers(1, 4000)) for _ in range(2))
        if not decodes + chunk:
            continue
        work = Work(
            float(decodes), context * bool(decodes), float(chunk), at * bool(chunk), float(decodes + bool(chunk))
        )
        is_last = bool(rng.random() < 0.5)
        cost = StageCost(facts, speed, layers, is_last=is_last)
        found = cost.compute_s(work, {}) + cost.sample_s(work)
        assert found == pytest.approx(stage_seconds(facts, speed, work, list(layers), is_last), rel=1e-9)


def test_stages_of_one_step_share_what_they_know() -> None:
    facts, speed = Facts(shapes.load_shape("llama-3-8b")), Speed(lookup("a100"))
    other = Speed(lookup("l40s"))
    work, known = Work(4.0, 100.0, 0.0, 0.0, 4.0), {}
    apart = [
        StageCost(facts, s, LayerRange(0, n), is_last=False).compute_s(work, {}) for s, n in ((speed, 5), (other, 9))
    ]
    shared = [
        StageCost(facts, s, LayerRange(0, n), is_last=False).compute_s(work, known) for s, n in ((speed, 5), (other, 9))
    ]
    assert apart == shared


def test_a_made_up_trace_has_the_load_that_it_says() -> None:
    trace = make_trace(
        "poisson:rate=5,prompt=100,output=10,duration=400+poisson:rate=1,prompt=7,output=50,cv=1,duration=400", 0
    )
    first, second = trace.window(0, 400), trace.window(400, 800)
    assert len(first) / 400 == pytest.approx(5, rel=0.1)
    assert set(first.prompt_tokens) == {100}
    assert second.output_tokens.mean() == pytest.approx(50, rel=0.15)
    assert second.traffic().service_cv == pytest.approx(1, abs=0.25)
    assert (np.diff(trace.arrival_s) >= 0).all()
    assert trace.scaled(2.0).duration_s == pytest.approx(trace.duration_s / 2)
    for text in ("uniform:rate=1", "poisson:speed=1", "poisson:rate=x", "poisson:rate=0"):
        with pytest.raises(ValueError, match="trace"):
            make_trace(text, 0)


def test_traces_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n3.5,10,2\n1.5,20,1\n")
    trace = read_trace(path)
    assert (trace.arrival_s.tolist(), trace.prompt_tokens.tolist()) == ([0.0, 2.0], [20, 10])
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n")
    assert read_trace(path).prompt_tokens.tolist() == [4808]
    for row in ("1,x,2", "nan,1,2", "inf,1,2", f"1,{10**20},2", "1,2"):
        path.write_text(f"arrival_s,prompt_tokens,output_tokens\n{row}\n")
        with pytest.raises(ValueError, match="line 2"):
            read_trace(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="begins with"):
        read_trace(path)


def test_a_trace_may_have_any_name_a_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.csv"
    path.write_text("\ufeffarrival_s,prompt_tokens,output_tokens\n1700000000.5,10,2\n\n1700000002,20,1\n\n")
    assert read_trace(path).arrival_s.tolist() == [0.0, 1.5]


def test_configs_that_are_none(tmp_path: Path) -> None:
    good = json.loads(shapes._shipped().joinpath("llama-3-8b.json").read_text())
    for config, said in (
        ([], "object"), (good | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (good | {"hidden_size": "64"}, "hidden_size is '64'"), (good | {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=said):
            shapes.load_shape(str(tmp_path))
    assert shapes.spec_of_config(good | {"architectures": None}, "m").architecture == "llama"


def test_the_first_layout_is_for_the_clients_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """One client is served best by the fast device alone, whatever the trace's rate would be."""
    trace = ("--trace", "poisson:rate=20,prompt=64,output=64,duration=1")
    code, out, _ = simulate(capsys, *trace, "--concurrency", "1", "--json")
    assert code == 0
    assert json.loads(out)["layouts"][0]["layout"] == "w0 a100 [0, 32)"


@pytest.mark.skipif(not AZURE.exists(), reason=f"{AZURE} is not there")
def test_the_azure_trace_is_read() -> None:
    trace = read_trace(AZURE)
    assert len(trace) == len(AZURE.read_text().splitlines()) - 1
    assert np.median(trace.prompt_tokens) == 1020
    assert np.median(trace.output_tokens) == 129


def test_clusters() -> None:
    devices = name_devices(parse_devices("a100:2,L40S"), [2, 0])
    assert [(d.worker, d.label) for d in devices] == [("w0", "l40s"), ("w1", "a100"), ("w2", "a100")]
    for text in ("k80:2", "a100:0", "a100:x", ""):
        with pytest.raises(ValueError, match=r"known are|looks like"):
            parse_devices(text)


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["simulate", "--cluster", "a100:1,l40s:1", "--model", "llama-3-8b", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "small.csv", tmp_path / "out"
    path.write_text(
        "arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{i / 4},{100 + i},{5 + i}\n" for i in range(20))
    )
    code, out, _ = simulate(capsys, "--trace", str(path), "--layout", "l40s:12,a100:20", "--json", "--out", str(folder))
    summary = json.loads(out)
    assert code == 0
    assert (summary["served"], summary["rejected"], summary["unfinished"]) == (20, 0, 0)
    assert [entry["layout"] for entry in summary["layouts"]] == ["w0 l40s [0, 12) | w1 a100 [12, 32)"]
    assert summary["gpu_seconds"] == pytest.approx(2 * summary["seconds"], rel=0.3)
    assert json.loads((folder / "summary.json").read_text()) == summary
    requests = (folder / "requests.csv").read_text().splitlines()
    assert len(requests) == 21
    assert requests[1].startswith("0,0.0,100,5,length,")
    assert (folder / "windows.csv").read_text().splitlines()[1].startswith("0.0,20,20,")
    code, out, _ = simulate(capsys, "--trace", "poisson:rate=4,prompt=64,output=8,duration=10", "--policy", "oracle")
    assert code == 0
    assert out.startswith("SIMULATED: llama-3-8b on a100:1,l40s:1, trace synthetic, policy oracle")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trace", "none.csv"), "none.csv"),
        (("--trace", "poisson:rate=1", "--layout", "a100:12,a100:20"), "no (other) a100"),
        (("--trace", "poisson:rate=1", "--layout", "a100:12,l40s:21"), "33 layers"),
        (("--trace", "poisson:rate=1", "--cluster", "k80:2"), "k80"),
        (("--trace", "poisson:rate=1e8,duration=1e8"), "10,000,000 requests at most"),
        (("--trace", "poisson:rate=1,duration=5", "--out", "/dev/null/out"), "/dev/null"),
        (("--trace", "poisson:rate=1", "--policy", "oracle", "--concurrency", "2"), "leave one out"),
        (("--trace", "poisson:rate=1", "--model", "llama-3-70b", "--cluster", "l4:1"), "needs"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = simulate(capsys, *arguments)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from api.cli import main;"
        "main('simulate --cluster a100 --model llama-3-8b --trace poisson:rate=1,duration=3'.split());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
