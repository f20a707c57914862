"""Request descriptors made as the gateway makes them, for benches that call the engine directly."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from services.gateway.model import ServedModel
from shared.media.content_key import content_key
from shared.media.picture import PictureLimits, open_picture
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.text.prompt import ChatMessage, Medium, Prompt
from shared.text.tokenizer import TextTokenizer

DEADLINE_S = 600.0


class PromptMaker:
    """Builds the descriptors of one model."""

    def __init__(self, model_dir: Path) -> None:
        self._model = ServedModel.load("bench", model_dir)
        self._me = WorkerRef(name="bench", incarnation=1)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""
        return self._model.tokenizer

    def request(
        self,
        pictures: Sequence[bytes],
        question: str,
        sampling: SamplingParams,
        *,
        preface: str = "",
    ) -> RequestDescriptor:
        """One user turn: the preface, if any, the pictures, then the question."""
        parts: list[str | Medium] = [*map(self.measure, pictures), question]
        if preface:
            parts.insert(0, preface)
        prompt = self.build([ChatMessage("user", tuple(parts))])
        now_s = time.time()
        return RequestDescriptor(
            request_id="bench",
            attempt=0,
            gateway=self._me,
            model="bench",
            prompt_token_ids=prompt.token_ids,
            media=prompt.media,
            sampling=sampling,
            created_unix_s=now_s,
            deadline_unix_s=now_s + DEADLINE_S,
        )

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """The prompt of a whole chat."""
        return self._model.prompts.build(messages)

    def measure(self, data: bytes) -> Medium:
        """A picture as a part of a message."""
        assert self._model.sizer is not None, "the model reads text only"
        picture = open_picture(data, PictureLimits())
        layout = self._model.sizer.measure(picture.height, picture.width)
        sha256 = hashlib.sha256(data).hexdigest()
        spec = self._model.spec
        key = content_key(sha256, spec.fingerprint, spec.preprocessor_hash)
        return Medium.of(sha256, key, layout)
