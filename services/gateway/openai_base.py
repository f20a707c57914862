"""The base of all request schemas: frozen, closed, strict."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A JSON object whose types are taken as they are and whose unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
