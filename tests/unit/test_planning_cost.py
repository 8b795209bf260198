"""The cost model against figures worked out by hand, and coefficients that must be found again."""

import math

import msgspec
import numpy as np
import pytest

from kvstore.ids import LayerRange
from runtime.layout import layout_from_counts
from scheduler.planning.calibration import Measurement, Profile, Refiner, correct, predict, prediction_error
from scheduler.planning.cost import (
    QUERY_TILE,
    TERMS,
    Facts,
    Speed,
    Work,
    hop_seconds,
    migration_cost,
    stage_seconds,
    stage_terms,
    unit_times,
    work_of_rows,
)
from scheduler.planning.devices import KINDS, DeviceKind, kind_of_worker, lookup
from tests.planning_harness import llama_70b, make_spec

PLAIN = DeviceKind(
    "plain", "", 10**9, 1e9, 1e12, "made up", bandwidth_fraction=0.5, flops_fraction=0.5, kv_fraction=0.25,
    attention_fraction=0.1, step_s=1e-3, layer_s=1e-4, logit_s=1e-9, sharpness=math.inf, link_latency_s=2e-3,
    link_bytes_per_s=1e6,
)  # fmt: skip
DECODE = Work(decode_rows=4, decode_context=100, samples=4)


def test_a_decode_step_reads_weights_and_kv() -> None:
    spec = make_spec(num_layers=3)
    facts = Facts(spec)
    layer = spec.layer_bytes[0] / 0.5e9 + 4 * 100 * spec.kv_bytes_per_token_layer() / 0.25e9 + 1e-4
    head = spec.lm_head_bytes / 0.5e9 + 4 * spec.vocab_size * 1e-9
    assert stage_seconds(facts, Speed(PLAIN), DECODE, range(2), False) == pytest.approx(1e-3 + 2 * layer)
    assert stage_seconds(facts, Speed(PLAIN), DECODE, range(1), True) == pytest.approx(1e-3 + layer + head)


def test_a_prefill_step_computes() -> None:
    spec = make_spec(num_layers=1)
    work = Work(prefill_tokens=50_000, prefill_context=1000)
    products = 50_000 * spec.layer_flops_per_token[0] / 0.5e12
    scores = 50_000 * 1000 * 4 * spec.num_heads * spec.head_dim / 0.1e12
    kv = 50_000 / QUERY_TILE * 1000 * spec.kv_bytes_per_token_layer() / 0.25e9
    seconds = 1e-3 + 1e-4 + products + max(scores, kv)
    assert stage_seconds(Facts(spec), Speed(PLAIN), work, [0], True) == pytest.approx(seconds)


def test_the_corner_is_rounded() -> None:
    spec = make_spec(num_layers=1)
    rows = spec.layer_bytes[0] / 0.5e9 / (spec.layer_flops_per_token[0] / 0.5e12)  # reading takes as long as computing
    work = Work(decode_rows=rows, decode_context=0)
    sharp = stage_seconds(Facts(spec), Speed(PLAIN), work, [0], False)
    round_ = Speed(msgspec.structs.replace(PLAIN, sharpness=2.0))
    base = 1e-3 + 1e-4
    assert stage_seconds(Facts(spec), round_, work, [0], False) - base == pytest.approx((sharp - base) * math.sqrt(2))


def test_experts_are_read_as_tokens_meet_them() -> None:
    spec = make_spec(num_layers=1, experts=8, experts_per_token=2)
    facts = Facts(spec)
    experts, dense = spec.layer_expert_bytes[0], spec.layer_bytes[0] - spec.layer_expert_bytes[0]

    def reading(rows: float) -> float:
        work = Work(decode_rows=rows)
        return stage_terms(facts, Speed(PLAIN), work, LayerRange(0, 1))[TERMS.index("weights")] * 0.5e9

    assert reading(1) == pytest.approx(dense + experts * 2 / 8)
    assert reading(2) == pytest.approx(dense + experts * (1 - 0.75**2))
    assert reading(100) == pytest.approx(dense + experts)


def test_windows_bound_the_context() -> None:
    facts = Facts(make_spec(num_layers=3, windows=(64, None, 64)))
    times = unit_times(facts, [Speed(PLAIN)], [Work(decode_rows=1, decode_context=640)])
    kv = times.layers[0, 0] - times.layers[0, 0].min()
    assert len(facts.flops) == 2
    assert kv.max() == pytest.approx((640 - 64) * facts.kv_bytes / 0.25e9)


def test_terms_add_up_and_are_derivatives() -> None:
    facts, work = Facts(make_spec(num_layers=4)), Work(16, 200, 60, 90, 17)
    kind = lookup("cpu")
    terms = stage_terms(facts, Speed(kind), work, LayerRange(1, 4), with_head=True)
    assert terms.sum() == pytest.approx(stage_seconds(facts, Speed(kind), work, [1, 2, 3], True))
    for index in range(len(TERMS)):
        scale = [1.0] * len(TERMS)
        scale[index] = 1.0 + 1e-6
        more = stage_seconds(facts, Speed(kind, tuple(scale)), work, [1, 2, 3], True)
        assert (more - terms.sum()) / 1e-6 == pytest.approx(terms[index], rel=1e-3, abs=1e-9)


def test_the_work_of_a_step() -> None:
    work = work_of_rows([(99, 1, True), (199, 1, True), (0, 4, False), (6, 2, True)])
    assert work == Work(
        decode_rows=2,
        decode_context=150,
        prefill_tokens=6,
        prefill_context=(1 + 2 + 3 + 4 + 7 + 8) / 6,
        samples=3,
    )


def test_a_hop_and_a_migration() -> None:
    spec = make_spec(num_layers=4)
    facts = Facts(spec)
    assert hop_seconds(facts, PLAIN, 10) == pytest.approx(2e-3 + 10 * spec.hidden_size * 2 / 1e6)
    before, after = layout_from_counts(1, ["a", "b"], [3, 1]), layout_from_counts(0, ["a", "b"], [1, 3])
    cost = migration_cost(
        facts, before, after, kv_tokens=1000, kv_bytes_per_s=1e6, load_bytes_per_s=1e9, overhead_s=0.5
    )
    kv = 2 * 1000 * spec.kv_bytes_per_token_layer()
    assert (cost.num_layers, cost.weight_bytes, cost.kv_bytes) == (2, 2 * spec.layer_bytes[0], kv)
    assert cost.seconds == pytest.approx(0.5 + kv / 1e6)
    swapped = layout_from_counts(0, ["b", "a"], [1, 3])
    moved = migration_cost(facts, before, swapped, kv_tokens=0, kv_bytes_per_s=1e6, load_bytes_per_s=1e9)
    assert moved.weight_bytes == 2 * spec.layer_bytes[0] + spec.embedding_bytes + spec.lm_head_bytes
    stay = migration_cost(facts, before, before, kv_tokens=1000, kv_bytes_per_s=1e6, load_bytes_per_s=1e9)
    assert stay.seconds == 0.0


@pytest.mark.parametrize(
    ("announced", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD EPYC 9554 64-Core Processor", "cpu-core"),
        ("a100", "a100-80"),
    ],
)
def test_devices_are_known_by_the_name_they_announce(announced: str, kind: str) -> None:
    assert lookup(announced).name == kind


def test_unknown_devices() -> None:
    with pytest.raises(ValueError, match=r"no device called 'abacus'.*l40s"):
        lookup("abacus")
    assert kind_of_worker("cuda:0", "NVIDIA X1", 1).name == "NVIDIA X1"
    assert kind_of_worker("cpu", "whatever", 4).flops == 4 * lookup("cpu").flops
    assert all(kind.source and lookup(kind.name) == kind for kind in KINDS)


def test_an_a100_beats_an_l40s_by_bandwidth_not_by_arithmetic() -> None:
    facts = Facts(llama_70b())
    a100, l40s = Speed(lookup("a100")), Speed(lookup("l40s"))
    decode, prefill = Work(8, 500, samples=8), Work(prefill_tokens=8192, prefill_context=500)
    ratio = [stage_seconds(facts, l40s, work, range(10), False) / stage_seconds(facts, a100, work, range(10), False)
             for work in (decode, prefill)]  # fmt: skip
    assert 2.1 < ratio[0] < 2.5
    assert 0.8 < ratio[1] < 1.2


# -- calibration -------------------------------------------------------------------------------------------------

TRUE = Speed(lookup("cpu"), (1.5, 2.0, 1.4, 0.7, 1.8, 0.6, 1.2, 3.0))


def measured(facts: Facts, work: Work, seconds_factor: float = 1.0) -> list[Measurement]:
    """What a device with the coefficients `TRUE` would measure."""
    parts = [
        Measurement(work, LayerRange(0, 4), 1.0, with_step=True),
        Measurement(work, LayerRange(0, 1), 1.0),
        Measurement(work, LayerRange(0, 0), 1.0, with_head=True),
    ]
    return [msgspec.structs.replace(p, seconds=predict(facts, TRUE, p) * seconds_factor) for p in parts]


def works() -> list[Work]:
    decode = [Work(rows, context, samples=rows) for rows in (1, 4, 16, 64) for context in (16, 256, 1024)]
    return decode + [Work(0, 0, tokens, context, 1) for tokens in (32, 256, 512) for context in (16, 1024)]


def test_a_profile_finds_the_device_again() -> None:
    facts = Facts(make_spec(num_layers=4))
    points = tuple(m for work in works() for m in measured(facts, work))
    start = Speed(lookup("cpu"))
    fitted = correct(facts, start, Profile("cpu", "m", points))
    assert prediction_error(facts, start, points).mape > 0.1
    error = prediction_error(facts, fitted, points)
    assert error.mape < 0.01
    assert abs(error.bias) < 0.005
    told = [index for index, term in enumerate(TERMS) if term != "layer"]  # one per cent of a layer cannot be told
    assert [fitted.scale[i] for i in told] == pytest.approx([TRUE.scale[i] for i in told], rel=0.1)


def test_a_wild_measurement_does_not_spoil_a_profile() -> None:
    facts = Facts(make_spec(num_layers=4))
    points = [m for work in works() for m in measured(facts, work)]
    wild = [msgspec.structs.replace(m, seconds=20 * m.seconds) for m in points[::20]]
    fitted = correct(facts, Speed(lookup("cpu")), Profile("cpu", "m", tuple(points + wild)))
    assert prediction_error(facts, fitted, points).mape < 0.05


def test_what_a_profile_is_silent_about_stays() -> None:
    facts = Facts(make_spec(num_layers=4))
    points = tuple(m for m in measured(facts, DECODE) if not m.with_head)
    fitted = correct(facts, Speed(lookup("cpu")), Profile("cpu", "m", points))
    assert fitted.scale[TERMS.index("head")] == 1.0
    assert fitted.scale[TERMS.index("sample")] == 1.0
    assert correct(facts, fitted, Profile("cpu", "m", ())) == fitted


def test_steps_refine_the_coefficients() -> None:
    facts, rng = Facts(make_spec(num_layers=4)), np.random.default_rng(0)
    refiner, layers = Refiner(facts, Speed(lookup("cpu"))), LayerRange(0, 4)
    errors = []
    for _ in range(600):
        work = Work(float(rng.integers(1, 32)), float(rng.integers(10, 900)), float(rng.choice([0, 0, 128])), 64, 8)
        terms = stage_terms(facts, TRUE, work, layers, with_head=True) * np.exp(rng.normal(0, 0.05))
        slow = 30.0 if rng.random() < 0.02 else 1.0  # somebody else took the core
        refiner.observe(work, layers, is_last=True, compute_s=slow * terms[:6].sum(), sample_s=slow * terms[6:].sum())
        clean = stage_terms(facts, refiner.speed, work, layers, with_head=True).sum() / terms.sum() - 1
        errors.append(abs(float(clean)))
    assert np.mean(errors[:20]) > 0.05
    assert np.mean(errors[-200:]) < 0.07
    assert refiner.error.count == 600
    assert refiner.error.mape < 0.12


def test_a_device_that_becomes_slower_is_followed_within_bounds() -> None:
    facts, layers = Facts(make_spec(num_layers=4)), LayerRange(0, 4)
    refiner = Refiner(facts, Speed(lookup("cpu")))
    normal = stage_terms(facts, Speed(lookup("cpu")), DECODE, layers).sum()
    for factor in (1.0, 2.0):
        for _ in range(200):
            refiner.observe(DECODE, layers, is_last=False, compute_s=factor * normal)
    assert stage_terms(facts, refiner.speed, DECODE, layers).sum() == pytest.approx(2 * normal, rel=0.05)
    for _ in range(2000):
        refiner.observe(DECODE, layers, is_last=False, compute_s=1000 * normal)
    assert max(refiner.speed.scale) <= 8.0 * (1 + 1e-9)
    refiner.observe(DECODE, layers, is_last=False, compute_s=0.0)
    assert refiner.error.count == 2400


def test_profiles_travel_as_json() -> None:
    facts = Facts(make_spec(num_layers=4))
    profile = Profile("cpu", "m", tuple(measured(facts, DECODE)))
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile
