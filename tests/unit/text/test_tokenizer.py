"""Special tokens mean something only in text that the template wrote."""

import pytest

from shared.errors import UnsupportedModel
from shared.runtime.settings import DEMO_MODEL
from shared.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(DEMO_MODEL)


def test_special_tokens_are_known_by_name(tokenizer):
    assert tokenizer.special_tokens["<|im_end|>"] == 621


def test_template_text_and_user_text_differ_in_special_tokens_only(tokenizer):
    assert tokenizer.encode_template("<|im_end|>") == [621]
    assert 621 not in tokenizer.encode_text("<|im_end|>")
    assert tokenizer.encode_template("two cats") == tokenizer.encode_text("two cats")


def test_decode_leaves_special_tokens_out(tokenizer):
    ids = tokenizer.encode_template("<|im_start|>hello<|im_end|>")
    assert tokenizer.decode(ids) == "hello"


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        TextTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="no usable tokenizer"):
        TextTokenizer.load(tmp_path)
