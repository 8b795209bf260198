"""Drawing a token from logits, with noise that is a pure function of (seed, token index, token id).

Each token i of the vocabulary gets ``E_i``, a unit exponential variate, and the token with the smallest
``E_i / p_i`` wins. That is the Gumbel-max trick (``argmax(log p_i - log E_i)``, and ``-log E_i`` is Gumbel noise) without its
second logarithm. Nothing is consumed and no state is kept, so the batch, the order of the rows, the device and the
number of threads cannot change what is drawn, and a small change in the logits changes it only near a tie.

The noise is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) as a
counter-based generator: output i of the stream whose state is a hash of seed and token index. The same
64-bit integers come out of the numba loop on a CPU and of the tensor operations elsewhere. All that follows is
done in float64, where the libraries of different devices differ by less than 1e-15, on the logits less their maximum, so that
no temperature overflows.

top_k, top_p and min_p are all thresholds on the logits. They apply in this order, each to what the one before left
and after the temperature; tokens that tie with the last one kept are kept too, which leaves nothing to the
order in which a device sorts.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch

from runtime.cuda.step import upload
from runtime.messages import Sampling

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

_LEAST_TEMPERATURE = 1e-20
_FLOORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
"""Weights down to which the host sorts a distribution, tried in turn."""
_ELEMENTS_AT_ONCE = 1 << 23
"""Bounds the float64 temporaries of the device path to some 64 MiB each."""


def noise_key(seed: int, token_index: int) -> int:
    """The 64-bit state from which the noise of output token `token_index` of a request with `seed` is made."""
    return _mix((_mix((seed + _GAMMA) & _MASK) + (token_index + 1) * _GAMMA) & _MASK)


def draw(logits: torch.Tensor, best: np.ndarray, samplings: Sequence[Sampling], keys: Sequence[int]) -> list[int]:
    """One token for each row of `logits`, float32 ``[M, vocab]``, on any device.

    `best` is the argmax of each row, whose logit must be finite; a logit of -inf is never drawn. The temperatures must be
    positive. `keys` are those of `noise_key`.
    """
    if logits.is_cpu:
        values = logits.numpy()
        return [_draw_host(values[row], int(best[row]), s, keys[row]) for row, s in enumerate(samplings)]
    return draw_with_tensors(logits, best, samplings, keys)


def warm_up() -> None:
    """Compile (or load from the cache) what a CPU needs, so that no request waits for it."""
    _race(np.zeros(300, np.float32), np.zeros(300, np.float32), np.float64(1.0), np.uint64(1), 0)


# -- on the host: a row at a time -----------------------------------------------------------------------------


def _draw_host(x: np.ndarray, best: int, sampling: Sampling, key: int) -> int:
    temperature = max(sampling.temperature, _LEAST_TEMPERATURE)
    with np.errstate(over="ignore"):  # what overflows is infinitely unlikely, which is right
        weights = x - x[best]
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    cut = _cut_host(x, weights, x[best], temperature, sampling)
    if cut > -np.inf:
        weights[x < cut] = 0.0
    return _race(x, weights, np.float64(temperature), np.uint64(key), best)


def _cut_host(x: np.ndarray, weights: np.ndarray, top: np.float32, temperature: float, sampling: Sampling) -> float:
    """The least logit that the filters of a row keep."""
    cut = -np.inf
    vocab = len(x)
    if 0 < sampling.top_k < vocab:
        cut = float(np.partition(x, vocab - sampling.top_k)[vocab - sampling.top_k])
    if sampling.top_p < 1.0:
        cut = _nucleus_cut_host(x, weights, top, temperature, cut, sampling.top_p)
    if sampling.min_p > 0.0:
        cut = max(cut, float(top) + temperature * float(np.log(min(sampling.min_p, 1.0))))
    return cut


def _nucleus_cut_host(
    x: np.ndarray, weights: np.ndarray, top: np.float32, temperature: float, cut: float, top_p: float
) -> float:
    if cut > -np.inf:
        values, wanted = x[x >= cut], None
    else:
        wanted = top_p * float(weights.sum(dtype=np.float64))
        values = x
        for floor in _FLOORS:  # sort only as much of the distribution's top as holds the mass that is wanted
            upper = weights >= floor
            if float(weights[upper].sum()) > wanted * (1 + 1e-5):
                values = x[upper]
                break
    values = np.sort(values)[::-1]
    masses = np.cumsum(np.exp((values.astype(np.float64) - float(top)) / temperature))
    if wanted is None:
        wanted = top_p * masses[-1]
    return float(values[min(np.searchsorted(masses, wanted), len(values) - 1)])


_GAMMA_64, _MIX_1_64, _MIX_2_64 = np.uint64(_GAMMA), np.uint64(_MIX_1), np.uint64(_MIX_2)
_ONE, _SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(1), np.uint64(30), np.uint64(27), np.uint64(31)
_SHIFT_12, _SHIFT_40 = np.uint64(12), np.uint64(40)
_CHUNK = 256


@numba.njit(nogil=True, cache=True)
def _race(x, weights, temperature, key, best):  # pragma: no cover - compiled
    """The token with the least ``E / p``; `weights` is about ``exp((x - x[best]) / temperature)``, 0 where filtered.

    As ``E = -log(1 - u) >= u``, a token cannot win unless ``u < weight * least``. That test, with u cut to 24 bits and
    a margin for the rounding of the weights, vectorises; the few tokens that pass it are computed exactly.
    """
    u = (np.float64(_bits(key, best) >> _SHIFT_12) + 0.5) * 2.0**-52
    least, winner = -np.log1p(-u), best
    low = np.empty(_CHUNK, np.float32)
    for start in range(0, len(x), _CHUNK):
        stop = min(start + _CHUNK, len(x))
        heaviest = np.float32(0.0)
        for i in range(start, stop):
            heaviest = max(heaviest, weights[i])
        if heaviest <= 0.0:
            continue
        for i in range(start, stop):
            low[i - start] = np.float32(_bits(key, i) >> _SHIFT_40) * np.float32(2.0**-24)
        num_passed = 0
        bound = np.float32(least * 1.001)
        for i in range(start, stop):
            num_passed += low[i - start] < weights[i] * bound
        if num_passed == 0:
            continue
        for i in range(start, stop):
            if low[i - start] < weights[i] * bound:
                u = (np.float64(_bits(key, i) >> _SHIFT_12) + 0.5) * 2.0**-52
                time = -np.log1p(-u) * np.exp((np.float64(x[best]) - np.float64(x[i])) / temperature)
                if time < least:
                    least, winner = time, i
    return winner


@numba.njit(nogil=True, cache=True, inline="always")
def _bits(key, i):  # pragma: no cover - compiled
    z = key + np.uint64(i) * _GAMMA_64 + _GAMMA_64
    z = (z ^ (z >> _SHIFT_30)) * _MIX_1_64
    z = (z ^ (z >> _SHIFT_27)) * _MIX_2_64
    return z ^ (z >> _SHIFT_31)


# -- on any device: all rows at once --------------------------------------------------------------------------


def draw_with_tensors(
    logits: torch.Tensor, best: np.ndarray, samplings: Sequence[Sampling], keys: Sequence[int]
) -> list[int]:
    """What `draw` does where there is no host memory to loop over: the same tokens by tensor operations."""
    there = torch.from_numpy(np.asarray(best, dtype=np.int64)).to(logits.device)
    return draw_queued(logits, there, samplings, keys).tolist()


def draw_queued(
    logits: torch.Tensor, best: torch.Tensor, samplings: Sequence[Sampling], keys: Sequence[int]
) -> torch.Tensor:
    """As `draw`, with `best` and the result (int64 ``[M]``) on the device, which is not waited for.

    Rows whose best logit is not finite get some token or other.
    """
    num_rows, vocab = logits.shape
    at_once = max(1, _ELEMENTS_AT_ONCE // vocab)
    winners = [best[:0]]
    for start in range(0, num_rows, at_once):
        rows = slice(start, min(start + at_once, num_rows))
        winners.append(_draw_rows(logits[rows], best[rows], samplings[rows], keys[rows]))
    return torch.cat(winners)


def _draw_rows(
    logits: torch.Tensor, best: torch.Tensor, samplings: Sequence[Sampling], keys: Sequence[int]
) -> torch.Tensor:
    device, vocab = logits.device, logits.shape[1]
    table = [(max(s.temperature, _LEAST_TEMPERATURE), s.top_p, min(s.min_p, 1.0)) for s in samplings]
    temperature, top_p, min_p = upload(np.array(table, dtype=np.float64).T, device).unsqueeze(-1)
    limits = np.array([s.top_k if 0 < s.top_k < vocab else vocab for s in samplings], dtype=np.int64)
    top_k = upload(limits, device)
    top = logits.gather(1, best.unsqueeze(-1))
    cut = top.double() + temperature * min_p.log()
    filters_mass = any(s.top_p < 1.0 for s in samplings)
    longest = vocab if filters_mass else int(np.where(limits < vocab, limits, 0).max())
    if longest:
        values = logits.topk(longest, sorted=True).values
        kth = values.gather(1, (top_k.unsqueeze(-1) - 1).clamp(max=longest - 1))
        unlimited = (top_k >= vocab).unsqueeze(-1)
        cut = torch.where(unlimited, cut, torch.maximum(cut, kth.double()))
        if filters_mass:
            masses = ((values.double() - top) / temperature).exp()
            masses = torch.where(unlimited | (values >= kth), masses, 0.0).cumsum(1)
            last = (masses < top_p * masses[:, -1:]).sum(1, keepdim=True).clamp(max=vocab - 1)
            nucleus = values.gather(1, last).double()
            cut = torch.where(top_p < 1.0, torch.maximum(cut, nucleus), cut)
    times = _exponentials(keys, vocab, device) * ((top.double() - logits) / temperature).exp()
    return torch.where(logits.double() >= cut, times, torch.inf).argmin(1)


def _exponentials(keys: Sequence[int], vocab: int, device: torch.device) -> torch.Tensor:
    """float64 ``[len(keys), vocab]``: the variates of `_race`. Products of int64 tensors wrap as those of uint64 do."""
    z = torch.arange(1, vocab + 1, device=device) * _signed(_GAMMA)
    z = z + upload(np.array([_signed(key) for key in keys], dtype=np.int64), device).unsqueeze(-1)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    z = z ^ _shift(z, 31)
    return -torch.log1p(-(_shift(z, 12).double() + 0.5) * 2.0**-52)


def _shift(z: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right; that of int64 tensors is arithmetic."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)
