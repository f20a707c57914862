"""`python -m services.prefill`: a prefill worker."""

from __future__ import annotations

from collections.abc import Sequence

from services.stages import run_stage
from shared.messages.control import Role


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    run_stage(Role.PREFILL, argv)


if __name__ == "__main__":
    main()
