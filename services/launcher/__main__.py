"""`python -m services.launcher` is `triptych up`."""

from __future__ import annotations

import sys

from services.launcher.up import main

if __name__ == "__main__":
    main(sys.argv[1:])
