"""From logits to tokens.

In: logits of a batch and, per row, how to choose. Out: one token per row. A row's token depends on
its own logits, settings, history, seed and index only, never on the other rows. Knows nothing about
stop conditions or text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shared.model.drawing import draw
from shared.model.logprobs import token_logprobs
from shared.model.sampling_row import Sampled, SamplingRow
from shared.model.shaping import shaped

__all__ = ["Sampled", "SamplingRow", "sample"]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[Sampled | None]:
    """One token per row of `logits` `[rows, vocab]`; equal logits rank by token id.

    Several rows may be of one sequence, each after other `drafts`. Rows without controls and at
    temperature 0 cost an argmax and nothing else. A row whose logits are not finite (an overflow,
    damaged KV) has no next token: None.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
    # The maximum is NaN as soon as one logit is, and infinite where a probability would be lost.
    is_finite: list[bool] = torch.isfinite(logits.amax(dim=-1)).tolist()
    allowed = shaped(logits, rows)
    # On a CPU torch looks for the largest of a row in float32 four times as fast as in 16 bits.
    is_slow = allowed.dtype.itemsize == 2 and allowed.device.type == "cpu"
    comparable = allowed.float() if is_slow else allowed
    tokens: list[int] = comparable.argmax(dim=-1).tolist()
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy and is_finite[i]]
    if drawn:
        for i, token_id in zip(drawn, draw(allowed[drawn], [rows[i] for i in drawn]), strict=True):
            tokens[i] = token_id
    sampled = [
        Sampled(token_id) if ok else None for token_id, ok in zip(tokens, is_finite, strict=True)
    ]
    _tell_logprobs(sampled, logits, rows)
    return sampled


def _tell_logprobs(
    sampled: list[Sampled | None], logits: torch.Tensor, rows: Sequence[SamplingRow]
) -> None:
    """Complete the tokens of the rows that ask for logprobs."""
    told = [
        (i, each.token_id, row.num_logprobs)
        for i, (row, each) in enumerate(zip(rows, sampled, strict=True))
        if row.num_logprobs is not None and each is not None
    ]
    if not told:
        return
    ids, token_ids = [i for i, _, _ in told], [token_id for _, token_id, _ in told]
    found = token_logprobs(logits[ids], token_ids, [num_top for _, _, num_top in told])
    for i, token_id, logprobs in zip(ids, token_ids, found, strict=True):
        sampled[i] = Sampled(token_id, logprobs)
