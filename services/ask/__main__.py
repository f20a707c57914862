"""`python -m services.ask` is `triptych ask`."""

from __future__ import annotations

import sys

from services.ask.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
