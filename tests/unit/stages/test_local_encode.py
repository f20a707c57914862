"""When a prompt's picture is encoded past the queue, by literals."""

from __future__ import annotations

import pytest

from services.prefill.local_encode import EncodeLoad, encodes_here, patches_ahead
from services.prefill.own_encoder import OwnEncoder
from shared.bus.memory_bus import MemoryBus
from shared.bus.memory_hub import MemoryHub
from shared.messages.descriptor import WorkerRef
from shared.messages.refs import EmbeddingClaim
from shared.messages.work import EncodeTask
from shared.runtime.embedding_index import EmbeddingIndex


def load(
    *, ahead: int = 0, here: int = 0, others: int = 1, served: bool = True, item: int = 100
) -> EncodeLoad:
    return EncodeLoad(
        item_patches=item,
        ahead_patches=ahead,
        here_patches=here,
        num_others=others,
        is_served_here=served,
    )


def test_where_no_encoder_lives_this_process_is_the_only_one() -> None:
    assert encodes_here(load(others=0, served=False))
    assert encodes_here(load(others=0, served=False, here=1_000_000))


def test_a_process_alone_keeps_to_its_queue() -> None:
    assert not encodes_here(load(others=0, ahead=1_000_000))


@pytest.mark.parametrize(
    ("ahead", "here", "others", "expected"),
    [
        (0, 0, 1, False),  # nobody is in front: an encoder will take it at once
        (200, 0, 1, False),  # both encoders begin it just when this one would be done
        (201, 0, 1, True),
        (201, 1, 1, False),  # what this one holds comes first
        (900, 0, 8, False),
        (901, 0, 8, True),
    ],
)
def test_the_queue_is_weighed_against_this_process(
    ahead: int, here: int, others: int, expected: bool
) -> None:
    assert encodes_here(load(ahead=ahead, here=here, others=others)) is expected


def test_an_encoder_that_takes_no_tasks_is_no_part_of_the_queue() -> None:
    assert encodes_here(load(ahead=101, served=False))


def test_only_what_was_claimed_before_is_ahead() -> None:
    claims = [
        EmbeddingClaim(
            content_key=key, request_id="r", attempt=0, deadline_unix_s=1.0, num_patches=patches
        )
        for key, patches in (("a", 10), ("b", 20), ("c", 40))
    ]
    assert patches_ahead(claims, "a") == 0
    assert patches_ahead(claims, "c") == 30
    assert patches_ahead(claims, "unclaimed") == 70
    assert patches_ahead([], "a") == 0


class FakeEncoder:
    is_open = True
    num_held_patches = 0

    async def encode_now(self, task: EncodeTask) -> None:
        raise AssertionError(task)


@pytest.mark.parametrize(
    ("is_open", "encoder", "expected"),
    [(True, None, True), (False, None, False), (True, "another", False)],
)
async def test_only_an_open_encoder_is_asked_and_only_for_what_nobody_has_begun(
    is_open: bool, encoder: str | None, expected: bool
) -> None:
    local = FakeEncoder()
    local.is_open = is_open
    me, other = (WorkerRef(name=name, incarnation=1) for name in ("me", "another"))
    async with MemoryBus(MemoryHub()) as bus:
        index = EmbeddingIndex(
            await bus.key_value("embeddings", ttl_s=60.0),
            is_gone=lambda worker: False,
            is_cancelled=lambda request_id, attempt: False,
            clock=lambda: 0.0,
        )
        for key, patches, by in (("ahead", 1000, other), ("mine", 1, other if encoder else None)):
            index.note(
                EmbeddingClaim(
                    content_key=key,
                    request_id="r",
                    attempt=0,
                    deadline_unix_s=1.0,
                    encoder=by,
                    num_patches=patches,
                )
            )
        own = OwnEncoder(local, index, me, lambda: [me, other])
        assert own.is_quicker("mine", 1) is expected
