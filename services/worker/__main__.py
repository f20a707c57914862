"""`python -m services.worker`: one process with any set of stages."""

from __future__ import annotations

from collections.abc import Sequence

from services.stages import run_worker


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    run_worker(argv)


if __name__ == "__main__":
    main()
