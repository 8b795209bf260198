"""How fast a worker is by what it announces, emulation included. Pure.

An emulated device (`runtime.pace`) stretches the host's own time: by one factor where rows decode, by another where a prompt
is read. The cost model has no such split, but terms that are bound by memory and terms that are bound by arithmetic, and
what decoding and reading prompts are bound by are just these. So the factors become coefficients, where learning begins.
A device by the roofline law is one of a kind: its bandwidth and rate are those at which a layer of this very model, the
mean one, takes the seconds of the law. What attention and the LM head cost is the host's.

Never true: an emulated worker is taken for the device in the data sheet; it is its host, slowed.
"""

import msgspec

from runtime.messages import Join
from runtime.model.spec import ModelSpec
from scheduler.planning.cost import TERMS, Speed
from scheduler.planning.devices import kind_of_worker

_ARITHMETIC = ("products", "scores")
_SHARPNESS = 4.0
"""`runtime.pace.SHARPNESS` (a test compares)."""


def speed_of_worker(spec: ModelSpec, info: Join, num_threads: int = 1) -> Speed:
    """The speed to expect of a worker before any of its steps was seen."""
    return speed_of_make(spec, info.device, info.device_name, num_threads, info.pace, info.roofline)


def speed_of_make(
    spec: ModelSpec,
    device: str,
    device_name: str,
    num_threads: int,
    pace: tuple[float, float] | None,
    roofline: tuple[float, float] | None = None,
) -> Speed:
    """The same from the fields of `Join`."""
    speed = Speed(kind_of_worker(device, device_name, num_threads))
    law = device_name.partition(" (emulated on ")[0]
    name, is_named, _ = law.partition(": ")
    if roofline is not None:
        return by_roofline(spec, speed, name if is_named else law, *roofline)
    if pace is None:
        return speed
    slowed = emulated(speed, *pace)
    return msgspec.structs.replace(slowed, kind=msgspec.structs.replace(slowed.kind, name=f"{law} (emulated)"))


def emulated(speed: Speed, prefill: float, decode: float) -> Speed:
    """`speed` slowed by these factors."""
    factors = (prefill if term in _ARITHMETIC else decode for term in TERMS)
    return Speed(speed.kind, tuple(a * b for a, b in zip(speed.scale, factors, strict=True)))


def by_roofline(spec: ModelSpec, host: Speed, name: str, read_s: float, token_s: float) -> Speed:
    """A device to which a mean layer costs so much, on a host that does the rest."""
    kind = host.kind
    bandwidth = sum(spec.layer_bytes) / spec.num_layers / read_s
    flops = sum(spec.layer_flops_per_token) / spec.num_layers / token_s
    slowed = msgspec.structs.replace(
        kind,
        name=f"{name} (emulated)",
        source="the law of an emulation",
        bandwidth=bandwidth,
        flops=flops,
        bandwidth_fraction=1.0,
        flops_fraction=1.0,
        kv_fraction=kind.kv_fraction * kind.bandwidth / bandwidth,
        attention_fraction=kind.attention_fraction * kind.flops / flops,
        step_s=1e-6,
        layer_s=1e-8,
        sharpness=_SHARPNESS,
    )
    head = bandwidth / (kind.bandwidth_fraction * kind.bandwidth)
    return Speed(slowed, tuple(head * b if term == "head" else b for term, b in zip(TERMS, host.scale, strict=True)))
