"""`python -m bench.delayed --workers "5E 1P 2D" --profile FILE [WORKER OPTIONS]`."""

from __future__ import annotations

from bench.delayed.workers import main

if __name__ == "__main__":
    main()
