"""How likely the model found the chosen tokens, and which it found likeliest.

In: the model's logits, before anything changed them, and the chosen tokens. Out: natural logarithms
of probabilities at temperature 1. Equal ones rank by token id.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.messages.events import TokenLogprobs
from shared.model.ranking import ranked_exactly


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: Sequence[int]
) -> list[TokenLogprobs]:
    """One per row of `logits` `[rows, vocab]`; row i tells its `num_top[i]` likeliest tokens."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.log_softmax(logits.to(wide), dim=-1)
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    chosen_logprobs = logprobs.gather(1, chosen)[:, 0].tolist()
    tops = _tops(logits, logprobs, min(max(num_top), logits.shape[-1]))
    return [
        TokenLogprobs(logprob=logprob, top=tuple(top[:n]))
        for logprob, top, n in zip(chosen_logprobs, tops, num_top, strict=True)
    ]


def _tops(
    logits: torch.Tensor, logprobs: torch.Tensor, num_top: int
) -> list[list[tuple[int, float]]]:
    """The `num_top` likeliest tokens of each row with their logarithms, best first."""
    num_rows = logits.shape[0]
    if num_top == 0:
        return [[] for _ in range(num_rows)]
    _, token_ids = ranked_exactly(logits, num_top)
    values = logprobs.gather(1, token_ids)
    return [
        list(zip(ids, row, strict=True))
        for ids, row in zip(token_ids.tolist(), values.tolist(), strict=True)
    ]
