"""Overlap of encode and prefill: TTFT of requests with text and pictures, with and without it.

Compute is a delay: encode, prefill and decode take what a model of 7.6 billion weights takes on one
A100 (`bench/delayed/profiles.py`). Gateway, NATS, schedulers, preprocessing and UCX are real.

Two clusters, of one encoder, one prefill and one decode worker each unless told otherwise, run side
by side. First they are asked in turn, one request at a time, about texts that stand in front of the
pictures, where everything up to the first picture can be computed while it is encoded, and behind
them, where nothing can. Then each gets the same mix of these at random times, so that there is
often something else to do than to begin a prompt. Prints TTFTs and their ratios; those of a text in
front of the pictures come last.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

from rich.progress import track

from bench.delayed.cluster import delayed_cluster
from bench.delayed.load import Kind, Timetable, failures, poisson_times, send_all
from bench.delayed.profiles import TOKEN_STANDS_FOR, photo_model
from bench.delayed.report import plot_bars, table

TOPOLOGY = "1E 1P 1D"
LONG_WORDS = 430
"""About 1,250 tokens, which take as long as three pictures."""
SHORT_WORDS = 8
ANSWER_TOKENS = 4

FRONT = tuple(
    Kind(f"text, {count} pictures", count, SHORT_WORDS, ANSWER_TOKENS, preface_words=LONG_WORDS)
    for count in (2, 3, 4, 6)
)
OTHERS = (
    Kind("3 pictures, text", 3, LONG_WORDS, ANSWER_TOKENS),
    Kind("1 picture", 1, SHORT_WORDS, ANSWER_TOKENS),
)
MIX = (FRONT[0], *OTHERS)
MIX_RATE_PER_S = 0.75
"""One encoder is busy for about 60 % of the time, prefill for 70 %."""
WARM_UP = -1
SIDES = ("off", "on")

Ttfts = dict[str, list[float]]
"""Side -> seconds."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench overlap", description=__doc__)
    parser.add_argument("--topology", default=TOPOLOGY, help=f"workers of a side ({TOPOLOGY})")
    parser.add_argument("--rounds", type=int, default=5, help="requests of each kind (5)")
    parser.add_argument("--mixed", type=int, default=40, help="requests of the mix (40)")
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    alone, mixed = measure(options.topology, options.rounds, options.mixed)
    if options.out:
        plot_bars(
            options.out,
            [kind.name for kind in alone],
            {f"overlap {side}": [median(alone[kind][side]) for kind in alone] for side in SIDES},
            title=f"Time to first token, {options.topology}, long texts and pictures",
            y_label="median TTFT, s",
        )
    print(report(alone, mixed))


def measure(topology: str, num_rounds: int, num_mixed: int) -> tuple[dict[Kind, Ttfts], Ttfts]:
    """Ask both sides in turn, then both with the mix. Raises where an answer is not whole."""
    alone: dict[Kind, Ttfts] = {kind: {side: [] for side in SIDES} for kind in (*FRONT, *OTHERS)}
    mix = poisson_times(MIX, rate_per_s=MIX_RATE_PER_S, num_requests=num_mixed, seed=1)
    mixed: Ttfts = {}
    with ExitStack() as scope:
        urls = {
            side: scope.enter_context(
                delayed_cluster(topology, photo_model(), settings=settings_of(side))
            ).url
            for side in SIDES
        }
        for number in track(range(WARM_UP, num_rounds), "rounds"):
            for place, kind in enumerate(alone):
                for side, url in urls.items():
                    ttfts = ask(url, [(0.0, kind)], 100 * number + 101 + place)
                    if number != WARM_UP:
                        alone[kind][side] += ttfts
        for side, url in urls.items():
            mixed[side] = ask(url, mix, 99_999)
    return alone, mixed


def settings_of(side: str) -> dict[str, str]:
    """A side's, where a token stands for several."""
    return {
        "TRIPTYCH_OVERLAP_ENCODE": str(side == "on").lower(),
        "TRIPTYCH_MIN_EARLY_TOKENS": str(128 // TOKEN_STANDS_FOR),
    }


def ask(url: str, times: Timetable, seed: int) -> list[float]:
    """Their TTFTs in seconds."""
    outcomes = send_all(url, times, seed=seed)
    if wrong := failures(outcomes):
        raise RuntimeError(f"{len(wrong)} of {len(times)} requests failed: {wrong[0]}")
    return [each.ttft_s for each in outcomes]


def median(values: list[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def report(alone: dict[Kind, Ttfts], mixed: Ttfts) -> str:
    """A line for each kind and one for the mix; the ratios of texts in front come last."""
    rows = [
        _row(kind.name, *(median(ttfts[side]) for side in SIDES)) for kind, ttfts in alone.items()
    ]
    count = len(mixed[SIDES[0]])
    rows.append(_row(f"mix of {count}, median", *(median(mixed[side]) for side in SIDES)))
    rows.append(_row(f"mix of {count}, mean", *(statistics.mean(mixed[side]) for side in SIDES)))
    head = ("compute is a delay", "TTFT off", "TTFT on", "off over on")
    ratios = " / ".join(f"{median(alone[k]['off']) / median(alone[k]['on']):.2f}" for k in FRONT)
    counts = " / ".join(str(kind.num_pictures) for kind in FRONT)
    return f"{table(head, rows)}\noff over on, a long text and then {counts} pictures: {ratios}"


def _row(name: str, off_s: float, on_s: float) -> tuple[str, ...]:
    return (name, f"{off_s:.2f} s", f"{on_s:.2f} s", f"{off_s / on_s:.2f}")


if __name__ == "__main__":
    main()
