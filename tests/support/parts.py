"""Requests whose texts and pictures take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.prompts import PromptMaker
from shared.messages.descriptor import RequestDescriptor, SamplingParams
from shared.text.prompt import ChatMessage
from tests.support.stages import GATEWAY, MODEL

Parts = Sequence[str | bytes]


def ask(prompts: PromptMaker, name: str, parts: Parts, **sampling: Any) -> RequestDescriptor:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
    made = prompts.request([], "", params)
    content = tuple(prompts.measure(each) if isinstance(each, bytes) else each for each in parts)
    prompt = prompts.build([ChatMessage("user", content)])
    return made.model_copy(
        update={
            "request_id": name,
            "gateway": GATEWAY,
            "model": MODEL,
            "prompt_token_ids": prompt.token_ids,
            "media": prompt.media,
        }
    )


def pictures_of(parts: Parts) -> list[bytes]:
    return [each for each in parts if isinstance(each, bytes)]
