"""The model that this gateway serves, as far as a gateway must know it: words, sizes, limits.

In: a model folder or hub id. Out: `ServedModel`. Weights are never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UnsupportedModel
from shared.media.sizing.base import ImageSizing
from shared.messages.control import Role
from shared.modelspec import ModelSpec
from shared.text.chat_template import ChatTemplate
from shared.text.prompt import PromptBuilder
from shared.text.tokenizer import TextTokenizer


@dataclass(frozen=True)
class ServedModel:
    """`sizer` is None for a model that reads no pictures.

    `default_temperature` is 1.0 as in the OpenAI API, unless the folder's generation_config.json
    says `"do_sample": false`: such a model answers greedily when the client names no temperature.
    """

    name: str
    spec: ModelSpec
    tokenizer: TextTokenizer
    prompts: PromptBuilder
    sizer: ImageSizing | None
    default_temperature: float

    @classmethod
    def load(cls, name: str, model_dir: Path) -> ServedModel:
        """Raises `UnsupportedModel` with the file and field that stand in the way."""
        spec = ModelSpec.load(model_dir)
        tokenizer = TextTokenizer.load(model_dir)
        return cls(
            name=name,
            spec=spec,
            tokenizer=tokenizer,
            prompts=_prompt_builder(model_dir, spec, tokenizer),
            sizer=spec.vision.sizing if spec.vision else None,
            default_temperature=0.0 if _is_greedy(model_dir) else 1.0,
        )

    @property
    def max_context_tokens(self) -> int:
        return self.spec.text.max_context_tokens

    def roles(self, *, pictures: bool) -> tuple[Role, ...]:
        """The stages that a request needs, with or without media."""
        return tuple(
            role
            for role in (Role.ENCODE, Role.PREFILL, Role.DECODE)
            if role is not Role.ENCODE or (pictures and self.spec.has_tower)
        )


def _prompt_builder(model_dir: Path, spec: ModelSpec, tokenizer: TextTokenizer) -> PromptBuilder:
    return PromptBuilder(
        tokenizer,
        ChatTemplate.load(model_dir),
        image_token_id=spec.vision.image_token_id if spec.vision else None,
        template_token_id=spec.vision.template_token_id if spec.vision else None,
        video_token_id=spec.vision.video_token_id if spec.vision and spec.vision.clips else None,
        audio_token_id=spec.audio.audio_token_id if spec.audio else None,
    )


def _is_greedy(model_dir: Path) -> bool:
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: not valid JSON ({error})") from error
    return isinstance(config, dict) and config.get("do_sample") is False
