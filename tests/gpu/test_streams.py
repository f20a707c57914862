"""What a transport may touch is free of queued work: on a GPU nothing waits by itself."""

from __future__ import annotations

import pytest
import torch

from services.decode.landing_moves import LandingMoves
from services.encoder.executor import EncodeExecutor
from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.messages.refs import KvPiece
from shared.transport.tensors import settled

CYCLES = 200_000_000
"""About a tenth of a second."""


def keep_busy(device: str) -> None:
    if device == "cuda":
        torch.cuda._sleep(CYCLES)


class SlowTower:
    """Gives its embeddings long before they are computed."""

    dtype = torch.float32

    def __init__(self, device: str) -> None:
        self._device = device

    def encode(self, media: list[float]) -> list[torch.Tensor]:
        keep_busy(self._device)
        return [torch.full((3, 2), value, device=self._device) for value in media]


def read_elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    """As a transport does: without the order of the stream that wrote it."""
    if not tensor.is_cuda:
        return tensor
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copy = tensor.clone()
    stream.synchronize()
    return copy.cpu()


def test_embeddings_are_computed_when_they_are_handed_out(device: str) -> None:
    for embedding, value in zip(
        EncodeExecutor(SlowTower(device)).run([1.0, 2.0]), (1.0, 2.0), strict=True
    ):
        assert bool((read_elsewhere(embedding) == value).all())


def test_settled_waits(device: str) -> None:
    keep_busy(device)
    tensor = settled(torch.ones(4, device=device))
    assert bool((read_elsewhere(tensor) == 1).all())


@pytest.fixture
def kv(device: str) -> KvCache:
    kv = KvCache(KvGeometry(2, 1, 8, block_size=4, dtype="float32"), 3, device=device)
    kv.data.zero_()
    return kv


def test_a_piece_lies_in_its_blocks_when_its_move_has_ended(kv: KvCache, device: str) -> None:
    moves = LandingMoves(kv)
    piece = KvPiece(first_token=1, last_token=6, first_layer=0, last_layer=2)
    # The blocks' last owner asked for this, and it comes late.
    keep_busy(device)
    kv.data.fill_(-1.0)
    values = moves.empty(piece)
    assert values.shape == (2, 2, 5, 1, 8)
    arrived = torch.arange(values.numel(), dtype=torch.float32).view(values.shape)
    values.copy_(arrived)
    settled(values)
    moves.move(values, piece, [2, 0])
    cached = read_elsewhere(kv.data).view(2, 2, 12, 1, 8)
    expected = torch.full_like(cached, -1.0)
    expected[:, :, [9, 10, 11, 0, 1]] = arrived
    assert torch.equal(cached, expected)
