"""Messages to a prompt: token ids with exact placeholder runs, and where each medium sits.

In: chat messages whose media have been measured. Out: `Prompt`. The template writes one token for
each medium. In the text that becomes the medium's marks with one placeholder for each run, so that
marks are tokenised together with their neighbours, as the reference processors do it; in the ids
every placeholder becomes a run. Special tokens in a user's text are ordinary text (see
`guard`), so only the template places them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import FailureKind, RequestFailed, UnsupportedModel
from shared.media.kind import MediaKind
from shared.media.sizing.base import ImageLayout, Piece
from shared.media.sizing.clip import ClipLayout
from shared.media.sizing.division import UnitRun
from shared.media.sizing.sound import SoundLayout
from shared.messages.descriptor import MediaItem
from shared.text.chat_template import ChatTemplate
from shared.text.guard import SpecialTokenGuard
from shared.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Medium:
    """A picture, video or sound that has been opened and measured; see `MediaItem` for the fields.

    A video has `seconds_per_frame`, others have not. `pieces` are its marks and the lengths of its
    runs, in order; empty means one run and no marks.
    """

    kind: MediaKind
    sha256: str
    content_key: str
    grid_thw: tuple[int, int, int]
    num_tokens: int
    pieces: tuple[Piece, ...] = ()
    seconds_per_frame: float | None = None
    units: tuple[UnitRun, ...] = ()

    @classmethod
    def of(cls, sha256: str, content_key: str, layout: ImageLayout) -> Medium:
        """A picture by what its model's sizing rule makes of it."""
        return cls(
            MediaKind.IMAGE,
            sha256,
            content_key,
            layout.grid_thw,
            layout.num_tokens,
            layout.pieces,
            units=layout.units,
        )

    @classmethod
    def of_clip(cls, sha256: str, content_key: str, layout: ClipLayout) -> Medium:
        """A video by what its model's sizing rule makes of it: one run."""
        return cls(
            MediaKind.VIDEO,
            sha256,
            content_key,
            layout.grid_thw,
            layout.num_tokens,
            seconds_per_frame=layout.seconds_per_step,
            units=layout.units,
        )

    @classmethod
    def of_sound(cls, sha256: str, content_key: str, layout: SoundLayout) -> Medium:
        """A sound by what its model's sizing rule makes of it: one run."""
        return cls(MediaKind.AUDIO, sha256, content_key, layout.grid_thw, layout.num_tokens)

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
    """One turn. `content` is a plain string, or text and media in the order they were given."""

    role: str
    content: str | tuple[str | Medium, ...]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What prefill works on; `media` is in prompt order."""

    token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...]


class PromptBuilder:
    """Builds prompts for one model. Without state between calls; safe to use from several threads.

    Each kind of medium has a placeholder, None for a kind that the model does not read.
    `template_token_id` is what the template writes for a picture, the placeholder itself unless
    given.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        image_token_id: int | None,
        template_token_id: int | None = None,
        video_token_id: int | None = None,
        audio_token_id: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        ids = {
            MediaKind.IMAGE: image_token_id,
            MediaKind.VIDEO: video_token_id,
            MediaKind.AUDIO: audio_token_id,
        }
        self._ids = {kind: token_id for kind, token_id in ids.items() if token_id is not None}
        self._placeholders = {kind: self._token_text(each) for kind, each in self._ids.items()}
        self._template_tokens = dict(self._placeholders)
        if template_token_id is not None:
            self._template_tokens[MediaKind.IMAGE] = self._token_text(template_token_id)
        self._wants_parts = bool(self._ids) and not self._template_takes_strings()

    def build(self, messages: Sequence[ChatMessage]) -> Prompt:
        """Raises `RequestFailed` (bad request) if the template cannot express the messages."""
        guard = SpecialTokenGuard(self._tokenizer)
        rendered = self._template.render([self._plain(message, guard) for message in messages])
        media = [
            part for message in messages for part in message.content if isinstance(part, Medium)
        ]
        self._check_kinds(media)
        ids = guard.encode(self._with_marks(rendered, media))
        return self._place(self._with_leading(ids), media)

    def _check_kinds(self, media: Sequence[Medium]) -> None:
        for each in media:
            if each.kind not in self._ids:
                raise RequestFailed(
                    FailureKind.BAD_REQUEST, f"this model reads no media of kind {each.kind.value}"
                )

    def _plain(self, message: ChatMessage, guard: SpecialTokenGuard) -> dict[str, Any]:
        """A message as templates expect it. Templates of text-only models know strings only."""
        if isinstance(message.content, str):
            text = guard.hide(message.content)
            parts = [{"type": "text", "text": text}]
            return {"role": message.role, "content": parts if self._wants_parts else text}
        texts = [part for part in message.content if isinstance(part, str)]
        if not self._ids and len(texts) == len(message.content):
            return {"role": message.role, "content": guard.hide("\n".join(texts))}
        parts = [
            {"type": "text", "text": guard.hide(part)}
            if isinstance(part, str)
            else {"type": part.kind.value}
            for part in message.content
        ]
        return {"role": message.role, "content": parts}

    def _template_takes_strings(self) -> bool:
        """Some templates of multimodal models drop a plain string without a word."""
        probe = secrets.token_hex(8)
        try:
            return probe in self._template.render([{"role": "user", "content": probe}])
        except RequestFailed:
            return False

    def _token_text(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id)
        if text is None:
            raise UnsupportedModel(
                f"token {token_id} stands for media but is not in tokenizer.json, "
                f"which has {self._tokenizer.vocab_size} tokens"
            )
        return text

    def _with_marks(self, rendered: str, media: Sequence[Medium]) -> str:
        """The template's token for the i-th medium becomes the medium's own text."""
        tokens = self._template_tokens
        pattern = "|".join(map(re.escape, tokens.values()))
        split = re.split(f"({pattern})", rendered) if tokens else [rendered]
        between, marks = split[::2], split[1::2]
        if marks != [tokens[each.kind] for each in media]:
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"the model's chat template placed {len(marks)} media of the "
                f"{len(media)} in these messages"
                + (", or in another order" if len(marks) == len(media) else ""),
            )
        shown = (each.text(self._placeholders[each.kind]) for each in media)
        return between[0] + "".join(a + b for a, b in zip(shown, between[1:], strict=True))

    def _with_leading(self, ids: list[int]) -> list[int]:
        """Processors of models with a tower let the tokenizer begin the prompt if the template did
        not; templates of text models are alone responsible."""
        leading = list(self._tokenizer.leading_ids)
        if not self._ids or ids[: len(leading)] == leading:
            return ids
        return leading + ids

    def _place(self, short_ids: list[int], media: Sequence[Medium]) -> Prompt:
        """Every placeholder becomes the run that it stands for."""
        waiting = [(index, run) for index, each in enumerate(media) for run in each.runs]
        # A token in a prompt without media is text, whatever its id.
        placeholders = {self._ids[each.kind] for each in media}
        num_placeholders = sum(token_id in placeholders for token_id in short_ids)
        if num_placeholders != len(waiting):
            raise RequestFailed(
                FailureKind.BAD_REQUEST,
                f"the prompt has {num_placeholders} placeholders where the media need "
                f"{len(waiting)}: one of {sorted(self._placeholders.values())} is no token of its "
                "own or stands in a text",
            )
        ids: list[int] = []
        starts: list[list[int]] = [[] for _ in media]
        runs = iter(waiting)
        for token_id in short_ids:
            if token_id not in placeholders:
                ids.append(token_id)
                continue
            index, length = next(runs)
            starts[index].append(len(ids))
            ids += [token_id] * length
        items = [_media_item(*each) for each in zip(media, starts, strict=True)]
        return Prompt(token_ids=tuple(ids), media=tuple(items))


def _media_item(medium: Medium, starts: Sequence[int]) -> MediaItem:
    runs = tuple(zip(starts, medium.runs, strict=True))
    return MediaItem(
        kind=medium.kind,
        sha256=medium.sha256,
        content_key=medium.content_key,
        grid_thw=medium.grid_thw,
        offset=starts[0],
        num_tokens=medium.num_tokens,
        runs=runs if len(runs) > 1 else (),
        seconds_per_frame=medium.seconds_per_frame,
        units=medium.units,
    )
