"""Why a question got no answer; each is shown to the user as one line."""

from __future__ import annotations

from shared.errors import TriptychError


class AskError(TriptychError):
    """The question could not be asked or was not answered."""


class BadMedium(AskError):
    """A file is missing, unreadable or neither picture, clip nor sound."""


class ServerNotReachable(AskError):
    """Nothing answers at the URL."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"no server answers at {url} ({reason}): start one with `triptych up`")


class ServerRefused(AskError):
    """The server answered with an error status, or with an error inside the stream."""


class AnswerCut(AskError):
    """The stream ended before the answer did."""

    def __init__(self) -> None:
        super().__init__("the connection ended before the answer did")
