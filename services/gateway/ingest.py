"""From a parsed request to a descriptor that every stage can work with.

In: a `ChatRequest`. Out: `Prepared`: token ids with exact placeholder runs, media by content
hash, sampling, deadline; and the media files themselves. Everything that a client can get wrong
is refused here, before any worker hears of the request.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from services.gateway.admission import Slot
from services.gateway.media import NOUNS, LoadedMedium, MediaLoader, MediaSource
from services.gateway.model import ServedModel
from services.gateway.openai_format import grammar_of
from services.gateway.openai_parts import (
    AudioPart,
    InputAudioPart,
    MediaPart,
    Message,
    TextPart,
    VideoPart,
)
from services.gateway.openai_schema import ChatRequest
from services.gateway.problems import Problem, Refused, refuse
from services.gateway.settings import AdmissionSettings
from shared.clock import Clock, wall
from shared.media.kind import MediaKind
from shared.messages.descriptor import GrammarSpec, RequestDescriptor, SamplingParams, WorkerRef
from shared.model.randomness import derived_seed
from shared.text.prompt import ChatMessage, Medium


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be dispatched. `media` holds the files by sha256."""

    descriptor: RequestDescriptor
    media: Mapping[str, bytes]
    stops: tuple[str, ...]

    def choice(self, index: int) -> Prepared:
        """One of several answers to the same question: a request of its own, with its own seed."""
        if index == 0:
            return self
        request = self.descriptor
        seed = derived_seed(request.sampling.seed, index)
        update = {
            "request_id": f"{request.request_id}-{index}",
            "sampling": request.sampling.model_copy(update={"seed": seed}),
        }
        return replace(self, descriptor=request.model_copy(update=update))


class Ingest:
    """Prepares the requests of one model."""

    def __init__(
        self,
        model: ServedModel,
        me: WorkerRef,
        settings: AdmissionSettings,
        *,
        max_media: Mapping[MediaKind, int],
        loader: MediaLoader,
        pool: Executor,
        clock: Clock = wall,
    ) -> None:
        self._model = model
        self._me = me
        self._settings = settings
        self._max_media = max_media
        self._loader = loader
        self._pool = pool
        self._clock = clock

    def check(self, chat: ChatRequest) -> list[MediaSource]:
        """What can be refused at a glance; returns where the media are."""
        if chat.model != self._model.name:
            message = f"model {chat.model!r} is not served here, {self._model.name!r} is"
            raise Refused(Problem(404, message, param="model", code="model_not_found"))
        sources = list(_media_sources(chat))
        self._check_media(sources)
        self._check_ending(chat)
        num_chars, max_chars = _num_chars(chat), self._settings.max_text_chars
        if num_chars > max_chars:
            raise refuse(
                f"the messages have {num_chars} characters of text, the limit is {max_chars}",
                param="messages",
                code="context_length_exceeded",
            )
        return sources

    def _check_media(self, sources: Sequence[MediaSource]) -> None:
        for source in sources:
            if source.kind not in self._model.spec.media_kinds:
                raise refuse(
                    f"model {self._model.name!r} (model_type={self._model.spec.model_type!r}) "
                    f"reads no {_plural(source.kind)}",
                    param=source.field,
                    code="unsupported_media",
                )
        for kind, limit in self._max_media.items():
            num_sent = sum(source.kind is kind for source in sources)
            if num_sent > limit:
                raise refuse(
                    f"{num_sent} {_plural(kind)} were sent, the limit is {limit}",
                    param="messages",
                    code=f"too_many_{_plural(kind).replace(' ', '_')}",
                )

    def _check_ending(self, chat: ChatRequest) -> None:
        """An answer with a format ends with a stop token, because nothing else may follow it."""
        if not chat.asks_for_format or (self._model.spec.eos_token_ids and not chat.ignore_eos):
            return
        reason = "ignore_eos takes it away" if chat.ignore_eos else "this model has none"
        raise refuse(
            f"an answer with a format needs a stop token at its end, {reason}",
            param="ignore_eos" if chat.ignore_eos else "response_format",
            code="invalid_value",
        )

    async def prepare(
        self, chat: ChatRequest, sources: Sequence[MediaSource], request_id: str, slot: Slot
    ) -> Prepared:
        """Raises `Refused` or `RequestFailed`."""
        loaded = await self._load(sources, slot)
        messages = _chat_messages(chat, [each.medium for each in loaded])
        loop = asyncio.get_running_loop()
        grammar = await loop.run_in_executor(self._pool, grammar_of, chat)
        prompt = await loop.run_in_executor(self._pool, self._model.prompts.build, messages)
        now_s = self._clock()
        descriptor = RequestDescriptor(
            request_id=request_id,
            attempt=0,
            gateway=self._me,
            model=self._model.name,
            prompt_token_ids=prompt.token_ids,
            media=prompt.media,
            sampling=self._sampling(chat, self._max_tokens(chat, len(prompt.token_ids)), grammar),
            priority=chat.priority,
            created_unix_s=now_s,
            deadline_unix_s=now_s + self._settings.request_timeout_s,
        )
        media = {each.medium.sha256: each.data for each in loaded}
        return Prepared(descriptor, media, chat.stops)

    async def _load(self, sources: Sequence[MediaSource], slot: Slot) -> list[LoadedMedium]:
        if not sources:
            return []
        try:
            return await self._loader.load(sources, slot)
        except BaseExceptionGroup as group:
            # Several media may be wrong at once; one refusal is enough.
            raise group.exceptions[0] from None

    def _max_tokens(self, chat: ChatRequest, num_prompt_tokens: int) -> int:
        """What the client asked for if it fits, else what fits up to the default."""
        context = self._model.max_context_tokens
        if num_prompt_tokens >= context:
            raise refuse(
                f"the prompt has {num_prompt_tokens} tokens, the model's context holds {context} "
                "with the answer",
                param="messages",
                code="context_length_exceeded",
            )
        asked = chat.token_limit
        if asked is None:
            return min(context - num_prompt_tokens, self._settings.default_max_tokens)
        if num_prompt_tokens + asked > context:
            raise refuse(
                f"the prompt has {num_prompt_tokens} tokens and {asked} more were asked for, "
                f"the model's context holds {context}",
                param="max_completion_tokens" if chat.max_completion_tokens else "max_tokens",
                code="context_length_exceeded",
            )
        return asked

    def _sampling(
        self, chat: ChatRequest, max_tokens: int, grammar: GrammarSpec | None
    ) -> SamplingParams:
        temperature = chat.temperature
        if temperature is None:
            temperature = self._model.default_temperature
        return SamplingParams(
            temperature=temperature,
            top_k=max(chat.top_k or 0, 0),
            top_p=1.0 if chat.top_p is None else chat.top_p,
            min_p=chat.min_p or 0.0,
            presence_penalty=chat.presence_penalty or 0.0,
            frequency_penalty=chat.frequency_penalty or 0.0,
            repetition_penalty=chat.repetition_penalty or 1.0,
            logit_bias=self._logit_bias(chat),
            seed=secrets.randbits(64) if chat.seed is None else chat.seed % 2**64,
            max_tokens=max_tokens,
            min_tokens=_min_tokens(chat, max_tokens),
            stop_token_ids=() if chat.ignore_eos else self._model.spec.eos_token_ids,
            num_logprobs=chat.num_logprobs,
            grammar=grammar,
        )

    def _logit_bias(self, chat: ChatRequest) -> tuple[tuple[int, float], ...]:
        biases = {int(token_id): value for token_id, value in (chat.logit_bias or {}).items()}
        vocab_size = self._model.spec.text.vocab_size
        if biases and max(biases) >= vocab_size:
            raise refuse(
                f"logit_bias names token {max(biases)}, the model's vocabulary has {vocab_size}",
                param="logit_bias",
                code="invalid_value",
            )
        return tuple(biases.items())


def _min_tokens(chat: ChatRequest, max_tokens: int) -> int:
    least = chat.min_tokens or 0
    if least > max_tokens:
        raise refuse(
            f"min_tokens is {least}, the answer may have {max_tokens} tokens",
            param="min_tokens",
            code="invalid_value",
        )
    return least


def _media_sources(chat: ChatRequest) -> list[MediaSource]:
    return [
        _source(part, f"messages[{i}].content[{j}]")
        for i, message in enumerate(chat.messages)
        if not isinstance(message.content, str)
        for j, part in enumerate(message.content)
        if isinstance(part, MediaPart)
    ]


def _source(part: MediaPart, field: str) -> MediaSource:
    match part:
        case VideoPart():
            return MediaSource(MediaKind.VIDEO, part.video_url.url, f"{field}.video_url.url")
        case AudioPart():
            return MediaSource(MediaKind.AUDIO, part.audio_url.url, f"{field}.audio_url.url")
        case InputAudioPart():
            data, name = part.input_audio.data, f"{field}.input_audio.data"
            return MediaSource(MediaKind.AUDIO, data, name, is_base64=True)
        case _:
            return MediaSource(MediaKind.IMAGE, part.image_url.url, f"{field}.image_url.url")


def _plural(kind: MediaKind) -> str:
    return "audio clips" if kind is MediaKind.AUDIO else f"{NOUNS[kind]}s"


def _num_chars(chat: ChatRequest) -> int:
    return sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(part.text) for part in message.content if isinstance(part, TextPart))
        for message in chat.messages
    )


def _chat_messages(chat: ChatRequest, media: Sequence[Medium]) -> list[ChatMessage]:
    waiting = iter(media)

    def convert(message: Message) -> ChatMessage:
        # Chat templates know the older name of this role.
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            return ChatMessage(role, message.content)
        parts = (
            next(waiting) if isinstance(part, MediaPart) else part.text for part in message.content
        )
        return ChatMessage(role, tuple(parts))

    return [convert(message) for message in chat.messages]
