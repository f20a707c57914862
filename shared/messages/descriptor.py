"""What a request is: token ids with exact placeholder runs, media by content hash, sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shared.media.kind import MediaKind
from shared.messages.base import Message

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WorkerRef(Message):
    """One life of one process. A restarted worker keeps its name and gets a new, larger
    incarnation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    incarnation: Annotated[int, Field(ge=0)]


MAX_GRAMMAR_CHARS = 65_536
MAX_LOGIT_BIASES = 1024
MAX_LOGPROBS = 20

Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
LogitBias = tuple[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]]


class GrammarSpec(Message):
    """What the text of an answer must match, as the client wrote it; compiled by each worker."""

    kind: Literal["json_schema", "regex", "lark"]
    text: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class SamplingParams(Message):
    """How the next token is chosen; `temperature == 0` is greedy.

    Randomness is a function of (`seed`, index of the token in the answer) alone, so an answer does
    not depend on the batch, the worker or a recovery. The gateway draws a seed if the client gave
    none. The repetition penalty looks at prompt and answer, the presence and the frequency penalty
    at the answer only. No stop token is taken before `min_tokens` tokens. `num_logprobs` is None
    where nothing of the distribution is told, else the number of likeliest tokens to tell beside
    the chosen one.
    """

    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    logit_bias: Annotated[tuple[LogitBias, ...], Field(max_length=MAX_LOGIT_BIASES)] = ()
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    max_tokens: Annotated[int, Field(ge=1)] = 16
    min_tokens: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: tuple[TokenId, ...] = ()
    num_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    grammar: GrammarSpec | None = None


MAX_UNITS = 4096
Units = tuple[
    Annotated[int, Field(ge=1, le=MAX_UNITS)],
    Annotated[int, Field(ge=0)],
    Annotated[int, Field(ge=1)],
]


class MediaItem(Message):
    """One picture, video or sound of a request, in prompt order.

    `sha256` names the raw bytes in the media store; `content_key` names the embedding (bytes, model
    and encoder policy); `grid_thw` is the patch grid (time, height, width) before merging, or the
    grid of tiles, as the family's sizing rule gives it; a sound's positions all lie in time. Its
    `num_tokens` placeholders begin at `offset` of the prompt; `runs` are their (start, length)
    where marks stand between them, and empty where they are one run. `seconds_per_frame` is the
    time between two temporal patches of a video, None for anything else. `units` is where the item
    may be divided: so many pieces in a row, and the embedding rows and the patches of each of them;
    empty if nowhere.
    """

    kind: MediaKind
    sha256: Sha256Hex
    content_key: Sha256Hex
    grid_thw: tuple[int, int, int]
    offset: Annotated[int, Field(ge=0)]
    num_tokens: Annotated[int, Field(ge=1)]
    runs: tuple[tuple[int, int], ...] = ()
    seconds_per_frame: Annotated[float, Field(gt=0)] | None = None
    units: Annotated[tuple[Units, ...], Field(max_length=MAX_UNITS)] = ()

    @property
    def num_patches(self) -> int:
        """The tower's work for it; its rows, where the units are not known."""
        return sum(count * patches for count, _, patches in self.units) or self.num_tokens

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First row and row behind the last of every run of placeholders, in prompt order."""
        runs = self.runs or ((self.offset, self.num_tokens),)
        return tuple((start, start + length) for start, length in runs)

    @property
    def stop(self) -> int:
        """Row behind its last placeholder: from here on the prompt no longer needs it."""
        return self.spans[-1][1]

    @model_validator(mode="after")
    def _units_add_up(self) -> MediaItem:
        num_rows = sum(count * rows for count, rows, _ in self.units)
        if self.units and num_rows != self.num_tokens:
            raise ValueError(f"units={self.units} give {num_rows} rows, not {self.num_tokens}")
        return self

    @model_validator(mode="after")
    def _runs_add_up(self) -> MediaItem:
        end = self.offset
        for start, stop in self.spans:
            if start < end or stop <= start:
                raise ValueError(f"runs={self.runs} overlap, are empty or begin before the offset")
            end = stop
        if self.spans[0][0] != self.offset or self.num_tokens != sum(
            stop - start for start, stop in self.spans
        ):
            raise ValueError(
                f"runs={self.runs} do not hold {self.num_tokens} placeholders from {self.offset}"
            )
        return self


class MediaPart(Message):
    """One of `count` parts into which a media item is divided, each encoded by itself.

    Its embedding, rows `first_row .. first_row + num_tokens` of the item's, has a key of its own.
    """

    content_key: Sha256Hex
    index: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=2)]
    first_row: Annotated[int, Field(ge=0)]
    num_tokens: Annotated[int, Field(ge=1)]
    num_patches: Annotated[int, Field(ge=1)]

    @property
    def rows(self) -> slice:
        """Its rows of the item's embedding."""
        return slice(self.first_row, self.first_row + self.num_tokens)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> MediaPart:
        if self.index >= self.count:
            raise ValueError(f"index={self.index} of count={self.count} parts")
        return self


class RequestDescriptor(Message):
    """Everything a stage needs to know of a request.

    `emitted_token_ids` are answer tokens that already reached the client: a resubmission after a
    failure prefills prompt + emitted and carries on at index `len(emitted_token_ids)`. `priority`:
    the lower, the more urgent.
    """

    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    attempt: Annotated[int, Field(ge=0)]
    gateway: WorkerRef
    model: str
    prompt_token_ids: Annotated[tuple[TokenId, ...], Field(min_length=1)]
    emitted_token_ids: tuple[TokenId, ...] = ()
    media: tuple[MediaItem, ...] = ()
    sampling: SamplingParams
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    created_unix_s: float
    deadline_unix_s: float

    @property
    def next_index(self) -> int:
        """Index, in the answer, of the next token to generate."""
        return len(self.emitted_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values the first generated token attends to."""
        return len(self.prompt_token_ids) + len(self.emitted_token_ids)

    @property
    def max_context_tokens(self) -> int:
        """Upper bound of the sequence's length when the answer is complete."""
        return len(self.prompt_token_ids) + self.sampling.max_tokens
