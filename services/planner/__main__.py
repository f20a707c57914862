"""`python -m services.planner` is `triptych plan`."""

from __future__ import annotations

import sys

from services.planner.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
