"""Special tokens mean something only in text that the template wrote."""

import json

import pytest

from shared.errors import UnsupportedModel
from shared.runtime.settings import DEMO_MODEL
from shared.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.load(DEMO_MODEL)


@pytest.fixture(scope="module")
def end_id() -> int:
    """As the model's own config names it."""
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    return int(config["text_config"]["eos_token_id"])


def test_special_tokens_are_known_by_name(tokenizer, end_id):
    assert tokenizer.special_tokens["<|im_end|>"] == end_id


def test_template_text_and_user_text_differ_in_special_tokens_only(tokenizer, end_id):
    assert tokenizer.encode_template("<|im_end|>") == [end_id]
    assert end_id not in tokenizer.encode_text("<|im_end|>")
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
