"""Messages to a prompt: token ids with exact placeholder runs, and where each picture sits.

In: chat messages whose pictures have been measured. Out: `Prompt`. The template writes one
placeholder token for each picture; here it becomes a run as long as the picture has merged patches.
Special tokens in a user's text are ordinary text (see `guard`), so only the template places them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import FailureKind, RequestFailed
from shared.messages.descriptor import MediaItem
from shared.text.chat_template import ChatTemplate
from shared.text.guard import SpecialTokenGuard
from shared.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that has been opened and measured; see `MediaItem` for the fields."""

    sha256: str
    content_key: str
    grid_thw: tuple[int, int, int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `content` is a plain string, or text and pictures in the order they were given."""

    role: str
    content: str | tuple[str | Picture, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What prefill works on; `media` is in prompt order."""

    token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...]


class PromptBuilder:
    """Builds prompts for one model. Without state between calls; safe to use from several threads.

    `image_token_id` is None for a model that reads text only.
    """

    def __init__(
        self, tokenizer: TextTokenizer, template: ChatTemplate, image_token_id: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image_token_id = image_token_id

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `RequestFailed` (bad request) if the template cannot express the messages."""
        guard = SpecialTokenGuard(self._tokenizer)
        rendered = self._template.render([self._plain(message, guard) for message in messages])
        pictures = [
            part for message in messages for part in message.content if isinstance(part, Picture)
        ]
        return self._place(guard.encode(rendered), pictures)

    def _plain(self, message: ChatMessage, guard: SpecialTokenGuard) -> dict[str, Any]:
        """A message as templates expect it. Templates of text-only models know strings only."""
        if isinstance(message.content, str):
            return {"role": message.role, "content": guard.hide(message.content)}
        texts = [part for part in message.content if isinstance(part, str)]
        if self._image_token_id is None and len(texts) == len(message.content):
            return {"role": message.role, "content": guard.hide("\n".join(texts))}
        parts = [
            {"type": "text", "text": guard.hide(part)} if isinstance(part, str) else _PICTURE
            for part in message.content
        ]
        return {"role": message.role, "content": parts}

    def _place(self, template_ids: list[int], pictures: Sequence[Picture]) -> Prompt:
        """Expand the i-th placeholder token into the run of the i-th picture."""
        num_placeholders = template_ids.count(self._image_token_id or -1)
        if self._image_token_id is None:
            num_placeholders = 0
        if num_placeholders != len(pictures):
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"the model's chat template placed {num_placeholders} pictures of the "
                f"{len(pictures)} in these messages",
            )
        waiting = iter(pictures)
        ids: list[int] = []
        media: list[MediaItem] = []
        for token_id in template_ids:
            if token_id != self._image_token_id:
                ids.append(token_id)
                continue
            picture = next(waiting)
            media.append(_media_item(picture, offset=len(ids)))
            ids += [token_id] * picture.num_tokens
        return Prompt(token_ids=tuple(ids), media=tuple(media))


_PICTURE = {"type": "image"}


def _media_item(picture: Picture, offset: int) -> MediaItem:
    return MediaItem(
        kind="image",
        sha256=picture.sha256,
        content_key=picture.content_key,
        grid_thw=picture.grid_thw,
        offset=offset,
        num_tokens=picture.num_tokens,
    )
