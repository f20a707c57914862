"""Intra-request parallel encoding: TTFT of requests with many pictures, with and without it.

Compute is a delay: encode, prefill and decode take what a model of 7.6 billion weights takes on one
A100 (`bench/delayed/profiles.py`). Gateway, NATS, schedulers, preprocessing and UCX are real.

Two clusters run side by side and are asked in turn, one request at a time, so nothing else is in
the system. On: five encoders. Off: a request's pictures are embedded by one encoder, one after the
other; the other four would be idle, so that side has only the one. Prints median TTFT and their
ratio for each number of pictures, beside the published ratios.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

from rich.progress import track

from bench.delayed.cluster import delayed_cluster
from bench.delayed.load import Kind, failures, send_all
from bench.delayed.profiles import photo_model
from bench.delayed.report import plot_bars, table

PUBLISHED = {2: 1.6, 4: 2.4, 6: 2.9, 8: 2.5}
TOPOLOGIES = {"on": "5E 1P 2D", "off": "1E 1P 2D"}
WARM_UP = -1

Measured = dict[str, dict[int, list[float]]]
"""Side -> pictures of a request -> TTFTs in seconds."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench irp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="requests of each size (7)")
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    measured = measure(options.rounds)
    if options.out:
        plot_bars(
            options.out,
            [f"{count} pictures" for count in PUBLISHED],
            {f"{side}: {topology}": medians(measured[side]) for side, topology in sides()},
            title="Time to first token, pictures spread over encoders or not",
            y_label="median TTFT, s",
        )
    print(report(measured))


def sides() -> list[tuple[str, str]]:
    """Name and topology, the slower first."""
    return sorted(TOPOLOGIES.items())


def measure(num_rounds: int) -> Measured:
    """Ask both sides in turn. Raises where an answer is not whole."""
    measured: Measured = {side: {count: [] for count in PUBLISHED} for side in TOPOLOGIES}
    with ExitStack() as scope:
        urls = {
            side: scope.enter_context(delayed_cluster(topology, photo_model())).url
            for side, topology in sides()
        }
        for number in track(range(WARM_UP, num_rounds), "rounds"):
            for count in PUBLISHED:
                for side, url in urls.items():
                    kind = Kind(f"{count} pictures", count, 8, 10)
                    (outcome,) = send_all(url, [(0.0, kind)], seed=100 * number + 101 + count)
                    if failures([outcome]):
                        raise RuntimeError(f"{side}, {kind.name}: {outcome.error}")
                    if number != WARM_UP:
                        measured[side][count].append(outcome.ttft_s)
    return measured


def medians(ttfts: dict[int, list[float]]) -> list[float]:
    """One for each number of pictures."""
    return [statistics.median(each) for each in ttfts.values()]


def report(measured: Measured) -> str:
    """A line for each number of pictures, the ratios last."""
    on, off = medians(measured["on"]), medians(measured["off"])
    ratios = [b / a for a, b in zip(on, off, strict=True)]
    rows = [
        (f"{count} pictures", f"{a:.2f} s", f"{b:.2f} s", f"{ratio:.2f}", f"{published:.1f}")
        for (count, published), a, b, ratio in zip(PUBLISHED.items(), on, off, ratios, strict=True)
    ]
    head = ("compute is a delay", "TTFT on", "TTFT off", "ratio", "published")
    named = " / ".join(f"{ratio:.2f}" for ratio in ratios)
    counts = " / ".join(map(str, PUBLISHED))
    return f"{table(head, rows)}\noff over on with {counts} pictures: {named}"


if __name__ == "__main__":
    main()
