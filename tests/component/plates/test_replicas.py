"""Copies of a training run hold the same weights, learned from all their batches."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.plates.replicas import Replicas, replicas

STEPS = 3


def test_copies_apply_the_mean_of_the_gradients_that_there_are(tmp_path: Path) -> None:
    with replicas(2, learn, tmp_path) as place:
        learn(place, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["weights"], second["weights"])
    # Both copies have a gradient of the first weight, the second copy alone one of the second.
    assert first["weights"].tolist() == [-1.5 * STEPS, -2.0 * STEPS, 0.0]
    assert first["untouched"] is None
    assert first["clock"] == second["clock"] == 10.0 * STEPS


def test_one_copy_keeps_its_own_gradients_and_clock() -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 3.0)
    assert Replicas().share([weight], 7.0) == 7.0
    assert weight.grad.item() == 3.0


def learn(place: Replicas, folder: Path) -> None:
    """A few steps with rate 1, whose gradients are 1 + rank and, in the second copy, 2."""
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    clock_s = 0.0
    for _ in range(STEPS):
        loss = (1 + place.rank) * weights[0] + (2 * weights[1] if place.rank == 1 else 0)
        loss.backward()
        clock_s = place.share(weights, clock_s + 10 + 90 * place.rank)
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight -= weight.grad
                    weight.grad = None
    found: dict[str, Any] = {
        "weights": torch.cat([weight.detach() for weight in weights]),
        "untouched": weights[2].grad,
        "clock": clock_s,
    }
    torch.save(found, folder / f"{place.rank}.pt")
