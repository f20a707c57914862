"""What all layers of one forward step share.

Made once by `LanguageModel.begin` and handed from layer to layer. Holds no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.model.attention import AttentionPlan
from shared.model.batch import ForwardBatch
from shared.model.rope import Rotary


@dataclass(frozen=True, slots=True, eq=False)
class StepContext:
    """Valid while the batch's blocks stay where they are. `rotaries`: one per kind of rotation."""

    batch: ForwardBatch
    rotaries: tuple[Rotary, ...]
    plan: AttentionPlan
