"""A simulated encode stage, around the very scheduler of the service.

In: pictures from the shared queue. Out: steps on the worker's device, and announcements.
"""

from __future__ import annotations

from services.encoder.scheduler import EncodeScheduler
from services.planner.engine import Device
from services.planner.world import Picture, World
from shared.telemetry import names


class EncodeSide:
    """Embeds pictures in batches."""

    def __init__(self, world: World, worker: int, device: Device) -> None:
        self._world, self._worker, self._device = world, worker, device
        self._scheduler: EncodeScheduler[Picture] = EncodeScheduler(world.limits.max_batch_patches)
        self._num_held = 0
        self._in_step = False
        world.pictures.take(self._taken)

    def _taken(self, picture: Picture) -> None:
        self._num_held += 1
        world, taken_s = self._world, self._world.timeline.now_s
        picture.request.spend(names.QUEUE_ENCODE, taken_s - picture.queued_s)
        world.host.hop(world.links.store_s, lambda: self._fetched(picture, taken_s))
        if self._num_held < world.limits.max_held:
            world.pictures.take(self._taken)

    def _fetched(self, picture: Picture, taken_s: float) -> None:
        """Preprocessed beside the device, each picture in a thread of its own."""
        world, fetched_s = self._world, self._world.timeline.now_s
        picture.request.spend(names.MEDIA_FETCH, fetched_s - taken_s)
        seconds = world.model.preprocess_s(picture.num_patches)
        world.host.run(seconds, lambda: self._ready(picture, fetched_s))

    def _ready(self, picture: Picture, fetched_s: float) -> None:
        picture.request.spend(names.PREPROCESS, self._world.timeline.now_s - fetched_s)
        self._scheduler.add(picture)
        self._step()

    def _step(self) -> None:
        if self._in_step or not (batch := self._scheduler.next_batch()):
            return
        self._in_step = True
        begun_s = self._world.timeline.now_s
        seconds = self._world.model.encode_s(sum(each.num_patches for each in batch))
        self._world.compute(self._device, seconds, len(batch), lambda: self._end(batch, begun_s))

    def _end(self, batch: list[Picture], begun_s: float) -> None:
        self._in_step = False
        was_full = self._num_held >= self._world.limits.max_held
        self._num_held -= len(batch)
        for picture in batch:
            picture.request.spend(names.ENCODE, self._world.timeline.now_s - begun_s)
            self._world.embedded(picture, self._worker)
            self._world.aside(self._world.links.picture_s)
        if was_full:
            self._world.pictures.take(self._taken)
        self._step()
