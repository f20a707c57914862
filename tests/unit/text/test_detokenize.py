"""The pieces together are the decoding of all ids; no piece shows half a character."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models

from shared.runtime.settings import DEMO_MODEL
from shared.text.detokenize import Detokenizer
from shared.text.tokenizer import TextTokenizer

BYTE_LEVEL = TextTokenizer.load(DEMO_MODEL)


def _sentencepiece_like() -> TextTokenizer:
    """Words with a leading-space mark, and single bytes for everything else."""
    words = ["▁the", "▁cat", "s", "▁", "é", "the"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TextTokenizer(tokenizer.to_str())


SENTENCEPIECE = _sentencepiece_like()


def pieces(tokenizer, ids) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(max_examples=500)
@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
def test_any_ids(ids):
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_any_text_comes_back_in_whole_characters(text):
    ids = BYTE_LEVEL.encode_text(text)
    shown = pieces(BYTE_LEVEL, ids)
    assert "".join(shown) == BYTE_LEVEL.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "é", "▁", "🙂", "ü", "中"]), max_size=20))
def test_leading_spaces_and_byte_tokens(words):
    vocabulary = SENTENCEPIECE._template.get_vocab()
    ids: list[int] = []
    for word in words:
        known = vocabulary.get(word)
        ids += [vocabulary[f"<0x{b:02X}>"] for b in word.encode()] if known is None else [known]
    assert "".join(pieces(SENTENCEPIECE, ids)) == SENTENCEPIECE.decode(ids)


@pytest.mark.parametrize("text", ["🙂", "né中🙂", "👩‍👩‍👧"])
def test_a_character_appears_with_its_last_byte(text):
    ids = BYTE_LEVEL.encode_text(text)
    assert len(ids) > len(text)
    shown = pieces(BYTE_LEVEL, ids)
    assert shown[-1] == ""
    assert all(piece == "" or piece.isprintable() or "\u200d" in piece for piece in shown)


def test_bytes_that_never_become_a_character_show_at_the_end():
    first, *_ = BYTE_LEVEL.encode_text("🙂")
    assert pieces(BYTE_LEVEL, [first]) == ["", "\ufffd"]


def test_the_window_stays_small():
    detokenizer = Detokenizer(BYTE_LEVEL)
    for token_id in BYTE_LEVEL.encode_text("the cat sat on the mat. " * 50):
        detokenizer.push(token_id)
        assert len(detokenizer._window) < 8
