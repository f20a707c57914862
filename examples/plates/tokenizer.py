"""The demo model's tokenizer: byte-level BPE learned from its own wording, with Qwen2's special
tokens and chat template.

`python -m examples.plates.tokenizer DIR` writes tokenizer.json, tokenizer_config.json and
chat_template.jinja.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from examples.plates import wording
from examples.plates.questions import training_stream

BPE_SIZE = 736
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer: every digit is a token of its own."""
CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- set videos = namespace(count=0) -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{%- set pictures.count = pictures.count + 1 -%}
{{- 'Picture ' + pictures.count | string + ': <|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] in ('video', 'video_url') or 'video' in part -%}
{%- set videos.count = videos.count + 1 -%}
{{- 'Video ' + videos.count | string + ': <|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def _corpus() -> Iterator[str]:
    """Every phrase of the wording many times over, as it is typed and answered."""
    for chat in (
        chat for chat, _ in zip(training_stream(7, max_turns=3), range(4000), strict=False)
    ):
        for turn in chat.turns:
            yield turn.question
            yield turn.answer
    for text in (*wording.SYSTEMS, "system\n", "user\n", "assistant\n", "Picture 1: ", "Video 1: "):
        yield from [text] * 50
    rng = random.Random(3)
    for question, answer in wording.CHAT:
        yield from (question, question.capitalize(), answer) * rng.randint(2, 3)


def build() -> Tokenizer:
    """The trained tokenizer; the same wording gives the same tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=BPE_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def load_or_save(folder: Path) -> Tokenizer:
    """The tokenizer of an interrupted run, or a new one."""
    path = folder / "tokenizer.json"
    return save(folder, Tokenizer.from_file(str(path)) if path.exists() else build())


def save(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Writes the tokenizer's three files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 4096,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "split_special_tokens": False,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer


if __name__ == "__main__":
    save(Path(sys.argv[1]), build())
