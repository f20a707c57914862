"""How far a worker is in a role switch, as a plain state machine: no clock, no bus, no stage.

In: requests, and the news that the old stages ended, that the new ones take tasks, or that they
could not be built. Out: reports for whoever asked. One switch at a time; the newest one's end is
remembered, because its report may have been lost.

    serving --asked--> draining --drained--> building --done--> serving
                                                |
                                                +--failed--> serving what it served before
"""

from __future__ import annotations

from shared.messages.control import Role, RolePhase, RoleReport, RoleRequest
from shared.messages.descriptor import WorkerRef
from shared.runtime.topology import Stages, in_order, name_of


class RoleSwitch:
    """The role of one process. `has_tower` says whether its model has a part to encode with."""

    def __init__(self, me: WorkerRef, stages: Stages, *, has_tower: bool) -> None:
        self.stages = stages
        self.target: Stages | None = None
        self._me = me
        self._has_tower = has_tower
        self._since_s = 0.0
        self._report: RoleReport | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a switch has begun and not ended."""
        return self.target is not None

    def asked(self, request: RoleRequest, now_s: float) -> RoleReport | None:
        """The answer to a request; None if it is meant for another worker or another life."""
        if request.worker != self._me:
            return None
        if self._report is not None and request.switch_id == self._report.switch_id:
            return self._report
        wanted = in_order(request.stages)
        if self.target is not None:
            return self._say(
                request.switch_id,
                RolePhase.REFUSED_BUSY,
                f"a switch to {name_of(self.target)} is in progress",
            )
        if not wanted or (Role.ENCODE in wanted and not self._has_tower):
            return self._say(
                request.switch_id,
                RolePhase.REFUSED_PART,
                f"its model has no part for {Role.ENCODE.value if wanted else 'that'}",
            )
        if wanted == self.stages:
            self._report = self._say(request.switch_id, RolePhase.DONE)
            return self._report
        self.target, self._since_s = wanted, now_s
        self._report = self._say(request.switch_id, RolePhase.DRAINING)
        return self._report

    def drained(self, now_s: float) -> RoleReport:
        """The old stages have ended."""
        return self._advance(RolePhase.BUILDING, drain_s=now_s - self._since_s, now_s=now_s)

    def built(self, now_s: float) -> RoleReport:
        """The new stages take tasks."""
        assert self.target is not None, "no switch is under way"
        self.stages, self.target = self.target, None
        return self._advance(RolePhase.DONE, build_s=now_s - self._since_s, now_s=now_s)

    def failed(self, detail: str, now_s: float) -> RoleReport:
        """The new stages could not be built; the old ones take tasks again."""
        self.target = None
        return self._advance(
            RolePhase.FAILED, build_s=now_s - self._since_s, detail=detail, now_s=now_s
        )

    def _advance(self, phase: RolePhase, *, now_s: float, **changes: object) -> RoleReport:
        assert self._report is not None, "no switch was asked for"
        update = {"phase": phase, "stages": self.stages, **changes}
        self._report = self._report.model_copy(update=update)
        self._since_s = now_s
        return self._report

    def _say(self, switch_id: str, phase: RolePhase, detail: str = "") -> RoleReport:
        return RoleReport(
            switch_id=switch_id, worker=self._me, phase=phase, stages=self.stages, detail=detail
        )
