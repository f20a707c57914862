"""A model's vocabulary: text to token ids and back.

In: a model folder with a tokenizer.json. Out: ids, and text without special tokens. There are two
ways in: `encode_template` gives special tokens their meaning and is for text that the chat template
wrote; `encode_text` treats the same characters as ordinary text and is for what a user wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from shared.errors import UnsupportedModel
from shared.text.token_bytes import TokenBytes


class TextTokenizer:
    """An immutable tokenizer; safe to use from several threads at once."""

    def __init__(self, tokenizer_json: str) -> None:
        self._template = _load(tokenizer_json)
        # The switch is state of the Rust object, so each behaviour has an object of its own.
        self._text = _load(tokenizer_json)
        self._text.encode_special_tokens = True
        self._bytes = TokenBytes(self._template)
        added = self._template.get_added_tokens_decoder()
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id for token_id, token in added.items() if token.special
        }
        self.leading_ids = self._leading_ids()

    @classmethod
    def load(cls, model_dir: Path) -> TextTokenizer:
        """Read `tokenizer.json`. Raises `UnsupportedModel` if there is none that can be used."""
        path = model_dir / "tokenizer.json"
        try:
            return cls(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise UnsupportedModel(f"{path}: no usable tokenizer ({error})") from error

    def encode_template(self, text: str) -> list[int]:
        """Ids of text in which special tokens mean what they say."""
        return list(self._template.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which special tokens are ordinary characters."""
        return list(self._text.encode(text, add_special_tokens=False).ids)

    def token_text(self, token_id: int) -> str | None:
        """What a template writes for this token; None for an id outside the vocabulary."""
        text: str | None = self._template.id_to_token(token_id)
        return text

    def _leading_ids(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer puts in front of any text if it is not told not to."""
        encoded = self._template.encode("a", add_special_tokens=True)
        is_special = [*encoded.special_tokens_mask, 0]
        return tuple(encoded.ids[: is_special.index(0)])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out, undecodable bytes become U+FFFD."""
        return str(self._template.decode(list(token_ids), skip_special_tokens=True))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token by itself, perhaps part of a character; special tokens as well."""
        return self._bytes.of(token_id)

    @property
    def vocab_size(self) -> int:
        """Ids are below this number."""
        return int(self._template.get_vocab_size(with_added_tokens=True))


def _load(tokenizer_json: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the Rust binding raises bare Exception
        raise ValueError(str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
