"""What the operator wants of the autopilot. Pure."""

import msgspec

from scheduler.planning.traffic import Objective, Slo


class Settings(msgspec.Struct, frozen=True):
    """What the operator wants, and how eager to be about it.

    `min_gain` is relative; `overhead` the share of the service that a change takes while it goes on, `change_s` what it is
    taken to cost beyond that and `layer_s` for each layer moved (seconds of service). `pressure_at` is the utilization from which on capacity is worth all that it
    promises. Of two proposals the one that pays more within `nearer_s` is taken. `elastic`: use no more workers than the load
    needs. `tells_workers`: somebody is told how many workers are wanted, so that is looked at in mode "off" as well. `snapshot_bytes_per_s` is what a change may put on each source's network while it serves; `kv_bytes_per_s` and
    `load_bytes_per_s` are what is expected of it before one was seen.
    """

    objective: Objective = "throughput"
    slo: Slo = Slo()
    elastic: bool = False
    tells_workers: bool = False
    interval_s: float = 2.0
    min_gain: float = 0.03
    min_stay_s: float = 15.0
    half_life_s: float = 60.0
    horizon_s: float = 600.0
    pay_back: float = 2.0
    overhead: float = 0.15
    change_s: float = 0.5
    layer_s: float = 0.05
    min_age_s: float = 3.0
    min_requests: int = 4
    settle_s: float = 3.0
    verify_s: float = 10.0
    verify_tokens: int = 200
    retry_s: float = 60.0
    shrink_after_s: float = 60.0
    pressure_at: float = 0.7
    nearer_s: float = 60.0
    headroom: float = 0.1
    snapshot_bytes_per_s: int = 200_000_000
    kv_bytes_per_s: float = 50e6
    load_bytes_per_s: float = 200e6
