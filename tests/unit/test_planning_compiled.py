"""The compiled loops: that each is compiled once and for all, without a cache too, and that laws are the same for numbers and arrays."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from runtime.layout import layout_from_counts
from scheduler.compiling import prepare
from scheduler.planning import compiled
from scheduler.planning.cost import TERMS, Facts, Speed, unit_times
from scheduler.planning.devices import lookup
from scheduler.planning.forecast import Cluster, Device, Forecaster
from scheduler.planning.planner import default_counts, plan
from scheduler.planning.traffic import Objective, Serving, Traffic, mean_steps
from tests.planning_harness import make_spec

ROOT = Path(__file__).parents[2]


def cluster_of(num_devices: int, memory: int = 0) -> list[Device]:
    kinds = ("a100", "l40s", "cpu")
    return [
        Device(f"w{i}", Speed(lookup(kinds[i % 3]), tuple(1.0 + 0.1 * np.arange(i, i + len(TERMS)))), memory)
        for i in range(num_devices)
    ]


@pytest.mark.parametrize("objective", ["throughput", "latency", "goodput"])
@pytest.mark.parametrize("num_devices", [3, 10])
def test_no_plan_compiles_anything_that_was_not_prepared(objective: Objective, num_devices: int) -> None:
    """What compiles in an event loop stops it for seconds: arrays of another kind than declared would."""
    prepare()
    present = layout_from_counts(0, ["w1", "w0"], [4, 8])
    for windows in ((), (64, None) * 6):
        facts = Facts(make_spec(num_layers=12, windows=windows))
        need = int(facts.layer_bytes.sum()) + 2 * facts.spec.embedding_bytes
        for memory in (0, need * 3 // 4):
            devices = cluster_of(num_devices, memory)
            for traffic in (Traffic(concurrency=2), Traffic(concurrency=400), Traffic(requests_per_s=0.5)):
                plan(facts, devices, traffic, objective=objective)
                plan(facts, devices, traffic, objective=objective, present=present, error=0.05)
                plan(facts, devices, traffic, objective=objective, present=present, keep_order=True)
    for kernel, arguments in compiled.build.KERNELS:
        assert kernel.signatures == [arguments], kernel.py_func.__name__


def test_no_kernel_is_called_by_another() -> None:
    """Read from disk behind its caller, it would lack a part of its constants, and a plan would end in numba's own error."""
    kernels = {kernel.py_func.__name__ for kernel, _ in compiled.build.KERNELS}
    for module in (compiled.bottlenecks, compiled.convoys, compiled.forecasts, compiled.steps):
        compiled_ones = {each.py_func for each in vars(module).values() if hasattr(each, "py_func")}
        for function in compiled_ones:
            assert not kernels & set(function.__code__.co_names), function.__name__


def test_the_layout_to_start_with_needs_no_compiler() -> None:
    """It is asked for in the head's event loop."""
    script = (
        "import sys; from scheduler.planning.planner import default_counts;"
        "from tests.unit.test_planning_compiled import cluster_of; from scheduler.planning.cost import Facts;"
        "from tests.planning_harness import make_spec; default_counts(Facts(make_spec()), cluster_of(3));"
        "sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
    assert sum(default_counts(Facts(make_spec()), cluster_of(3))) == 30


def test_without_a_place_for_the_cache_it_compiles_all_the_same(tmp_path: Path) -> None:
    script = (
        "from numba.core import caching\n"
        "impl = getattr(caching, 'CacheImpl', None) or caching._CacheImpl\n"
        "impl._locator_classes = []\n"  # as where no directory can be written to
        "from scheduler.planning import compiled\n"
        "import numpy as np\n"
        "assert compiled.bottlenecks.can_hold(np.ones((4, 3)), 3, 3)\n"
        "assert not compiled.bottlenecks.can_hold(np.ones((4, 3)), 3, 4)\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment).returncode == 0
    assert not list(tmp_path.iterdir())


def test_what_is_on_no_disk_is_compiled_by_another_process(tmp_path: Path) -> None:
    """A server that compiles takes the interpreter's lock, and half a core, from the requests that it has."""
    script = (
        "from scheduler import compiling\n"
        "from scheduler.planning import compiled\n"
        "compiling.prepare()\n"
        "kernels = [kernel for kernel, _ in compiled.build.KERNELS]\n"
        "assert kernels and all(sum(kernel.stats.cache_hits.values()) == 1 for kernel in kernels)\n"
        "assert not any(kernel.stats.cache_misses for kernel in kernels)\n"
        "compiling._compile_elsewhere = None\n"  # is not asked again
        "compiling.prepare()\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
    (index, *_) = tmp_path.rglob("*.nbi")
    index.unlink()
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


def test_where_another_process_cannot_compile_this_one_does(tmp_path: Path) -> None:
    script = (
        "import sys; from scheduler import compiling; from scheduler.planning import compiled; sys.executable = '/bin/false'\n"
        "compiling.prepare(); assert compiled.build.is_cached()\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize("in_service", [1.0, 3.0, 40.0])
def test_the_loops_see_the_units_that_numpy_sees(experts: int, in_service: float) -> None:
    facts = Facts(
        make_spec(num_layers=6, windows=(64, None) * 3, experts=experts, experts_per_token=2 if experts else 0)
    )
    devices, traffic, serving = cluster_of(4), Traffic(prompt_tokens=300, output_tokens=40, cached_tokens=50), Serving()
    cluster = Cluster(facts, devices)
    steps = mean_steps(traffic, serving, cluster.pieces, 3, 3, in_service)
    units = unit_times(facts, cluster.speeds, steps.works)
    seen, stage = np.empty((3, 1)), np.empty((4, 1, 4))
    layers, last = np.empty((4, 1, 4, 2)), np.empty((4, 1, 4))
    law = Forecaster(facts, cluster, traffic, serving).law
    compiled.steps.unit_rows(law, np.array([3]), np.array([3.0]), np.array([in_service]), seen, stage, layers, last)
    assert seen[:, 0] == pytest.approx([steps.in_flight[0], steps.requests[0], steps.prefill_share[0]], rel=1e-12)
    np.testing.assert_allclose(stage[:2, 0], units.fixed + cluster.hops(steps.works), rtol=1e-12)
    np.testing.assert_allclose(layers[:2, 0], units.layers, rtol=1e-12)
    np.testing.assert_allclose(last[:2, 0], units.last, rtol=1e-12)
    share = steps.prefill_share[0]
    np.testing.assert_allclose(layers[2, 0], (1 - share) * units.layers[0] + share * units.layers[1], rtol=1e-12)
