"""Emulated devices: the law, the words, and that a worker's own timings show it."""

import msgspec
import pytest
import torch

from kvstore.ids import LayerRange
from runtime.member import Member
from runtime.messages import Join, ProfilePoint, Sampling, StepResult
from runtime.pace import ALIASES, PEAKS, SHARPNESS, Emulation, Pacer, Roofline, parse_pace, parse_paces
from scheduler.batching import BatchingConfig
from scheduler.planning import devices
from scheduler.planning.cost import TERMS, Facts, Work, stage_seconds
from scheduler.planning.emulation import speed_of_worker
from scheduler.request import Request
from scheduler.simulation.shapes import load_shape
from tests.sim.cluster import SimCluster


def test_the_table_is_the_planners() -> None:
    theirs = {kind.name: (kind.bandwidth, kind.flops) for kind in devices.KINDS if kind is not devices.CPU_CORE}
    assert theirs == PEAKS
    for alias, name in ALIASES.items():
        assert devices.lookup(alias).name == name


def test_a_device_is_as_slow_as_its_data_sheet() -> None:
    fastest, a100, l40s = parse_pace("h200"), parse_pace("a100"), parse_pace("L40S")
    assert (fastest.prefill, fastest.decode) == (1.0, 1.0)
    assert l40s.decode / a100.decode == pytest.approx(2.039e12 / 864e9)
    assert l40s.prefill / a100.prefill == pytest.approx(312 / 362)
    assert parse_pace("prefill=1.0, decode=2.4") == Emulation(1.0, 2.4)
    assert parse_pace("decode=2") == Emulation(1.0, 2.0)


@pytest.mark.parametrize(
    "text",
    [
        "k80",
        "",
        "decode=0.5",
        "decode=x",
        "decode=nan",
        "speed=2",
        "prefill=1e9",
        "read=0.1",
        "read=0,token=1",
        "read=1,token=1,head=2",
    ],
)
def test_a_mistake_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pace"):
        parse_pace(text)


def test_an_entry_for_each_worker() -> None:
    assert parse_paces(["a100,l40s"]) == ("a100", "l40s")
    assert parse_paces(["prefill=1,decode=2", "none"]) == ("prefill=1,decode=2", "")
    with pytest.raises(ValueError, match="k80"):
        parse_paces(["a100,k80"])


def test_the_law() -> None:
    emulation = Emulation(prefill=3.0, decode=5.0)
    assert emulation.step_s(0.01, [1, 1, 1, 1], 3) == pytest.approx(0.05)
    assert emulation.step_s(0.01, [100], 3) == pytest.approx(0.03)
    assert emulation.step_s(0.01, [1, 1, 6], 3) == pytest.approx(0.01 * (2 * 5 + 6 * 3) / 8)
    assert emulation.sample_s(0.01) == pytest.approx(0.05)


def test_a_profile_is_stretched_like_steps() -> None:
    emulation, layers = Emulation(prefill=3.0, decode=5.0), LayerRange(0, 4)
    points = [
        ProfilePoint(8, 100, 0, 0, layers, 0.01),
        ProfilePoint(0, 0, 128, 0, layers, 0.01),
        ProfilePoint(8, 1, 0, 8, LayerRange(0, 0), 0.01),
    ]
    assert [emulation.point(point).seconds for point in points] == pytest.approx([0.05, 0.03, 0.05])


class _Clock:
    """Every look at it takes a millisecond; `wait` wakes up too early at first, as a real one may."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.waited_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def wait(self, seconds: float) -> None:
        slept_s = seconds / 2 if seconds > 1e-4 else seconds
        self.now_s += slept_s
        self.waited_s += slept_s


def test_it_waits_until_the_stretched_time_is_over() -> None:
    clock, finished = _Clock(), []
    pacer = Pacer(Emulation(2.0, 4.0), clock, clock.wait, lambda: finished.append(clock.now_s))
    begun_s = clock()
    clock.now_s += 0.1
    pacer.hold_step([1], 3, begun_s)
    assert finished == [pytest.approx(begun_s + 0.1)], "the device was not waited for"
    assert clock.now_s - begun_s == pytest.approx(4 * 0.101, abs=0.003)
    pacer = Pacer(Emulation(1.0, 1.0), clock, clock.wait)
    waited_s = clock.waited_s
    pacer.hold_step([1], 3, clock())
    assert clock.waited_s == pytest.approx(waited_s, abs=1e-9)


def _timings(pacer_of_clock) -> tuple[list[int], list[int]]:
    """Compute and sample microseconds of a request's steps on one real member; its clock moves when it is looked at."""
    cluster = SimCluster(1, num_stages=1, batching=BatchingConfig(block_size=4), num_blocks=60)
    cluster.run(until=0.0)
    worker, clock = cluster.workers["w0"], _Clock()
    worker.member = Member("w0", torch.device("cpu"), worker.store, worker, clock, pacer=pacer_of_clock(clock))
    results: list[StepResult] = []
    deliver = worker.to_head

    def to_head(message) -> None:
        if isinstance(message, StepResult):
            results.append(message)
        deliver(message)

    worker.to_head = to_head
    request = Request("r", [1, 2, 3], Sampling(temperature=0.0), 3)
    cluster.at(1.0, lambda: cluster.submit(1, request))
    cluster.run(until=5.0)
    assert cluster.streams[1].finish_reason == "length"
    results.sort(key=lambda result: result.ordinal)
    return [r.timings[0].compute_us for r in results], [r.timings[0].sample_us for r in results]


def test_a_workers_timings_are_those_of_the_emulated_device() -> None:
    plain, plain_sample = _timings(lambda clock: None)
    paced, paced_sample = _timings(lambda clock: Pacer(Emulation(10.0, 50.0), clock, clock.wait))
    assert plain + plain_sample == pytest.approx([1000] * 6, abs=2), "one look at the clock each"
    assert paced == pytest.approx([10_000, 50_000, 50_000], abs=5000), "a prompt, then decoding"
    assert paced_sample == pytest.approx([50_000] * 3, abs=5000)


def test_the_cost_model_begins_with_the_emulated_speed() -> None:
    def join(pace: tuple[float, float] | None) -> Join:
        return Join("w0", "host", 1, "cpu", "a100 (emulated on AMD EPYC)", 1, 1, 1, {}, "", pace)

    spec = load_shape("smollm2-135m")
    plain, paced = speed_of_worker(spec, join(None)), speed_of_worker(spec, join((3.0, 5.0)))
    assert paced.kind == msgspec.structs.replace(plain.kind, name="a100 (emulated)"), (
        "its times are, and say so in a plan"
    )
    assert dict(zip(TERMS, paced.scale, strict=True)) == {
        "step": 5.0, "layer": 5.0, "weights": 5.0, "products": 3.0, "kv": 5.0, "scores": 3.0, "head": 5.0, "sample": 5.0,
    }  # fmt: skip


def test_the_roofline_law_hides_the_host() -> None:
    law = parse_pace("read=0.005, token=0.0001, name=a100")
    assert law == Roofline(0.005, 0.0001, "a100")
    assert law.step_s(0.001, [1] * 4, 6) == pytest.approx(6 * 0.005, rel=0.01), "reading the weights decides"
    assert law.step_s(0.02, [1] * 4, 6) == law.step_s(0.001, [1] * 4, 6), "what the host does is hidden"
    assert law.step_s(0.001, [500], 6) == pytest.approx(6 * 0.05, rel=0.01), "arithmetic decides"
    assert law.step_s(9.0, [1], 6) == 9.0, "unless the host is slower"
    assert law.sample_s(0.002) == 0.002
    assert law.point(ProfilePoint(8, 100, 0, 0, LayerRange(0, 4), 0.001)).seconds == law.step_s(0.0, [1] * 8, 4)
    assert "emulated on EPYC" in law.label("EPYC")
    assert law.label("EPYC").startswith("a100: 5 ms and 100 us a token")
    assert parse_paces(["read=1,token=1", "a100"]) == ("read=1,token=1", "a100")


@pytest.mark.parametrize(
    ("pace", "shown"),
    [
        ("prefill=1,decode=2.4", "prefill x1, decode x2.4 (emulated)"),
        ("read=0.005,token=0.0001", "5 ms and 100 us a token for each layer (emulated)"),
        ("read=0.005,token=0.0001,name=my gpu", "my gpu (emulated)"),
    ],
)
def test_a_plan_names_the_emulated_device_as_one(pace: str, shown: str) -> None:
    law = parse_pace(pace)
    info = Join("w0", "host", 1, "cpu", law.label("AMD EPYC"), 1, 1, 1, {}, **law.announced())
    assert speed_of_worker(load_shape("smollm2-135m"), info).kind.name == shown


def test_the_cost_model_begins_with_the_law() -> None:
    """Each term of the law by itself, and the corner between them."""
    law = Roofline(0.005, 0.0001, "a100")
    info = Join("w0", "host", 1, "cpu", law.label("AMD EPYC"), 1, 1, 1, {}, **law.announced())
    facts = Facts(load_shape("smollm2-135m"))
    speed = speed_of_worker(facts.spec, info)
    assert speed.kind.name == "a100 (emulated)"
    assert speed.kind.sharpness == SHARPNESS
    for tokens in (1, 50, 500):
        said = stage_seconds(facts, speed, Work(prefill_tokens=tokens, prefill_context=1), range(10), is_last=False)
        assert said == pytest.approx(law.step_s(0.0, [tokens], 10), rel=0.02)
    head_s = stage_seconds(facts, speed, Work(1, 1, 0, 0, 1), range(0), is_last=True)
    assert head_s < 0.01, "the LM head is the host's"
