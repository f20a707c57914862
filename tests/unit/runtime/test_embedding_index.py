"""What counts in the index of embeddings, and what no longer does."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import EmbeddingClaim, EmbeddingDivision, EmbeddingRef, TensorRef
from shared.runtime.embedding_index import EmbeddingIndex

A, B = (WorkerRef(name=name, incarnation=1) for name in ("a", "b"))
KEY = "0" * 64


def ref(owner: WorkerRef = A, lease_id: str = "l1", held: str | None = None) -> EmbeddingRef:
    tensor = TensorRef(
        owner=owner, address=b"", lease_id=lease_id, compatibility="c", segment_bytes=(8,)
    )
    return EmbeddingRef(
        content_key=KEY, num_tokens=1, hidden_size=2, tensor=tensor, held_lease_id=held
    )


def claim(encoder: WorkerRef | None = A, deadline_unix_s: float = 100.0) -> EmbeddingClaim:
    return EmbeddingClaim(
        content_key=KEY,
        request_id="r",
        attempt=0,
        deadline_unix_s=deadline_unix_s,
        encoder=encoder,
    )


class World:
    """Two processes with an index each, over one bucket."""

    def __init__(self) -> None:
        self.gone: set[WorkerRef] = set()
        self.cancelled: set[str] = set()
        self.now_s = 0.0

    async def index(self, bus: MemoryBus) -> EmbeddingIndex:
        return EmbeddingIndex(
            await bus.key_value("embeddings", ttl_s=60.0),
            is_gone=self.gone.__contains__,
            is_cancelled=lambda request_id, attempt: request_id in self.cancelled,
            max_keys=2,
            clock=lambda: self.now_s,
        )


async def test_a_claim_counts_while_its_encoder_and_its_request_live() -> None:
    world = World()
    async with MemoryBus(MemoryHub()) as bus:
        index = await world.index(bus)
        assert index.claim_of(KEY) is None
        index.note(claim())
        assert index.claim_of(KEY) == claim()
        assert index.find(KEY) is None
        world.gone.add(A)
        assert index.claim_of(KEY) is None
        index.note(claim(encoder=None))
        assert index.claim_of(KEY) is not None
        world.cancelled.add("r")
        assert index.claim_of(KEY) is None
        world.cancelled.clear()
        world.now_s = 100.0
        assert index.claim_of(KEY) is None


async def test_an_offer_counts_while_its_owner_lives_and_unless_it_was_lost() -> None:
    world = World()
    async with MemoryBus(MemoryHub()) as bus:
        index = await world.index(bus)
        index.note(ref())
        assert index.find(KEY) == ref()
        assert index.find(KEY, excluding=["l1"]) is None
        world.gone.add(A)
        assert index.find(KEY) is None
        assert index.cause_of_loss(KEY) == "l1"


async def test_what_one_process_puts_another_knows_and_a_withdrawal_spares_the_newer() -> None:
    world = World()
    async with MemoryBus(MemoryHub()) as bus:
        one, two = await world.index(bus), await world.index(bus)
        following = [asyncio.create_task(each.run()) for each in (one, two)]
        await one.put(ref())
        await asyncio.sleep(0.01)
        assert two.find(KEY) == ref()
        await two.put(ref(B, "l2"))
        await asyncio.sleep(0.01)
        await one.withdraw(KEY, "l1")
        await asyncio.sleep(0.01)
        assert one.find(KEY) == two.find(KEY) == ref(B, "l2")
        await two.withdraw(KEY, "l2")
        await asyncio.sleep(0.01)
        assert one.find(KEY) is two.find(KEY) is None
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def test_it_is_bounded_and_forgets_the_oldest() -> None:
    async with MemoryBus(MemoryHub()) as bus:
        index = await World().index(bus)
        for number in range(3):
            index.note(ref().model_copy(update={"content_key": str(number)}))
        assert [index.find(str(n)) is not None for n in range(3)] == [False, True, True]


@pytest.mark.parametrize(("attempt", "is_held"), [(0, True), (1, False)])
def test_only_the_attempt_that_asked_has_something_to_release(attempt: int, is_held: bool) -> None:
    held = ref(held="emb.r.0.abc").held_for("r", attempt)
    assert (held is not None) == is_held
    assert held is None or held.lease_id == "emb.r.0.abc"
    assert ref().held_for("r", 0) is None


async def test_a_division_is_known_to_all_and_says_nothing_of_parts() -> None:
    world, hub = World(), MemoryHub()
    async with MemoryBus(hub) as bus:
        index, other = await world.index(bus), await world.index(bus)
        following = asyncio.create_task(other.run())
        await index.put(EmbeddingDivision(content_key=KEY, num_parts=3))
        await asyncio.sleep(0.02)
        for each in (index, other):
            division = each.division_of(KEY)
            assert division is not None
            assert division.num_parts == 3
            assert each.find(KEY) is None
            assert each.claim_of(KEY) is None
            assert each.claims() == []
        index.note(ref())
        assert index.division_of(KEY) is None
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_claims_are_listed_in_their_order_while_they_count() -> None:
    world = World()
    async with MemoryBus(MemoryHub()) as bus:
        index = await world.index(bus)
        first, second = (claim(None).model_copy(update={"content_key": key}) for key in "ab")
        index.note(first)
        index.note(second)
        taken = first.model_copy(update={"encoder": A})
        index.note(taken)
        assert index.claims() == [taken, second]
        world.gone.add(A)
        assert index.claims() == [second]
        index.note(ref().model_copy(update={"content_key": "b"}))
        assert index.claims() == []
