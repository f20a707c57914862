"""Times steps of the services' own executors on the model's real weights.

In: a model folder and a grid of steps. Out: `Samples`. The content of prompts and pictures is
random: it changes no step's time. Nothing else may run on the device meanwhile.
"""

from __future__ import annotations

import io
import random
import statistics
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from services.decode.executor import DecodeExecutor
from services.decode.sequence import Sequence as RunningSequence
from services.encoder.build import load_executor as load_encoder
from services.encoder.preprocess import open_preprocessor
from services.planner.perf_model import Samples
from services.planner.profiling.grid import (
    PICTURE_SIDES,
    Room,
    decode_steps,
    picture_batches,
    prompt_steps,
)
from services.prefill.executor import PrefillExecutor, PromptInput
from shared.cache.block_pool import BlockPool
from shared.errors import RequestFailed
from shared.media.picture import PictureLimits
from shared.messages.descriptor import RequestDescriptor, SamplingParams, WorkerRef
from shared.model.sampling_row import SamplingState
from shared.model.towers.base import TowerInput
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from shared.runtime.language import load_language

ME = WorkerRef(name="profile", incarnation=1)
DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How often a step is measured, and the largest pass of the tower."""

    repeats: int
    max_patches: int


class Stopwatch:
    """The median time of a step after one that warms up; `on_step` is told of each.

    Where one thread computes, its CPU time counts if that is less: then only other programs have
    made the step wait.
    """

    def __init__(self, repeats: int, device: str, on_step: Callable[[], None]) -> None:
        self._repeats = repeats
        self._device = device
        self._on_step = on_step

    def __call__(self, step: Callable[[], object]) -> float:
        step()
        times_s = []
        for _ in range(self._repeats):
            self._settle()
            started_s, cpu_s = time.perf_counter(), time.process_time()
            step()
            self._settle()
            times_s.append(time.perf_counter() - started_s)
            if self._device == "cpu":
                # Of several threads together it is more than the time that has passed.
                times_s[-1] = min(times_s[-1], time.process_time() - cpu_s)
        self._on_step()
        return statistics.median(times_s)

    def _settle(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def measure(
    folder: ModelFolder, room: Room, effort: Effort, on_step: Callable[[], None]
) -> tuple[Samples, float]:
    """The samples, and bytes of embedding per patch. Raises `TriptychError`."""
    watch = Stopwatch(effort.repeats, folder.device, on_step)
    encode: list[tuple[int, float]] = []
    preprocess: list[tuple[int, float]] = []
    bytes_per_patch = 0.0
    if folder.spec.has_tower:
        preprocess, pixels = _preprocessed(folder, watch)
        encode, bytes_per_patch = _encoded(folder, pixels, effort.max_patches, watch)
    prefill, decode = _language(folder, room, watch)
    return Samples(encode, prefill, decode, preprocess), bytes_per_patch


def num_steps(spec: ModelSpec, room: Room) -> int:
    """About how many steps `measure` will take: what pictures become is known only then."""
    pictures = 3 * len(PICTURE_SIDES) if spec.has_tower else 0
    return pictures + sum(1 for _ in prompt_steps(room)) + sum(1 for _ in decode_steps(room))


def _preprocessed(
    folder: ModelFolder, watch: Stopwatch
) -> tuple[list[tuple[int, float]], list[TowerInput]]:
    """Patches and seconds of media of several sizes, and one medium of each patch count."""
    preprocess = open_preprocessor(folder.directory, PictureLimits())
    samples, by_patches = [], {}
    for side in PICTURE_SIDES:
        data = _medium(folder.spec, side)
        try:
            pixels = preprocess(data)
        except RequestFailed:  # not a size for this model
            continue
        samples.append((pixels.num_patches, watch(partial(preprocess, data))))
        by_patches[pixels.num_patches] = pixels
    return samples, list(by_patches.values())


def _encoded(
    folder: ModelFolder, pictures: Sequence[TowerInput], max_patches: int, watch: Stopwatch
) -> tuple[list[tuple[int, float]], float]:
    executor = load_encoder(folder)
    samples = []
    for index, batch in picture_batches(tuple(p.num_patches for p in pictures), max_patches):
        batched = [pictures[index]] * batch
        seconds = watch(partial(executor.run, batched))
        samples.append((pictures[index].num_patches * batch, seconds))
    largest = pictures[-1]
    (embedding,) = executor.run([largest])
    return samples, embedding.nbytes / largest.num_patches


def _language(
    folder: ModelFolder, room: Room, watch: Stopwatch
) -> tuple[list[tuple[tuple[int, ...], float]], list[tuple[tuple[int, ...], float]]]:
    model, kv = load_language(folder, room.block_size, room.num_blocks)
    pool = BlockPool(room.num_blocks, room.block_size)
    prefill, decode = PrefillExecutor(model, kv, folder.spec), DecodeExecutor(model, kv)
    prefilled = []
    for lengths in prompt_steps(room):
        with pool.allocate(sum(map(room.num_blocks_of, lengths))) as blocks:
            inputs = list(_prompts(prefill, folder.spec, lengths, blocks.block_ids, room))
            prefilled.append((lengths, watch(partial(prefill.run, inputs))))
    decoded = []
    for lengths in decode_steps(room):
        running = [_sequence(pool, room, length) for length in lengths]
        try:
            decoded.append((lengths, watch(partial(decode.run, running))))
        finally:
            for sequence in running:
                sequence.blocks.free()
    return prefilled, decoded


def _prompts(
    executor: PrefillExecutor,
    spec: ModelSpec,
    lengths: Sequence[int],
    block_ids: Sequence[int],
    room: Room,
) -> Iterator[PromptInput]:
    draw = random.Random(len(lengths))
    first = 0
    for length in lengths:
        last = first + room.num_blocks_of(length)
        prompt = executor.prepare(_request(spec, length, draw))
        yield PromptInput(prompt, None, tuple(block_ids[first:last]))
        first = last


def _request(spec: ModelSpec, num_tokens: int, draw: random.Random) -> RequestDescriptor:
    now_s = time.time()
    return RequestDescriptor(
        request_id="profile",
        attempt=0,
        gateway=ME,
        model="profile",
        prompt_token_ids=tuple(draw.choices(_words(spec), k=num_tokens)),
        sampling=SamplingParams(temperature=0.0, max_tokens=1),
        created_unix_s=now_s,
        deadline_unix_s=now_s + DEADLINE_S,
    )


def _words(spec: ModelSpec) -> Sequence[int]:
    """Token ids that stand for text: placeholders of media without media would be refused."""
    vision = spec.vision
    marks: set[int | None] = {spec.audio.audio_token_id} if spec.audio else set()
    if vision is not None:
        marks |= {
            vision.image_token_id,
            vision.video_token_id,
            vision.vision_start_token_id,
            vision.vision_end_token_id,
        }
    return [token_id for token_id in range(spec.text.vocab_size) if token_id not in marks]


def _sequence(pool: BlockPool, room: Room, context_tokens: int) -> RunningSequence:
    sampling = SamplingParams(temperature=0.0, max_tokens=2)
    return RunningSequence(
        request_id="profile",
        attempt=0,
        gateway=ME,
        sampling=sampling,
        state=SamplingState(sampling, ()),
        blocks=pool.allocate(room.num_blocks_of(context_tokens + 1)),
        kv_len=context_tokens,
        next_pos=context_tokens,
        last_token_id=0,
        next_index=1,
    )


def _medium(spec: ModelSpec, side: int) -> bytes:
    """A picture, or the same share of the longest sound as this is of the largest picture."""
    if spec.audio is None:
        return _picture(side)
    sizing = spec.audio.sizing
    return _sound(sizing.max_samples * side // max(PICTURE_SIDES), sizing.rate_hz)


def _sound(num_samples: int, rate_hz: int) -> bytes:
    """A WAV of noise."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, rate_hz, num_samples, "NONE", ""))
        file.writeframes(random.Random(num_samples).randbytes(2 * num_samples))
    return buffer.getvalue()


def _picture(side: int) -> bytes:
    """A square PNG of blurred noise: as costly to decode as a photograph's."""
    noise = random.Random(side).randbytes(16 * 16 * 3)
    coarse = Image.frombytes("RGB", (16, 16), noise)
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()
