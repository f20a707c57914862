"""The base of all wire types: frozen, closed, plain data."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Message(BaseModel):
    """A value on the wire. Unknown fields are refused: a peer of another version must be
    noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
