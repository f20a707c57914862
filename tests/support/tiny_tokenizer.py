"""A byte-level tokenizer with the marks of all vision families.

Line breaks merge as they do in real vocabularies, and the beginning-of-text token is added by the
tokenizer itself, so that where a mark is tokenised makes a difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

_MARKS = (
    "<image>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
_WORDS = ("<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĊĊ")
TOKEN_IDS = {word: token_id for token_id, word in enumerate((*_WORDS, *_MARKS))}
VOCAB_SIZE = len(TOKEN_IDS)


def tiny_tokenizer(more_marks: Sequence[str] = ()) -> Tokenizer:
    """A fresh one; ids of `more_marks` go on from `VOCAB_SIZE`."""
    vocab = {word: TOKEN_IDS[word] for word in _WORDS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ"), ("ĊĊ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", *_MARKS, *more_marks])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", TOKEN_IDS["<s>"])]
    )
    return tokenizer
