"""What all layers of one forward step share.

Made once by `LanguageModel.begin` and handed from layer to layer. Holds no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shared.model.attention import AttentionPlan
from shared.model.batch import ForwardBatch
from shared.model.rope import Rotary


@dataclass(frozen=True, slots=True, eq=False)
class LastTokens:
    """The last token of each sequence: its row in the packed step, and how these tokens attend."""

    rows: torch.Tensor  # [num_seqs]
    plan: AttentionPlan


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StepContext:
    """Valid while the batch's blocks stay where they are. `rotaries`: one per kind of rotation.

    `last` are the only rows that the last layer gives, where the others need just their keys and
    values. With `all_positions` every row's logits are wanted.
    """

    batch: ForwardBatch
    rotaries: tuple[Rotary, ...]
    plan: AttentionPlan
    last: LastTokens | None
    all_positions: bool
