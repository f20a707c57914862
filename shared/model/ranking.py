"""The likeliest tokens of each row, in an order that ties cannot disturb.

In: logits. Out: values and token ids, larger logits first and equal ones by token id. Which tokens
come out, and in which order, depends on their own row only.
"""

from __future__ import annotations

import torch


def ranked(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest of each row of `[rows, vocab]`: values and token ids `[rows, width]`.

    Of several tokens that are equal to the last one, which are in is left open: see `is_open`.
    """
    if width >= logits.shape[-1]:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    token_ids = logits.topk(width, dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


def width_for(num_tokens: int, vocab_size: int) -> int:
    """How far to rank for the first `num_tokens` to be certain, unless too many are equal."""
    return min(1 << num_tokens.bit_length(), vocab_size)


def is_open(values: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """Whether the ranking `values` `[rows, width]` ends amid tokens that equal the
    `num_tokens`-th, so that which of them are in is left open, `[rows]`.

    It does not matter where they cannot be chosen at all.
    """
    last = values.gather(1, num_tokens[:, None] - 1)[:, 0]
    return (values[:, -1] == last) & ~torch.isneginf(last)


def ranked_exactly(logits: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `num_tokens` largest of each row, equal ones by token id to the last."""
    vocab_size = logits.shape[-1]
    width = width_for(num_tokens, vocab_size)
    values, token_ids = ranked(logits, width)
    wanted = torch.full((logits.shape[0],), num_tokens, device=logits.device)
    if width < vocab_size and bool(is_open(values, wanted).any()):
        values, token_ids = ranked(logits, vocab_size)
    return values[:, :num_tokens], token_ids[:, :num_tokens]
