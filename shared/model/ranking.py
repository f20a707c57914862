"""The likeliest tokens of each row, in an order that ties cannot disturb.

In: logits. Out: values and token ids, larger logits first and equal ones by token id. Which tokens
come out, and in which order, depends on their own row only.
"""

from __future__ import annotations

import torch


def ranked(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest of each row of `[rows, vocab]`: values and token ids `[rows, width]`.

    Of several tokens that are equal to the last one, which are in is left open: see `tied_width`.
    """
    if width >= logits.shape[-1]:
        return torch.sort(logits, dim=-1, descending=True, stable=True)
    token_ids = logits.topk(width, dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


def tied_width(logits: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """How many tokens of each row are at least as large as its `num_tokens`-th, `[rows]`.

    That many have to be ranked for the first `num_tokens` to be certain. Where the last of them
    cannot be chosen at all (its logit is -inf) nothing has to be certain.
    """
    largest = logits.topk(int(num_tokens.max()), dim=-1).values
    last = largest.gather(1, num_tokens[:, None] - 1)
    num_tied = (logits >= last).sum(dim=-1)
    return torch.where(torch.isneginf(last[:, 0]), num_tokens, num_tied)
