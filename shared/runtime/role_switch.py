"""How far a worker is in a role switch, as a plain state machine: no clock, no bus, no stage.

In: requests, and the news that the old stages ended, that the new ones take tasks, or that they
could not be built. Out: reports for whoever asked. One switch at a time; the answers to the last
requests are remembered, because a report may be lost and a request come twice.

    serving --asked--> draining --drained--> building --done--> serving
                                                |
                                                +--failed--> serving what it served before
"""

from __future__ import annotations

from collections import OrderedDict

from shared.messages.control import Role, RolePhase, RoleReport, RoleRequest
from shared.messages.descriptor import WorkerRef
from shared.runtime.topology import Stages, in_order, name_of

MAX_REMEMBERED = 64


class RoleSwitch:
    """The role of one process. `has_tower` says whether its model has a part to encode with."""

    def __init__(self, me: WorkerRef, stages: Stages, *, has_tower: bool) -> None:
        self.stages = stages
        self.target: Stages | None = None
        self._me = me
        self._has_tower = has_tower
        self._since_s = 0.0
        self._switch_id = ""
        self._answers: OrderedDict[str, RoleReport] = OrderedDict()

    @property
    def is_under_way(self) -> bool:
        """Whether a switch has begun and not ended."""
        return self.target is not None

    def asked(self, request: RoleRequest, now_s: float) -> RoleReport | None:
        """The answer to a request; None if it is meant for another worker or another life."""
        if request.worker != self._me:
            return None
        if (known := self._answers.get(request.switch_id)) is not None:
            return known
        phase, detail = self._decide(in_order(request.stages))
        if phase is RolePhase.DRAINING:
            self.target, self._since_s = in_order(request.stages), now_s
            self._switch_id = request.switch_id
        return self._remember(
            RoleReport(
                switch_id=request.switch_id,
                worker=self._me,
                phase=phase,
                stages=self.stages,
                detail=detail,
            )
        )

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

    def _decide(self, wanted: Stages) -> tuple[RolePhase, str]:
        if self.target is not None:
            busy = f"a switch to {name_of(self.target)} is in progress"
            return RolePhase.REFUSED_BUSY, busy
        if not wanted:
            return RolePhase.REFUSED_PART, "the role asked for has no stage of a worker"
        if Role.ENCODE in wanted and not self._has_tower:
            return RolePhase.REFUSED_PART, "its model has no part that encodes"
        return (RolePhase.DONE if wanted == self.stages else RolePhase.DRAINING), ""

    def _advance(self, phase: RolePhase, *, now_s: float, **changes: object) -> RoleReport:
        update = {"phase": phase, "stages": self.stages, **changes}
        self._since_s = now_s
        return self._remember(self._answers[self._switch_id].model_copy(update=update))

    def _remember(self, report: RoleReport) -> RoleReport:
        self._answers[report.switch_id] = report
        self._answers.move_to_end(report.switch_id)
        if len(self._answers) > MAX_REMEMBERED:
            oldest = next(each for each in self._answers if each != self._switch_id)
            del self._answers[oldest]
        return report
