"""What changes logits before a token is chosen: logit bias, penalties, grammar, banned tokens.

In: logits and the rows' controls. Out: logits; those of rows without controls as they were. Rows
are changed together, through lists of (row, token) places, and never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shared.model.history import IntArray
from shared.model.sampling_row import Controls, FloatArray, SamplingRow

# The eight bits of every byte of a mask, the lowest first: whether its token is forbidden.
_FORBIDDEN = (torch.arange(256)[:, None] >> torch.arange(8)) % 2 == 0

Controlled = tuple[int, SamplingRow, Controls]


def shaped(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Logits `[rows, vocab]` as the rows' controls want them; a copy where there are any.

    Order of operations: logit bias, repetition, frequency and presence penalty, grammar, minimum
    length.
    """
    controlled = [(i, row, row.controls) for i, row in enumerate(rows) if row.controls is not None]
    if not controlled:
        return logits
    # bfloat16 would lose a small penalty; widening changes no value of the other rows.
    logits = (
        logits.clone() if logits.dtype == torch.float64 else logits.to(torch.float32, copy=True)
    )
    _add_bias(logits, controlled)
    _penalise(logits, controlled)
    _mask(logits, controlled)
    _ban(logits, controlled)
    return logits


def _add_bias(logits: torch.Tensor, controlled: Sequence[Controlled]) -> None:
    found = [(i, controls) for i, _, controls in controlled if len(controls.bias_ids)]
    if not found:
        return
    lengths = [len(controls.bias_ids) for _, controls in found]
    places = _places(
        logits, [i for i, _ in found], lengths, [controls.bias_ids for _, controls in found]
    )
    bias = _to(logits, np.concatenate([controls.bias_values for _, controls in found]))
    logits.index_put_(places, (logits[places].double() + bias).to(logits.dtype))


def _penalise(logits: torch.Tensor, controlled: Sequence[Controlled]) -> None:
    found = [
        (i, controls, controls.history.seen(row.drafts))
        for i, row, controls in controlled
        if controls.history is not None
    ]
    if not found:
        return
    lengths = [len(ids) for _, _, (ids, _) in found]
    token_ids = np.concatenate([ids for _, _, (ids, _) in found])
    # A prompt may hold placeholders that are no words and have no logit.
    kept = token_ids < logits.shape[-1]
    rows = np.repeat(np.array([i for i, _, _ in found]), lengths)[kept]
    places = (_to(logits, rows), _to(logits, token_ids[kept]))
    counts = _to(logits, np.concatenate([counts for _, _, (_, counts) in found])[kept])
    settings = np.array(
        [(c.repetition_penalty, c.frequency_penalty, c.presence_penalty) for _, c, _ in found]
    )
    repetition, frequency, presence = _to(logits, np.repeat(settings, lengths, axis=0)[kept]).T
    values = logits[places].double()
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    logits.index_put_(places, values.to(logits.dtype))


def _mask(logits: torch.Tensor, controlled: Sequence[Controlled]) -> None:
    """Tokens that the grammar does not allow become impossible."""
    found = [
        (i, row.drafts, controls.grammar)
        for i, row, controls in controlled
        if controls.grammar is not None
    ]
    if not found:
        return
    vocab_size = logits.shape[-1]
    masks = np.zeros((len(found), -(-vocab_size // 32)), dtype=np.int32)
    for line, (_, drafts, grammar) in enumerate(found):
        grammar.fill(masks, line, drafts)
    octets = torch.from_numpy(masks.view(np.uint8)).to(logits.device)
    is_forbidden = _FORBIDDEN.to(logits.device)[octets.int()].flatten(1)[:, :vocab_size]
    ids = [i for i, _, _ in found]
    logits[ids] = logits[ids].masked_fill(is_forbidden, -torch.inf)


def _ban(logits: torch.Tensor, controlled: Sequence[Controlled]) -> None:
    """No stop token yet, unless the grammar leaves nothing else."""
    found = [
        (i, controls.banned_ids)
        for i, row, controls in controlled
        if row.index < controls.min_tokens and len(controls.banned_ids)
    ]
    if not found:
        return
    ids = [i for i, _ in found]
    before = logits[ids]
    places = _places(logits, ids, [len(banned) for _, banned in found], [b for _, b in found])
    logits.index_put_(places, torch.full_like(logits[places], -torch.inf))
    is_left = ~torch.isneginf(logits[ids].amax(dim=-1, keepdim=True))
    logits[ids] = torch.where(is_left, logits[ids], before)


def _places(
    logits: torch.Tensor, ids: Sequence[int], lengths: Sequence[int], token_ids: Sequence[IntArray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of (row, token) places; no place is named twice."""
    rows = np.repeat(np.array(ids, dtype=np.int64), lengths)
    columns = np.concatenate(token_ids)
    return (
        torch.from_numpy(rows).to(logits.device),
        torch.from_numpy(columns).to(logits.device),
    )


def _to(logits: torch.Tensor, values: IntArray | FloatArray) -> torch.Tensor:
    return torch.from_numpy(values).to(logits.device)
