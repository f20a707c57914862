"""What one decode step does, in this order: copy out, copy back, compute.

The scheduler writes it, the executor and the stage carry it out. Knows neither tensors nor time.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.decode.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Save:
    """Copy `num_tokens` tokens of KV out of `block_ids`, which are no longer the sequence's own."""

    sequence: Sequence
    block_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. False where there is nothing to do.

    `restores` own blocks again and take part in `batch`; `returned` were given up for want of
    memory and start over elsewhere.
    """

    batch: tuple[Sequence, ...]
    saves: tuple[Save, ...] = ()
    restores: tuple[Sequence, ...] = ()
    returned: tuple[Sequence, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.batch or self.saves or self.returned)

    @property
    def touched(self) -> tuple[Sequence, ...]:
        """Sequences whose KV is in doubt if the step fails."""
        return (*self.batch, *(save.sequence for save in self.saves))
