"""Draws tokens at random: temperature, min-p, top-k, top-p, inverse CDF, in this order.

In: logits and rows whose temperature is above 0. Out: one token id per row. Every number that a
row's token depends on is computed from this row alone, and over a width that follows from this row
alone, so it is the same to the last bit in every batch.

Rows are computed in groups of equal width. Ranking a whole vocabulary is slow, so a row is ranked
as far as its own filters need it: top-k needs k tokens, and top-p mostly a few hundred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shared.model.randomness import uniforms
from shared.model.ranking import is_open, ranked, width_for
from shared.model.sampling_row import SamplingRow

NARROW = 1024
"""Ranked tokens that are tried first for a row with top-p and without top-k."""

DrawAt = Callable[[int, list[int]], torch.Tensor]
"""Draws the rows with these ids, ranked to this width."""


def draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token id per row of `logits` `[rows, vocab]`."""
    vocab_size = logits.shape[-1]
    plain: list[int] = []
    top_p: list[int] = []
    top_k: list[int] = []
    for i, row in enumerate(rows):
        if 0 < row.top_k < vocab_size:
            top_k.append(i)
        else:
            (top_p if row.top_p < 1.0 else plain).append(i)
    tokens = [0] * len(rows)
    for ids, draw_group in ((plain, _plain), (top_p, _top_p), (top_k, _top_k)):
        if ids:
            drawn = draw_group(logits[ids], [rows[i] for i in ids])
            for i, token_id in zip(ids, drawn.tolist(), strict=True):
                tokens[i] = token_id
    return tokens


def _plain(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """No filter but min-p, which needs no ranking: inverse CDF in vocabulary order."""
    weights = _probabilities(logits, rows)
    if any(row.min_p > 0.0 for row in rows):
        floor = _column(weights, [row.min_p for row in rows]) * weights.amax(dim=-1, keepdim=True)
        weights = weights.masked_fill(weights < floor, 0.0)
    return _inverse_cdf(weights, rows)


def _top_k(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Each row ranks a little more than its k tokens, or all of them if too many are equal."""
    vocab_size = logits.shape[-1]

    def draw_at(width: int, ids: list[int]) -> torch.Tensor:
        picked = [rows[i] for i in ids]
        k = torch.tensor([row.top_k for row in picked], device=logits.device)
        values, token_ids = ranked(logits[ids], width)
        beyond = torch.arange(width, device=logits.device) >= k[:, None]
        weights = _probabilities(values.masked_fill(beyond, -torch.inf), picked)
        tokens = _draw_ranked(weights, token_ids, picked)
        if width < vocab_size:
            for i in is_open(values, k).nonzero()[:, 0].tolist():
                tokens[i] = draw_at(vocab_size, [ids[i]])[0]
        return tokens

    widths = [width_for(row.top_k, vocab_size) for row in rows]
    return _by_width(widths, draw_at, logits.device)


def _top_p(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Most rows' top-p lies within a few tokens; only the others rank the whole vocabulary."""
    vocab_size = logits.shape[-1]
    probabilities = _probabilities(logits, rows)
    narrow = min(NARROW, vocab_size)
    values, narrow_ids = ranked(logits, narrow)
    narrow_weights = probabilities.gather(1, narrow_ids)
    # Which of the tokens that equal the last one are ranked is open: they must not be needed.
    certain = narrow_weights.masked_fill(values <= values[:, -1:], 0.0)
    mass = certain.cumsum(dim=-1)[:, -1]
    last, largest = narrow_weights[:, -1], narrow_weights[:, 0]
    min_p = _column(probabilities, [row.min_p for row in rows])[:, 0]
    top_p = _column(probabilities, [row.top_p for row in rows])[:, 0]
    is_enough = torch.where(min_p > 0.0, last < min_p * largest, mass >= top_p)
    widths = [narrow if enough else vocab_size for enough in is_enough.tolist()]

    def draw_at(width: int, ids: list[int]) -> torch.Tensor:
        weights, token_ids = narrow_weights[ids], narrow_ids[ids]
        if width > narrow:
            _, token_ids = ranked(logits[ids], width)
            weights = probabilities[ids].gather(1, token_ids)
        return _draw_ranked(weights, token_ids, [rows[i] for i in ids])

    return _by_width(widths, draw_at, logits.device)


def _draw_ranked(
    weights: torch.Tensor, token_ids: torch.Tensor, rows: Sequence[SamplingRow]
) -> torch.Tensor:
    """Apply min-p and top-p to ranked probabilities `[rows, width]` and draw."""
    min_p = _column(weights, [row.min_p for row in rows])
    # The likeliest token always stays, whatever the filters.
    weights = weights.masked_fill(weights < min_p * weights[:, :1], 0.0)
    cdf = weights.cumsum(dim=-1)
    total = torch.where(min_p > 0.0, cdf[:, -1:], 1.0)
    dropped = cdf - weights >= _column(weights, [row.top_p for row in rows]) * total
    dropped[:, 0] = False
    rank = _inverse_cdf(weights.masked_fill(dropped, 0.0), rows)
    return token_ids.gather(1, rank[:, None])[:, 0]


def _by_width(widths: Sequence[int], draw_at: DrawAt, device: torch.device) -> torch.Tensor:
    """Draw rows of equal width together; returns the tokens in the order of the rows."""
    tokens = torch.empty(len(widths), dtype=torch.int64, device=device)
    for width in sorted(set(widths)):
        ids = [i for i, each in enumerate(widths) if each == width]
        tokens[ids] = draw_at(width, ids)
    return tokens


def _probabilities(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Softmax at each row's temperature, as float64 because a CDF over a vocabulary adds up
    errors."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    temperature = _column(logits, [row.temperature for row in rows]).to(wide)
    return torch.softmax(logits.to(wide) / temperature, dim=-1).double()


def _column(beside: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """A setting of each row, `[rows, 1]`."""
    return torch.tensor(values, dtype=torch.float64, device=beside.device)[:, None]


def _inverse_cdf(weights: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Column drawn per row from unnormalised `weights` `[rows, n]`."""
    uniform = uniforms([row.seed for row in rows], [row.index for row in rows])
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1:]
    target = torch.from_numpy(uniform).to(weights.device)[:, None] * total
    # Rounding may carry the target onto the total, behind the last column with weight.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)
