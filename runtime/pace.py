"""Emulated devices: a worker that waits after its work, so that it is as slow as another device would be.

The law: a forward pass that took t seconds over d decode rows (rows of one token) and p prompt tokens lasts

    t * (d * decode + p * prefill) / (d + p)

and the LM head with sampling, which reads weights for a few rows, t * `decode`. So mixed steps count by their tokens. The
worker sleeps for the rest; what it reports of the step (`HopTiming`) is the stretched time, so whoever learns from steps
learns the emulated device. A device by its name is as much slower than the fastest one of the table as its data sheet says:
in bandwidth for `decode`, in FLOP/s for `prefill`.

That law multiplies the host's noise as well. The *roofline law* does not: the pass over n layers and T rows lasts

    n (read^4 + (T token)^4)^(1/4)

seconds, `read` for a layer's weights and `token` for a row's arithmetic in a layer, or the host's own time where that is
longer. With a small model the host is done long before, so that its noise disappears in the wait, and devices keep the
ratio of their data sheets, memory to arithmetic: one is fast at decoding, another one at prompts. The LM head costs nothing
but the host's time.

Never true: an emulated worker passes for a real one, its name says what it is; something else than steps is slowed (loading,
copying and the network are the host's own), or sped up: no factor is below 1.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import msgspec

from runtime.messages import ProfilePoint

PEAKS: dict[str, tuple[float, float]] = {
    "h200": (4.8e12, 989e12),
    "h100-pcie": (2.0e12, 756e12),
    "h100": (3.35e12, 989e12),
    "a100-40": (1.555e12, 312e12),
    "a100-pcie": (1.935e12, 312e12),
    "a100-80": (2.039e12, 312e12),
    "l40s": (864e9, 362e12),
    "l4": (300e9, 121e12),
    "a10": (600e9, 125e12),
    "rtx-4090": (1008e9, 165e12),
}
"""Bytes/s and dense bfloat16 FLOP/s: those of `scheduler.planning.devices`, which this floor cannot see (a test compares)."""

ALIASES = {"a100": "a100-80", "4090": "rtx-4090"}
MAX_FACTOR = 1000.0
MAX_LAYER_S = 10.0
SHARPNESS = 4.0
"""Of the roofline's corner: what `scheduler.planning.devices` assumes of a GPU."""


class Emulation(msgspec.Struct, frozen=True):
    """What a worker pretends to be: factors of at least 1 on the time of prompt tokens and of decode rows.

    `name` is the device's in the table, or empty when only factors were given.
    """

    prefill: float
    decode: float
    name: str = ""

    def step_s(self, seconds: float, tokens_of_rows: Iterable[int], num_layers: int) -> float:
        """How long a forward pass lasts that took `seconds`, over rows of so many tokens each."""
        decode_rows = prefill_tokens = 0
        for num_tokens in tokens_of_rows:
            if num_tokens == 1:
                decode_rows += 1
            else:
                prefill_tokens += num_tokens
        return seconds * (decode_rows * self.decode + prefill_tokens * self.prefill) / (decode_rows + prefill_tokens)

    def sample_s(self, seconds: float) -> float:
        """How long the LM head and sampling last that took `seconds`."""
        return seconds * self.decode

    def point(self, point: ProfilePoint) -> ProfilePoint:
        """What the emulated device would have measured in its profile."""
        if point.samples:
            seconds = self.sample_s(point.seconds)
        else:
            seconds = point.seconds * (self.decode if point.decode_rows else self.prefill)
        return msgspec.structs.replace(point, seconds=seconds)

    def label(self, host: str) -> str:
        """The device's name to announce, when `host` is what it runs on."""
        name = self.name or f"prefill x{self.prefill:g}, decode x{self.decode:g}"
        return f"{name} (emulated on {host})"

    def announced(self) -> dict[str, tuple[float, float]]:
        """The fields of `Join` that tell of it."""
        return {"pace": (self.prefill, self.decode)}


class Roofline(msgspec.Struct, frozen=True):
    """A device by the roofline law: seconds to read a layer's weights, and for the arithmetic of a row in a layer."""

    read_s: float
    token_s: float
    name: str = ""

    def step_s(self, seconds: float, tokens_of_rows: Iterable[int], num_layers: int) -> float:
        """How long a forward pass of so many layers lasts that took the host `seconds`."""
        arithmetic_s = self.token_s * sum(tokens_of_rows)
        return max(seconds, num_layers * (self.read_s**SHARPNESS + arithmetic_s**SHARPNESS) ** (1 / SHARPNESS))

    def sample_s(self, seconds: float) -> float:
        return seconds

    def point(self, point: ProfilePoint) -> ProfilePoint:
        """What the emulated device would have measured in its profile."""
        if point.samples:
            return point
        rows = [1] * point.decode_rows + [point.prefill_tokens]
        return msgspec.structs.replace(point, seconds=self.step_s(point.seconds, rows, len(point.layers)))

    def label(self, host: str) -> str:
        """The device's name to announce, when `host` is what it runs on."""
        law = f"{1e3 * self.read_s:g} ms and {1e6 * self.token_s:g} us a token for each layer"
        return f"{self.name + ': ' if self.name else ''}{law} (emulated on {host})"

    def announced(self) -> dict[str, tuple[float, float]]:
        """The fields of `Join` that tell of it."""
        return {"roofline": (self.read_s, self.token_s)}


Law: TypeAlias = Emulation | Roofline


def parse_pace(text: str) -> Law:
    """``a100``, or ``prefill=1.0,decode=2.4`` (either may be left out: 1), or ``read=0.005,token=0.0001,name=a100`` (seconds).

    Raises:
        ValueError: what is wrong, and what would be right.
    """
    text = text.strip()
    if "=" not in text:
        return _of_device(text)
    if text.startswith(("read=", "token=", "name=")):
        return _roofline(text)
    factors = {"prefill": 1.0, "decode": 1.0}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in factors:
            raise ValueError(f"pace: {key!r} is no factor; it looks like prefill=1.0,decode=2.4")
        try:
            factors[key] = float(value)
        except ValueError:
            raise ValueError(f"pace: {key}={value} is no number; it looks like prefill=1.0,decode=2.4") from None
        if not 1.0 <= factors[key] <= MAX_FACTOR:
            raise ValueError(f"pace: {key}={value}; a device can be slowed by 1 to {MAX_FACTOR:g}, not sped up")
    return Emulation(factors["prefill"], factors["decode"])


def parse_paces(texts: Sequence[str]) -> tuple[str, ...]:
    """One entry for each worker, from options that hold several devices (``a100,l40s``) or one pair of factors each.

    ``none`` stands for a worker that is not slowed; its entry is empty.

    Raises:
        ValueError: as `parse_pace`.
    """
    entries: list[str] = []
    for text in texts:
        entries += [text] if "=" in text else text.split(",")
    entries = ["" if entry.strip().lower() == "none" else entry.strip() for entry in entries]
    for entry in filter(None, entries):
        parse_pace(entry)
    return tuple(entries)


def _roofline(text: str) -> Roofline:
    parts = (part.partition("=") for part in text.split(","))
    fields = {key.strip(): value.strip() for key, _, value in parts}
    try:
        law = Roofline(float(fields.pop("read")), float(fields.pop("token")), fields.pop("name", ""))
    except (KeyError, ValueError):
        raise ValueError(f"pace: {text!r} is no roofline; it looks like read=0.005,token=0.0001,name=a100") from None
    if fields:
        raise ValueError(f"pace: {', '.join(fields)} is nothing that a roofline has; it has read, token and name")
    if not (0 < law.read_s <= MAX_LAYER_S and 0 < law.token_s <= MAX_LAYER_S):
        raise ValueError(f"pace: {text!r}; seconds of a layer are above 0 and at most {MAX_LAYER_S:g}")
    return law


def _of_device(name: str) -> Emulation:
    wanted = name.lower()
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in PEAKS:
        known = ", ".join((*PEAKS, *ALIASES))
        raise ValueError(
            f"pace: no device called {name!r} is in the table; known are {known}; or prefill=1.0,decode=2.4"
        )
    bandwidth, flops = PEAKS[wanted]
    fastest = max(peak for peak, _ in PEAKS.values()), max(peak for _, peak in PEAKS.values())
    return Emulation(prefill=fastest[1] / flops, decode=fastest[0] / bandwidth, name=name.lower())


class Pacer:
    """Holds the compute thread until the emulated device would be done.

    `clock` gives seconds; ``wait(seconds)`` returns after at least so long; `finish` returns when the device has done all
    that it was given (a GPU computes behind its caller's back).
    """

    def __init__(
        self,
        emulation: Law,
        clock: Callable[[], float],
        wait: Callable[[float], None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._emulation = emulation
        self._clock, self._wait, self._finish = clock, wait, finish

    def hold_step(self, tokens_of_rows: Iterable[int], num_layers: int, begun_s: float) -> None:
        """The forward pass that began at `begun_s` has been issued: return when it would be over."""
        self._finish()
        self._until(begun_s + self._emulation.step_s(self._clock() - begun_s, tokens_of_rows, num_layers))

    def hold_sampling(self, begun_s: float) -> None:
        """The same for the LM head and sampling."""
        self._finish()
        self._until(begun_s + self._emulation.sample_s(self._clock() - begun_s))

    def _until(self, end_s: float) -> None:
        while (left_s := end_s - self._clock()) > 0:
            self._wait(left_s)
