"""From logits to tokens.

In: logits of a batch and, per row, how to draw. Out: one token id per row. A row's token depends on
its own logits, settings, seed and index only, never on the other rows. Knows nothing about stop
conditions or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shared.model.randomness import uniforms


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """How one row is drawn.

    `temperature=0` is greedy; `top_k=0` and `top_p=1` mean no filter. `index` is the index of the
    token within the generated text, so that (seed, index) names one random number for ever.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    index: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 0.0


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """Token ids, one per row of `logits` `[num_rows, vocab]`.

    Order of operations: temperature, top-k, top-p, inverse CDF. Equal logits rank by token id.
    A row whose logits are not finite (an overflow, damaged KV) has no next token: None.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
    tokens: list[int | None] = logits.argmax(dim=-1).tolist()
    for draw, row_ids in _groups(rows, logits.shape[-1]).items():
        picked = [rows[i] for i in row_ids]
        drawn = _DRAWS[draw](logits[row_ids], picked)
        for i, token in zip(row_ids, drawn, strict=True):
            tokens[i] = token
    # The maximum is NaN as soon as one logit is, and infinite where a probability would be lost.
    for i, is_finite in enumerate(torch.isfinite(logits.amax(dim=-1)).tolist()):
        if not is_finite:
            tokens[i] = None
    return tokens


def _groups(rows: Sequence[SamplingRow], vocab_size: int) -> dict[str, list[int]]:
    """Row ids by the cheapest procedure that serves them; greedy rows are done already."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.is_greedy:
            continue
        if 0 < row.top_k < vocab_size:
            groups.setdefault("top_k", []).append(i)
        else:
            groups.setdefault("top_p" if row.top_p < 1.0 else "plain", []).append(i)
    return groups


def _draw_plain(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """No filter: inverse CDF in vocabulary order, which needs no sort."""
    return _inverse_cdf(_probabilities(logits, rows), rows).tolist()


def _draw_top_p(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    return _draw_ordered(ordered, token_ids, rows)


def _draw_top_k(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One row at a time: another row's k must not change which of several equal logits stay."""
    tokens = []
    for row_logits, row in zip(logits, rows, strict=True):
        kept = row_logits.topk(row.top_k).indices.sort().values
        ordered, order = row_logits[kept].sort(descending=True, stable=True)
        tokens += _draw_ordered(ordered[None], kept[order][None], [row])
    return tokens


_DRAWS: dict[str, Callable[[torch.Tensor, Sequence[SamplingRow]], list[int]]] = {
    "plain": _draw_plain,
    "top_p": _draw_top_p,
    "top_k": _draw_top_k,
}


def _draw_ordered(
    ordered: torch.Tensor, token_ids: torch.Tensor, rows: Sequence[SamplingRow]
) -> list[int]:
    """Apply top-p to descending logits `[num_rows, n]` and draw."""
    probabilities = _probabilities(ordered, rows)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=ordered.device)
    # The likeliest token always stays, even with top_p = 0.
    dropped = before >= top_p[:, None]
    dropped[:, 0] = False
    rank = _inverse_cdf(probabilities.masked_fill(dropped, 0.0), rows)
    return token_ids.gather(1, rank[:, None])[:, 0].tolist()


def _probabilities(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Softmax at each row's temperature, float64 because a CDF over a vocabulary adds up errors."""
    temperature = torch.tensor(
        [row.temperature for row in rows], dtype=torch.float64, device=logits.device
    )
    return torch.softmax(logits.double() / temperature[:, None], dim=-1)


def _inverse_cdf(weights: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Column drawn per row from unnormalised `weights` `[num_rows, n]`."""
    uniform = uniforms([row.seed for row in rows], [row.index for row in rows])
    cdf = weights.cumsum(dim=-1)
    target = torch.from_numpy(uniform).to(weights.device) * cdf[:, -1]
    column = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    # Rounding may carry the target onto the total; the last column with weight is meant then.
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(column, last)
