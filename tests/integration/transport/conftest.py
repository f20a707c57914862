"""A transport in this process; its peers are processes of their own (`transport_peer`)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from shared.messages.descriptor import WorkerRef
from tests.support.transport_peer import COMPATIBILITY

pytest.importorskip("ucxx")

from shared.transport.ucx import UcxTransport


@pytest.fixture
async def transport() -> AsyncIterator[UcxTransport]:
    me = WorkerRef(name="here", incarnation=1)
    async with UcxTransport(me, COMPATIBILITY) as transport:
        yield transport
