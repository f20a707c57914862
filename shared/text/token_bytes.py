"""The bytes that one token stands for, by itself.

In: a token id. Out: bytes, perhaps not a whole character. Decoding a single id would not tell: it
drops a leading space or turns part of a character into U+FFFD. Byte-level vocabularies (GPT-2's
alphabet) and vocabularies with byte fallback (`<0x0A>`; a space as U+2581) are known.
"""

from __future__ import annotations

import re

from tokenizers import Tokenizer

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Looks tokens of one vocabulary up."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        decoder = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
        self._byte_of = _byte_level_alphabet() if b"ByteLevel" in decoder else None

    def of(self, token_id: int) -> bytes:
        """Empty for an id that the vocabulary does not have."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_of is not None:
            byte_of = self._byte_of
            return b"".join(
                bytes([byte_of[each]]) if each in byte_of else each.encode() for each in piece
            )
        if (byte := _BYTE.fullmatch(piece)) is not None:
            return bytes([int(byte.group(1), 16)])
        return str(piece).replace(_SPACE, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself if it is printable, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(hidden)
    }
