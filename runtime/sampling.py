"""From logits to tokens, on the last worker: penalties, filters, the draw, and log-probabilities.

A row's logits are processed in this order: `logit_bias`; the ban on tokens before `min_tokens`; the repetition penalty (tokens
of prompt and output); the frequency and presence penalties (output only); the temperature; top_k, top_p, min_p; the
draw (`runtime.draw`). Log-probabilities are those of the model itself, before any of it.

Greedy rows without extras, the usual case, cost one argmax over the batch. Only rows with extras are copied and
processed, all of them at once. Of tokens that tie, the lowest id is the greater everywhere except in the draw.

Never true: the token of a row depends on the other rows; a row with a NaN or an infinity as its largest logit
yields a token (it is reported as failed instead).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from runtime.cuda.step import upload
from runtime.draw import draw, draw_queued, noise_key
from runtime.draw import warm_up as warm_up_draw
from runtime.messages import Sampling, TokenLogprobs

FAILED_TOKEN = -1
"""Stands in `SampleOutput.tokens` for the token of a failed row."""

_ELEMENTS_AT_ONCE = 1 << 23
"""Bounds the temporaries of `prompt_logprobs` to 32 MiB each."""


class TokenHistory:
    """The distinct tokens of a sequence, and how often each is in the output. `add` is O(1); nothing is ever rebuilt."""

    __slots__ = ("_counts", "_ids", "_slots")

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()):
        self._slots: dict[int, int] = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        size = max(64, 2 * len(self._slots))
        self._ids = np.zeros(size, dtype=np.int64)
        self._ids[: len(self._slots)] = list(self._slots)
        self._counts = np.zeros(size, dtype=np.float32)
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        """One more output token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 ``[num_distinct]``: the distinct tokens of prompt and output. A view."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> np.ndarray:
        """float32 ``[num_distinct]``: how often each of `ids` is in the output. A view."""
        return self._counts[: len(self._slots)]


@dataclass(slots=True)
class SamplingRow:
    """What there is to know of one row: `token_index` output tokens come before the one to be sampled.

    `history` must be there when ``sampling.needs_history``, and up to date.
    """

    sampling: Sampling
    token_index: int
    history: TokenHistory | None = None


@dataclass(slots=True)
class SampleOutput:
    """One entry in `tokens` per row; `logprobs` aligns with it, or is empty when no row asked for any.

    `failed` lists the rows whose logits were not finite, or of which no token was allowed; their token is
    `FAILED_TOKEN`.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)


def sample(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    first: torch.Tensor | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> SampleOutput:
    """One token for each row of `logits`, float32 ``[len(rows), vocab]``, on any device. The logits are not changed.

    For devices whose work is queued: `first` is what `likeliest` says of them, and perhaps of rows after them, if that is known already;
    `meanwhile` is called once before they are waited for.
    """
    assert logits.shape[0] == len(rows), f"{len(rows)} rows for logits of {list(logits.shape)}"
    if not rows:
        return SampleOutput([])
    logits = logits.detach().float()
    if not logits.is_cpu:
        return sample_queued(logits, rows, first, meanwhile)
    best, is_finite = _argmax(logits)
    tokens = best.tolist()
    failed = set() if is_finite.all() else set(np.flatnonzero(~is_finite).tolist())
    special = [r for r, row in enumerate(rows) if not (_is_plain_greedy(row) or r in failed)]
    if special:
        failed.update(_sample_special(logits, rows, special, tokens))
    for row in failed:
        tokens[row] = FAILED_TOKEN
    return SampleOutput(tokens, _sampled_logprobs(logits, rows, tokens), sorted(failed))


def sample_queued(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    first: torch.Tensor | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> SampleOutput:
    """As `sample`, of float32 logits on a device whose work is queued: everything is, and then it is waited for, once.

    (Log-probabilities, for whom they were asked, wait again.)
    """
    first, count = likeliest(logits) if first is None else first, len(rows)
    special = [r for r, row in enumerate(rows) if not _is_plain_greedy(row)]
    if special:
        tokens, is_finite = first[0, :count], first[1, :count].bool()
        there = upload(np.array(special, dtype=np.int64), logits.device)
        best, still_finite = _queue_special(logits, [rows[r] for r in special], there, tokens)
        is_finite[there] &= still_finite
        first = torch.stack([tokens.index_copy(0, there, best), is_finite.long()])
    meanwhile()
    found, finite = first.cpu()[:, :count].tolist()
    failed = [r for r, fine in enumerate(finite) if not fine]
    for row in failed:
        found[row] = FAILED_TOKEN
    return SampleOutput(found, _sampled_logprobs(logits, rows, found), failed)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """int64 ``[2, N]`` for logits ``[N, vocab]``: the first largest of each row, and 1 where it is finite. A NaN counts as largest.

    In two steps, for devices: of a single row one kernel reads all, with as many threads as it has for one row.
    """
    rows, vocab = logits.shape
    parts = next(parts for parts in (32, 16, 8, 4, 2, 1) if vocab % parts == 0)
    largest, places = logits.reshape(rows, parts, -1).max(2)
    largest, chosen = largest.max(1)
    tokens = chosen * (vocab // parts) + places.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return torch.stack([tokens, torch.isfinite(largest).long()])


def prompt_logprobs(logits: torch.Tensor, targets: torch.Tensor | Sequence[int], top: int) -> list[TokenLogprobs]:
    """The log-probability of ``targets[i]`` under row i of `logits`, ``[N, vocab]``, with `top` alternatives each."""
    num_rows, vocab = logits.shape
    targets = torch.as_tensor(targets, dtype=torch.int64, device=logits.device)
    assert targets.shape == (num_rows,), f"targets of {list(targets.shape)} for logits of {list(logits.shape)}"
    at_once = max(1, _ELEMENTS_AT_ONCE // vocab)
    result = []
    for start in range(0, num_rows, at_once):
        stop = min(start + at_once, num_rows)
        result += _logprobs(logits[start:stop].detach().float(), targets[start:stop], [top] * (stop - start))
    return result


def warm_up() -> None:
    """Compile what the draw needs on a CPU; call it while loading."""
    warm_up_draw()


# -- tokens ---------------------------------------------------------------------------------------------------


def _is_plain_greedy(row: SamplingRow) -> bool:
    sampling = row.sampling
    return sampling.temperature == 0.0 and not _is_edited(row)


def _is_edited(row: SamplingRow) -> bool:
    s = row.sampling
    return bool(s.logit_bias) or s.needs_history or (row.token_index < s.min_tokens and bool(s.banned_until_min_tokens))


def _argmax(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int64 and bool ``[N]``: the first largest logit of each row, and whether it is finite. A NaN counts as largest."""
    if logits.is_cpu:
        values = logits.numpy()  # ten times as fast as torch here
        best = values.argmax(1)
        return best, np.isfinite(values[np.arange(len(best)), best])
    largest, best = logits.max(1)
    packed = torch.stack([best, torch.isfinite(largest).long()]).cpu().numpy()
    return packed[0], packed[1].astype(bool)


def _sample_special(
    logits: torch.Tensor, rows: Sequence[SamplingRow], special: list[int], tokens: list[int]
) -> list[int]:
    """Put the tokens of the rows in `special` into `tokens`; returns those that allow no token at all."""
    chosen = [rows[r] for r in special]
    must_edit = any(_is_edited(row) for row in chosen)
    if must_edit or len(special) < len(rows):
        logits = logits[torch.tensor(special, device=logits.device)]
    if must_edit:
        _edit(logits, chosen)
        best, is_finite = _argmax(logits)
    else:
        best, is_finite = np.array([tokens[r] for r in special]), np.ones(len(special), dtype=bool)
    for r, token in zip(special, best.tolist(), strict=True):
        tokens[r] = token
    drawn = [i for i, row in enumerate(chosen) if row.sampling.temperature > 0.0 and is_finite[i]]
    if drawn:
        if len(drawn) < len(special):
            logits = logits[torch.tensor(drawn, device=logits.device)]
        keys = [noise_key(chosen[i].sampling.seed, chosen[i].token_index) for i in drawn]
        for i, token in zip(drawn, draw(logits, best[drawn], [chosen[i].sampling for i in drawn], keys), strict=True):
            tokens[special[i]] = token
    return [special[i] for i in np.flatnonzero(~is_finite).tolist()]


def _queue_special(
    logits: torch.Tensor, chosen: Sequence[SamplingRow], there: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the rows `chosen`, whose indices are `there`, and whether they have any; of them `tokens` are the likeliest."""
    must_edit = any(_is_edited(row) for row in chosen)
    if must_edit or len(chosen) < len(logits):
        logits, tokens = logits.index_select(0, there), tokens.index_select(0, there)
    is_finite = torch.ones_like(tokens, dtype=torch.bool)
    if must_edit:
        _edit(logits, chosen)
        largest, tokens = logits.max(1)
        is_finite = torch.isfinite(largest)
    drawn = [i for i, row in enumerate(chosen) if row.sampling.temperature > 0.0]
    if drawn:
        where = upload(np.array(drawn, dtype=np.int64), logits.device)
        if len(drawn) < len(chosen):
            logits = logits.index_select(0, where)
        keys = [noise_key(chosen[i].sampling.seed, chosen[i].token_index) for i in drawn]
        best = draw_queued(logits, tokens.index_select(0, where), [chosen[i].sampling for i in drawn], keys)
        tokens = tokens.index_copy(0, where, best)
    return tokens, is_finite


def _edit(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Apply biases, bans and penalties to ``[len(rows), vocab]`` in place."""
    biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.sampling.logit_bias]
    if biases:
        at_row, at_token, bias = zip(*biases, strict=True)
        where = _where(logits, at_row, at_token)
        logits.index_put_(where, upload(np.array(bias, dtype=np.float32), logits.device), accumulate=True)
    bans = [
        (i, token)
        for i, row in enumerate(rows)
        if row.token_index < row.sampling.min_tokens
        for token in row.sampling.banned_until_min_tokens
    ]
    if bans:
        logits[_where(logits, *zip(*bans, strict=True))] = -torch.inf
    penalised = [(i, row) for i, row in enumerate(rows) if row.sampling.needs_history]
    if penalised:
        _penalise(logits, penalised)


def _penalise(logits: torch.Tensor, penalised: list[tuple[int, SamplingRow]]) -> None:
    histories, penalties = [], []
    for _, row in penalised:
        assert row.history is not None, "a row with penalties came without its history"
        histories.append(row.history)
        s = row.sampling
        penalties.append((s.repetition_penalty, s.frequency_penalty, s.presence_penalty))
    lengths = [len(history.ids) for history in histories]
    where = _where(
        logits, np.repeat([i for i, _ in penalised], lengths), np.concatenate([history.ids for history in histories])
    )
    table = np.repeat(np.array(penalties, dtype=np.float32), lengths, axis=0)
    counts = np.concatenate([history.counts for history in histories])
    table = np.column_stack([table, counts]).T.copy()
    repetition, frequency, presence, counts = upload(table, logits.device)
    values = logits[where]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[where] = values - frequency * counts - presence * (counts > 0)


def _where(
    logits: torch.Tensor, rows: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    index = np.array([rows, tokens], dtype=np.int64)
    assert not index.size or int(index[1].max()) < logits.shape[1], f"a token id is not below {logits.shape[1]}"
    there = upload(index, logits.device)
    return there[0], there[1]


# -- log-probabilities ----------------------------------------------------------------------------------------


def _sampled_logprobs(
    logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]
) -> list[TokenLogprobs | None]:
    if all(row.sampling.logprobs < 0 for row in rows):
        return []
    asking = [r for r, row in enumerate(rows) if row.sampling.logprobs >= 0 and tokens[r] != FAILED_TOKEN]
    result: list[TokenLogprobs | None] = [None] * len(rows)
    if asking:
        targets = torch.tensor([tokens[r] for r in asking], device=logits.device)
        selected = logits[torch.tensor(asking, device=logits.device)] if len(asking) < len(rows) else logits
        for r, entry in zip(
            asking, _logprobs(selected, targets, [rows[r].sampling.logprobs for r in asking]), strict=True
        ):
            result[r] = entry
    return result


def _logprobs(logits: torch.Tensor, targets: torch.Tensor, tops: Sequence[int]) -> list[TokenLogprobs]:
    """An entry for each row of float32 ``[N, vocab]``, with ``tops[i]`` alternatives (no more than there are tokens)."""
    largest = logits.amax(1, keepdim=True)
    scale = (logits - largest).exp_().sum(1, keepdim=True).log_()
    chosen = logits.gather(1, targets.unsqueeze(-1))
    logprobs = (chosen - largest - scale).squeeze(1).tolist()
    ranks = (logits > chosen).sum(1).tolist()
    most = min(max(tops, default=0), logits.shape[1])
    alternatives: list[list[tuple[int, float]]] = [[] for _ in tops]
    if most > 0:
        alternatives = _alternatives(logits, largest + scale, most)
    return [
        TokenLogprobs(token, logprob, rank, top[: max(0, count)])
        for token, logprob, rank, top, count in zip(targets.tolist(), logprobs, ranks, alternatives, tops, strict=True)
    ]


def _alternatives(logits: torch.Tensor, scale: torch.Tensor, count: int) -> list[list[tuple[int, float]]]:
    """The `count` most likely tokens of each row with their log-probabilities; the lowest ids first where they tie."""
    values, ids = logits.topk(count, dim=1)
    has_more_ties = ((logits >= values[:, -1:]).sum(1) > count).tolist()
    logprobs, ids = (values - scale).tolist(), ids.tolist()
    for row in [row for row, more in enumerate(has_more_ties) if more]:
        tied = (logits[row] >= values[row, -1]).nonzero().squeeze(1)
        logprobs[row], ids[row] = (logits[row, tied] - scale[row]).tolist(), tied.tolist()
    return [
        sorted(zip(row_ids, row_logprobs, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
        for row_ids, row_logprobs in zip(ids, logprobs, strict=True)
    ]
