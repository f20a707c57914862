"""A simulated encode stage, around the very scheduler of the service.

In: pictures from the shared queue. Out: steps on the worker's device, and announcements.
"""

from __future__ import annotations

from services.encoder.scheduler import EncodeScheduler
from services.planner.engine import Device
from services.planner.world import Picture, World


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
        world = self._world
        # Fetched and preprocessed beside the device, each picture in a thread of its own.
        ready_s = world.links.store_s + world.model.preprocess_s(picture.num_patches)
        world.host.run(ready_s, lambda: self._ready(picture))
        if self._num_held < world.limits.max_held:
            world.pictures.take(self._taken)

    def _ready(self, picture: Picture) -> None:
        self._scheduler.add(picture)
        self._step()

    def _step(self) -> None:
        if self._in_step or not (batch := self._scheduler.next_batch()):
            return
        self._in_step = True
        seconds = self._world.model.encode_s(sum(each.num_patches for each in batch))
        self._world.compute(self._device, seconds, lambda: self._end(batch))

    def _end(self, batch: list[Picture]) -> None:
        self._in_step = False
        was_full = self._num_held >= self._world.limits.max_held
        self._num_held -= len(batch)
        for picture in batch:
            self._world.embedded(picture, self._worker)
        if was_full:
            self._world.pictures.take(self._taken)
        self._step()
