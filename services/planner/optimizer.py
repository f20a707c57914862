"""Which topology and which limits serve a load best.

In: a space of choices and a function that says how much load each can take. Out: the best plans.
A small space is tried in full, a large one searched by Optuna with a fixed seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shared.errors import SettingsError

KINDS = ("E", "P", "D", "EP", "ED", "PD", "EPD")
MAX_EXHAUSTIVE = 64
MAX_TOPOLOGIES = 20_000


@dataclass(frozen=True, slots=True)
class Choice:
    """One point of the space."""

    topology: str
    max_batch: int
    max_batch_tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice and what it is worth: goodput - beta * workers."""

    choice: Choice
    goodput: float
    score: float


def topologies(max_workers: int, *, has_pictures: bool) -> tuple[str, ...]:
    """Every topology of at most so many workers in which each stage has one kind of worker:
    `2E 1P 1D` and `1E 2PD`, but not `1PD 1D`.

    Raises `SettingsError` where there are too many.
    """
    found: list[str] = []
    for kinds in _partitions(has_pictures):
        for counts in itertools.product(range(1, max_workers + 1), repeat=len(kinds)):
            if sum(counts) <= max_workers:
                words = zip(counts, kinds, strict=True)
                found.append(" ".join(f"{count}{kind}" for count, kind in words))
            if len(found) > MAX_TOPOLOGIES:
                raise SettingsError(
                    f"--workers = {max_workers}: more than {MAX_TOPOLOGIES} topologies"
                )
    return tuple(found)


def cost_of(topology: str) -> int:
    """Workers."""
    return sum(int(word.rstrip("EPD")) for word in topology.split())


def search(
    space: Sequence[Choice],
    goodput_of: Callable[[Choice], float],
    *,
    beta: float,
    num_trials: int = MAX_EXHAUSTIVE,
    seed: int = 0,
    on_trial: Callable[[], None] = lambda: None,
) -> tuple[Plan, ...]:
    """The plans that were tried, the best first; of equal ones the first in `space`."""
    if not space:
        raise SettingsError("--workers: no topology with so few workers can serve the trace")
    tried: dict[int, Plan] = {}

    def try_one(position: int) -> float:
        if position not in tried:
            choice = space[position]
            rate = goodput_of(choice)
            tried[position] = Plan(choice, rate, rate - beta * cost_of(choice.topology))
        on_trial()
        return tried[position].score

    if len(space) <= num_trials:
        for position in range(len(space)):
            try_one(position)
    else:
        _sample(space, try_one, num_trials, seed)
    ranked = sorted(tried.items(), key=lambda item: (-item[1].score, item[0]))
    return tuple(plan for _, plan in ranked)


def _sample(
    space: Sequence[Choice], try_one: Callable[[int], float], num_trials: int, seed: int
) -> None:
    import optuna  # only large spaces need it

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    axes = [
        sorted({str(getattr(each, name)) for each in space})
        for name in ("topology", "max_batch", "max_batch_tokens")
    ]
    positions = {
        (each.topology, str(each.max_batch), str(each.max_batch_tokens)): position
        for position, each in enumerate(space)
    }

    def objective(trial: optuna.Trial) -> float:
        topology, batch, tokens = (
            trial.suggest_categorical(name, axis)
            for name, axis in zip(("topology", "batch", "tokens"), axes, strict=True)
        )
        return try_one(positions[topology, batch, tokens])

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=num_trials)


def _partitions(has_pictures: bool) -> tuple[tuple[str, ...], ...]:
    """Sets of kinds that together host each needed stage exactly once."""
    needed = "EPD" if has_pictures else "PD"
    return tuple(
        kinds
        for size in range(1, len(needed) + 1)
        for kinds in itertools.combinations(KINDS, size)
        if sorted("".join(kinds)) == sorted(needed)
    )
