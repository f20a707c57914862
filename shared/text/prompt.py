"""Messages to a prompt: token ids with exact placeholder runs, and where each picture sits.

In: chat messages whose pictures have been measured. Out: `Prompt`. The template writes one token
for each picture. In the text that becomes the picture's marks with one placeholder for each run, so
that marks are tokenised together with their neighbours, as the reference processors do it; in the
ids every placeholder becomes a run. Special tokens in a user's text are ordinary text (see
`guard`), so only the template places them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import FailureKind, RequestFailed, UnsupportedModel
from shared.media.sizing.base import ImageLayout, Piece
from shared.media.sizing.clip import ClipLayout
from shared.media.sizing.division import UnitRun
from shared.messages.descriptor import MediaItem
from shared.text.chat_template import ChatTemplate
from shared.text.guard import SpecialTokenGuard
from shared.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture or video that has been opened and measured; see `MediaItem` for the fields.

    A video has `seconds_per_frame`, a picture has not. `pieces` are its marks and the lengths of
    its runs, in order; empty means one run and no marks.
    """

    sha256: str
    content_key: str
    grid_thw: tuple[int, int, int]
    num_tokens: int
    pieces: tuple[Piece, ...] = ()
    seconds_per_frame: float | None = None
    units: tuple[UnitRun, ...] = ()

    @classmethod
    def of(cls, sha256: str, content_key: str, layout: ImageLayout) -> Picture:
        """A picture by what its model's sizing rule makes of it."""
        return cls(
            sha256,
            content_key,
            layout.grid_thw,
            layout.num_tokens,
            layout.pieces,
            units=layout.units,
        )

    @classmethod
    def of_clip(cls, sha256: str, content_key: str, layout: ClipLayout) -> Picture:
        """A video by what its model's sizing rule makes of it: one run."""
        return cls(
            sha256,
            content_key,
            layout.grid_thw,
            layout.num_tokens,
            seconds_per_frame=layout.seconds_per_step,
            units=layout.units,
        )

    @property
    def is_video(self) -> bool:
        return self.seconds_per_frame is not None

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of its placeholder runs."""
        return tuple(piece for piece in self._pieces if isinstance(piece, int))

    def text(self, placeholder: str) -> str:
        """What stands in the prompt for it, every run shortened to one placeholder."""
        return "".join(placeholder if isinstance(p, int) else p for p in self._pieces)

    @property
    def _pieces(self) -> tuple[Piece, ...]:
        return self.pieces or (self.num_tokens,)


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

    `image_token_id` is the placeholder, None for a model that reads text only. `template_token_id`
    is what the template writes for a picture, the placeholder itself unless given;
    `video_token_id` is a video's, None for a model that reads none.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        image_token_id: int | None,
        template_token_id: int | None = None,
        video_token_id: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._image_token_id = image_token_id
        self._wants_parts = image_token_id is not None and not self._template_takes_strings()
        self._placeholder = self._token_text(image_token_id)
        self._template_token = self._token_text(template_token_id) or self._placeholder
        self._video_token_id = video_token_id
        self._video_token = self._token_text(video_token_id)

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `RequestFailed` (bad request) if the template cannot express the messages."""
        guard = SpecialTokenGuard(self._tokenizer)
        rendered = self._template.render([self._plain(message, guard) for message in messages])
        pictures = [
            part for message in messages for part in message.content if isinstance(part, Picture)
        ]
        ids = guard.encode(self._with_marks(rendered, pictures))
        return self._place(self._with_leading(ids), pictures)

    def _plain(self, message: ChatMessage, guard: SpecialTokenGuard) -> dict[str, Any]:
        """A message as templates expect it. Templates of text-only models know strings only."""
        if isinstance(message.content, str):
            text = guard.hide(message.content)
            parts = [{"type": "text", "text": text}]
            return {"role": message.role, "content": parts if self._wants_parts else text}
        texts = [part for part in message.content if isinstance(part, str)]
        if self._image_token_id is None and len(texts) == len(message.content):
            return {"role": message.role, "content": guard.hide("\n".join(texts))}
        parts = [
            {"type": "text", "text": guard.hide(part)}
            if isinstance(part, str)
            else {"type": "video" if part.is_video else "image"}
            for part in message.content
        ]
        return {"role": message.role, "content": parts}

    def _template_takes_strings(self) -> bool:
        """Some templates of vision models drop a plain string without a word."""
        probe = secrets.token_hex(8)
        try:
            return probe in self._template.render([{"role": "user", "content": probe}])
        except RequestFailed:
            return False

    def _token_text(self, token_id: int | None) -> str:
        text = "" if token_id is None else self._tokenizer.token_text(token_id)
        if text is None:
            raise UnsupportedModel(
                f"token {token_id} stands for pictures but is not in tokenizer.json, "
                f"which has {self._tokenizer.vocab_size} tokens"
            )
        return text

    def _with_marks(self, rendered: str, pictures: Sequence[Picture]) -> str:
        """The template's token for the i-th picture becomes the picture's own text."""
        tokens = [token for token in (self._template_token, self._video_token) if token]
        pattern = "|".join(map(re.escape, tokens))
        split = re.split(f"({pattern})", rendered) if tokens else [rendered]
        between, marks = split[::2], split[1::2]
        expected = [self._video_token if p.is_video else self._template_token for p in pictures]
        if marks != expected:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"the model's chat template placed {len(marks)} pictures of the "
                f"{len(pictures)} in these messages"
                + (", or in another order" if len(marks) == len(pictures) else ""),
            )
        shown = (each.text(self._placeholder_of(each)) for each in pictures)
        return between[0] + "".join(a + b for a, b in zip(shown, between[1:], strict=True))

    def _placeholder_of(self, picture: Picture) -> str:
        return self._video_token if picture.is_video else self._placeholder

    def _with_leading(self, ids: list[int]) -> list[int]:
        """Processors of vision models let the tokenizer begin the prompt if the template did not;
        templates of text models are alone responsible."""
        leading = list(self._tokenizer.leading_ids)
        if self._image_token_id is None or ids[: len(leading)] == leading:
            return ids
        return leading + ids

    def _place(self, short_ids: list[int], pictures: Sequence[Picture]) -> Prompt:
        """Every placeholder becomes the run that it stands for."""
        waiting = [(index, run) for index, each in enumerate(pictures) for run in each.runs]
        # A token in a prompt without pictures is text, whatever its id.
        placeholders = {
            self._video_token_id if each.is_video else self._image_token_id for each in pictures
        }
        num_placeholders = sum(token_id in placeholders for token_id in short_ids)
        if num_placeholders != len(waiting):
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"the prompt has {num_placeholders} placeholders where the pictures need "
                f"{len(waiting)}: {self._placeholder!r} is no token of its own or stands in a text",
            )
        ids: list[int] = []
        starts: list[list[int]] = [[] for _ in pictures]
        runs = iter(waiting)
        for token_id in short_ids:
            if token_id not in placeholders:
                ids.append(token_id)
                continue
            index, length = next(runs)
            starts[index].append(len(ids))
            ids += [token_id] * length
        media = [_media_item(*each) for each in zip(pictures, starts, strict=True)]
        return Prompt(token_ids=tuple(ids), media=tuple(media))


def _media_item(picture: Picture, starts: Sequence[int]) -> MediaItem:
    runs = tuple(zip(starts, picture.runs, strict=True))
    return MediaItem(
        kind="video" if picture.is_video else "image",
        sha256=picture.sha256,
        content_key=picture.content_key,
        grid_thw=picture.grid_thw,
        offset=starts[0],
        num_tokens=picture.num_tokens,
        runs=runs if len(runs) > 1 else (),
        seconds_per_frame=picture.seconds_per_frame,
        units=picture.units,
    )
