"""A cluster served by arithmetic: the services' schedulers, with fitted times for the computing.

In: a cluster, a performance model, arrivals. Out: when each request's tokens came, and the memory
that it took. The same input gives the same result. Not simulated: caches of embeddings and
prefixes, speculation, `--reserve grow`, priorities, failures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from services.planner.cluster import Cluster
from services.planner.decode_side import DecodeSide
from services.planner.encode_side import EncodeSide
from services.planner.engine import Action, Device, Host, Slots, Slowness, TaskQueue, Timeline
from services.planner.perf_model import PerformanceModel
from services.planner.prefill_side import PrefillSide
from services.planner.request import SimRequest
from services.planner.workload import Arrival
from services.planner.world import Picture, Prefilled, World, nothing
from shared.cache.block_pool import BlockPool
from shared.errors import SettingsError
from shared.messages.control import Role
from shared.telemetry import names


class MeteredPool(BlockPool):
    """A pool that remembers the most blocks that were in use."""

    peak_used = 0

    def _take(self, num_blocks: int) -> tuple[int, ...]:
        taken = super()._take(num_blocks)
        # The taken blocks are out of the free list already.
        self.peak_used = max(self.peak_used, self.num_used)
        return taken


@dataclass(frozen=True)
class Simulated:
    """What came of the requests, in order of arrival, and of each worker with KV blocks.

    `busy_s` is the computing of each worker, `gateway_busy_s` that of the gateway, `host_busy_s`
    that of all cores that are shared.
    """

    requests: tuple[SimRequest, ...]
    pools: tuple[MeteredPool, ...]
    busy_s: tuple[float, ...]
    ended_s: float
    gateway_busy_s: float
    host_busy_s: float

    @property
    def peak_blocks(self) -> tuple[int, ...]:
        """The most KV blocks in use at a time, for each worker that has any."""
        return tuple(pool.peak_used for pool in self.pools)


class Simulation:
    """One run; shared cores are as slow as `slowness` says, at each time.

    Raises `SettingsError` if pictures arrive and no worker encodes.
    """

    def __init__(
        self,
        cluster: Cluster,
        model: PerformanceModel,
        arrivals: Sequence[Arrival],
        slowness: Sequence[Slowness] = (),
    ) -> None:
        stages = cluster.workers
        if any(each.patches for each in arrivals) and not any(Role.ENCODE in s for s in stages):
            raise SettingsError(f"topology = {cluster.topology!r}: no worker encodes the pictures")
        self._timeline = timeline = Timeline()
        self._requests = tuple(SimRequest(each, i) for i, each in enumerate(arrivals))
        hop_s = cluster.links.queue_hop_s
        self._host = host = Host(
            timeline, cluster.num_cores, cluster.full_speed, cluster.links.wait_share
        )
        for at_s, times in slowness:
            timeline.after(at_s, partial(host.slow, times))
        self._world = World(
            timeline=timeline,
            host=host,
            gateway=Device(host),
            model=model,
            limits=cluster.worker_limits,
            links=cluster.links,
            pictures=TaskQueue[Picture](host, hop_s),
            prompts=TaskQueue[SimRequest](host, hop_s),
            prefilled=TaskQueue[Prefilled](host, hop_s),
            embedded=self._embedded,
            ended=self._ended,
        )
        slots = Slots(cluster.num_cores) if cluster.num_cores else None  # of a thread each
        self._devices = tuple(Device(host, slots) for _ in stages)
        self._pools: list[MeteredPool] = []
        self._prefills: list[PrefillSide] = []
        for worker, hosted in enumerate(stages):
            self._build(worker, set(hosted))

    def run(self) -> Simulated:
        """Serve every request to its end."""
        for request in self._requests:
            self._timeline.after(request.arrival.arrival_s, self._ingester(request))
        self._timeline.run()
        return Simulated(
            self._requests,
            tuple(self._pools),
            tuple(device.busy_s for device in self._devices),
            self._timeline.now_s,
            self._world.gateway.busy_s,
            self._host.busy_s,
        )

    def _build(self, worker: int, hosted: set[Role]) -> None:
        device, limits = self._devices[worker], self._world.limits
        if Role.ENCODE in hosted:
            EncodeSide(self._world, worker, device)
        if hosted == {Role.ENCODE}:
            return
        pool = MeteredPool(limits.num_blocks, limits.block_size)
        self._pools.append(pool)
        decode = None
        if Role.DECODE in hosted:
            decode = DecodeSide(self._world, worker, device, pool)
        if Role.PREFILL in hosted:
            self._prefills.append(PrefillSide(self._world, worker, device, pool, decode))

    def _ingester(self, request: SimRequest) -> Action:
        """The gateway reads a request and stores its pictures, all at a time."""
        world, timeline = self._world, self._timeline

        def accepted() -> None:
            accepted_s = timeline.now_s
            world.gateway.compute(world.links.gateway_s, lambda: read(accepted_s))

        def read(accepted_s: float) -> None:
            read_s = timeline.now_s
            request.spend(names.INGEST, read_s - accepted_s)
            if request.arrival.patches:
                self._host.hop(world.links.store_s, lambda: stored(read_s))
            else:
                self._submit(request)

        def stored(read_s: float) -> None:
            request.spend(names.MEDIA_STORE, timeline.now_s - read_s)
            self._submit(request)

        return lambda: self._host.hop(world.links.accept_s, accepted)

    def _submit(self, request: SimRequest) -> None:
        """One task after the other."""
        dispatch_s = self._world.links.dispatch_s * (len(request.arrival.patches) + 1)
        begun_s = self._timeline.now_s

        def dispatched() -> None:
            request.spend(names.DISPATCH, self._timeline.now_s - begun_s)
            self._queue(request)

        self._host.hop(dispatch_s, dispatched)

    def _queue(self, request: SimRequest) -> None:
        world, now_s = self._world, self._timeline.now_s
        request.num_missing = len(request.arrival.patches)
        request.begun_s = now_s
        for num_patches in request.arrival.patches:
            world.pictures.put(Picture(request, num_patches, now_s))
        world.prompts.put(request)
        world.gateway.compute(world.links.request_s, nothing)

    def _embedded(self, picture: Picture, worker: int) -> None:
        def announce() -> None:
            request = picture.request
            request.num_missing -= 1
            request.encoded_at.append((worker, picture.num_patches))
            for prefill in self._prefills:
                prefill.landed(request)

        self._host.hop(self._world.links.queue_hop_s, announce)

    def _ended(self, request: SimRequest, is_refused: bool) -> None:
        request.num_ends += 1
        request.is_refused = is_refused
        if is_refused:
            request.ended_s = self._timeline.now_s


def simulate(
    cluster: Cluster,
    model: PerformanceModel,
    arrivals: Sequence[Arrival],
    slowness: Sequence[Slowness] = (),
) -> Simulated:
    """Serve the arrivals; see `Simulation`."""
    return Simulation(cluster, model, arrivals, slowness).run()
