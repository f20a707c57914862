"""`python -m services.role` is `triptych role`."""

from __future__ import annotations

import sys

from services.role.command import main

if __name__ == "__main__":
    main(sys.argv[1:])
