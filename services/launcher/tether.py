"""Runs a program that cannot tie itself to its parent: sets the tie, then becomes the program.

Use: `python -m services.launcher.tether PROGRAM ARGUMENT...`. The kernel keeps the parent-death
signal across exec.
"""

from __future__ import annotations

import os
import sys

from shared.runtime.lifecycle import die_with_parent


def main(argv: list[str]) -> None:
    die_with_parent()
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
