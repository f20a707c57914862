"""`triptych profile`: a model in, a file for `triptych plan --profile` out."""

from __future__ import annotations

import asyncio
import platform
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from services.launcher import nats_server
from services.launcher.child import Child
from services.planner.cluster import Links
from services.planner.fit import Fit
from services.planner.perf_model import PerformanceModel
from services.planner.profiling.grid import Room
from services.planner.profiling.links import NUM_LINKS_STEPS, measure_links
from services.planner.profiling.settings import ProfileSettings
from services.planner.profiling.steps import Effort, measure, num_steps
from shared.errors import SettingsError, TriptychError
from shared.runtime.host import ModelFolder, open_model
from shared.runtime.kv_memory import num_kv_blocks
from shared.runtime.lifecycle import report
from shared.runtime.settings import settings_or_exit
from shared.runtime.worker_settings import WorkerSettings

PROG = "triptych profile"
LINK_REPEATS = 200
NATS_GRACE_S = 5.0
FEATURES = {
    "preprocess": ("patches",),
    "encode": ("patches",),
    "prefill": ("sum(l)", "sum(l^2)"),
    "decode": ("sum(context)", "batch"),
}
"""What the coefficients after the first are multiplied by."""


def main(argv: Sequence[str]) -> None:
    settings = settings_or_exit(ProfileSettings, argv, PROG)
    try:
        profile(settings, Console())
    except (TriptychError, OSError) as error:
        raise SystemExit(report(error)) from None


def profile(settings: ProfileSettings, console: Console) -> PerformanceModel:
    """Measure, fit, print and write. Raises `TriptychError`."""
    _check_writable(settings.out)
    folder = open_model(WorkerSettings(model=settings.model, compute=settings.compute))
    if settings.compute.threads:
        torch.set_num_threads(settings.compute.threads)
    room = _room(folder, settings)
    total = num_steps(folder.spec, room) + (NUM_LINKS_STEPS if settings.links else 0)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("measuring", total=total)
        links = None
        if settings.links:
            links = asyncio.run(_links(settings, lambda: progress.advance(bar)))
        effort = Effort(settings.repeats, settings.max_patches)
        samples, bytes_per_patch = measure(folder, room, effort, lambda: progress.advance(bar))
    model = PerformanceModel.of_samples(
        samples,
        kv_bytes_per_token=folder.geometry(settings.block_size).bytes_per_token,
        embedding_bytes_per_patch=bytes_per_patch,
    ).model_copy(
        update={
            "num_layers": folder.spec.text.num_layers,
            "links": links,
            "measured_on": _where(settings, folder),
        }
    )
    settings.out.write_text(model.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print_profile(console, model)
    console.print(f"written to {settings.out}", soft_wrap=True, highlight=False, markup=False)
    return model


def print_profile(console: Console, model: PerformanceModel) -> None:
    """The coefficients, and how well they describe what was measured."""
    table = Table(title="how well the fit describes what was measured (relative errors)")
    table.add_column("stage")
    for name in ("steps", "R^2", "median error", "largest error"):
        table.add_column(name, justify="right")
    formulas = []
    for stage, features in FEATURES.items():
        fitted: Fit = getattr(model, stage)
        if not fitted.num_samples:
            continue
        errors = (f"{fitted.median_error:.1%}", f"{fitted.max_error:.1%}")
        table.add_row(stage, str(fitted.num_samples), f"{fitted.r_squared:.4f}", *errors)
        terms = (
            f"{c:.3g}*{name}" for c, name in zip(fitted.coefficients[1:], features, strict=True)
        )
        formulas.append(f"{stage} s = {' + '.join((f'{fitted.coefficients[0]:.3g}', *terms))}")
    console.print(table)
    for formula in formulas:
        console.print(formula, soft_wrap=True, highlight=False, markup=False)
    if model.links is not None:
        _print_links(console, model.links)


def _print_links(console: Console, links: Links) -> None:
    console.print(
        f"queue hop {links.queue_hop_s * 1e3:.2f} ms, token hop {links.token_hop_s * 1e3:.2f} ms, "
        f"around a step {links.step_s * 1e3:.2f} ms, media store {links.store_s * 1e3:.2f} ms, "
        f"transfer {links.pull_s * 1e3:.2f} ms + bytes / {links.bytes_per_s / 1e9:.2f} GB/s",
        soft_wrap=True,
        highlight=False,
    )


def _room(folder: ModelFolder, settings: ProfileSettings) -> Room:
    return Room(
        max_tokens=settings.max_tokens,
        max_context_tokens=folder.spec.text.max_context_tokens,
        num_blocks=num_kv_blocks(folder.geometry(settings.block_size), settings.kv_bytes),
        block_size=settings.block_size,
    )


def _check_writable(path: Path) -> None:
    """Told before minutes of measuring, not after."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise SettingsError(f"--out = {path}: cannot be written: {error.strerror}") from None


def _where(settings: ProfileSettings, folder: ModelFolder) -> str:
    device = folder.device
    if device == "cuda":
        device = torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return (
        f"{settings.model.name} in {folder.dtype} on {device}, {threads} threads, "
        f"{platform.machine()} {platform.system()}"
    )


async def _links(settings: ProfileSettings, on_step: Callable[[], None]) -> Links:
    async with _nats(settings) as url:
        return await measure_links(url, LINK_REPEATS, on_step)


@asynccontextmanager
async def _nats(settings: ProfileSettings) -> AsyncIterator[str]:
    """The server that was named, else one of our own for as long as it is needed."""
    if "url" in settings.bus.model_fields_set:
        yield settings.bus.url
        return
    with tempfile.TemporaryDirectory(prefix="triptych-profile-") as folder:
        server = nats_server.prepare(Path(folder))
        child = await Child.start(server.spec, lambda line: None)
        try:
            await nats_server.wait_until_listening(server.port)
            yield server.url
        finally:
            await child.stop(NATS_GRACE_S)


if __name__ == "__main__":
    main(sys.argv[1:])
