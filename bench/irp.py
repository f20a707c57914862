"""Intra-request parallel encoding: TTFT of requests with many pictures, with and without it.

Compute is a delay: encode, prefill and decode take what a model of 7.6 billion weights takes on one
A100 (`bench/delayed/profiles.py`), encode in proportion to the patches of a step. Gateway, NATS,
schedulers, preprocessing and UCX are real; so is the division: a picture is 9 tiles and an
overview (`bench/delayed/tile_model.py`), and each part is its own task, embedding and transfer.

Three clusters run side by side and are asked in turn, one request at a time, so nothing else is in
the system. Divided: five encoders, which share the pictures that do not come out even. Whole: five
encoders, a picture to each. Off: a request's pictures are embedded by one encoder, one after the
other; the other four would be idle, so that side has only the one. Prints median TTFT and the
ratios for each number of pictures, beside the published ratios.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from pathlib import Path

from rich.progress import track

from bench.delayed.cluster import delayed_cluster
from bench.delayed.load import Kind, failures, send_all
from bench.delayed.profiles import photo_model, slowed
from bench.delayed.report import plot_bars, table
from bench.delayed.tile_model import NUM_TILES, TILE_PATCHES, TILE_TOKENS, write_tile_model

PUBLISHED = {2: 1.6, 4: 2.4, 6: 2.9, 8: 2.5}
TOPOLOGIES = {"divided": "5E 1P 2D", "whole": "5E 1P 2D", "off": "1E 1P 2D"}
MIN_PART = {"divided": TILE_PATCHES, "whole": 0, "off": 0}
"""Fewest patches in a part; 0: pictures stay whole."""
WARM_UP = -1

Measured = dict[str, dict[int, list[float]]]
"""Side -> pictures of a request -> TTFTs in seconds."""


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench irp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="requests of each size (7)")
    parser.add_argument(
        "--slow", type=float, default=1.0, help="all delays times this: real parts count less (1)"
    )
    parser.add_argument("--out", type=Path, help="write a plot into this PNG file")
    options = parser.parse_args()
    measured = measure(options.rounds, options.slow)
    if options.out:
        plot_bars(
            options.out,
            [f"{count} pictures" for count in PUBLISHED],
            {
                f"{side}: {topology}": medians(measured[side])
                for side, topology in TOPOLOGIES.items()
            },
            title="Time to first token, pictures spread over encoders or not",
            y_label="median TTFT, s",
        )
    print(report(measured))


def measure(num_rounds: int, slow: float) -> Measured:
    """Ask all sides in turn. Raises where an answer is not whole."""
    timing = slowed(photo_model(NUM_TILES * TILE_PATCHES, NUM_TILES * TILE_TOKENS), slow)
    measured: Measured = {side: {count: [] for count in PUBLISHED} for side in TOPOLOGIES}
    with ExitStack() as scope:
        urls = {
            side: scope.enter_context(
                delayed_cluster(
                    topology,
                    timing,
                    settings={"TRIPTYCH_MEDIA__MIN_PART_PATCHES": str(MIN_PART[side])},
                    write=write_tile_model,
                )
            ).url
            for side, topology in TOPOLOGIES.items()
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
    divided, whole, off = (medians(measured[side]) for side in ("divided", "whole", "off"))
    rows = [
        (
            f"{count} pictures",
            *(f"{seconds:.2f} s" for seconds in (a, b, c)),
            f"{c / b:.2f}",
            f"{c / a:.2f}",
            f"{published:.1f}",
        )
        for (count, published), a, b, c in zip(PUBLISHED.items(), divided, whole, off, strict=True)
    ]
    head = (
        "compute is a delay",
        "divided",
        "whole",
        "off",
        "off/whole",
        "off/divided",
        "published",
    )
    counts = " / ".join(map(str, PUBLISHED))
    lines = [
        f"off over {side} with {counts} pictures: "
        + " / ".join(f"{b / a:.2f}" for a, b in zip(seconds, off, strict=True))
        for side, seconds in (("whole", whole), ("divided", divided))
    ]
    return "\n".join([table(head, rows), *lines])


if __name__ == "__main__":
    main()
