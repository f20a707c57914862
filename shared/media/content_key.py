"""The name of an embedding: everything that changes its values, in one hash."""

from __future__ import annotations

import hashlib


def content_key(media_sha256: str, model_fingerprint: str, encoder_policy: str) -> str:
    """SHA-256 over the raw media bytes' hash, the model and how the encoder prepares pictures.

    The parts are joined with a separator that none of them may contain, so two different triples
    never share a key; the hash is never shortened, because a collision would show one user an
    answer about another user's picture.
    """
    parts = (media_sha256, model_fingerprint, encoder_policy)
    if any("\n" in part for part in parts):
        raise ValueError("a content key's parts must not contain line breaks")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def part_key(content_key: str, index: int, num_parts: int) -> str:
    """The key of one part of an embedding. It hashes two lines, so it is no whole one's."""
    return hashlib.sha256(f"{content_key}\npart {index} of {num_parts}".encode()).hexdigest()
