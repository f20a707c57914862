"""Several answers to one request, as they grow side by side.

In: one run per answer. Out: their advances, each with the number of its answer, in the order in
which they come. The first failure is the request's: it ends everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from services.gateway.answer import Advance
from services.gateway.runner import Run


async def advances_of(runs: Sequence[Run]) -> AsyncGenerator[tuple[int, Advance], None]:
    """Ends when every run has ended. Close it: it leaves no task behind."""
    if len(runs) == 1:  # the usual request saves a task per advance
        async with aclosing(runs[0].advances()) as advances:
            async for advance in advances:
                yield 0, advance
        return
    sources = [run.advances() for run in runs]
    waiting = {_next_of(source): choice for choice, source in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                choice, following = waiting[task], task.result()
                del waiting[task]
                if following is None:
                    continue
                if following.end:  # the workers may stop here, whatever the others have to say
                    runs[choice].close()
                waiting[_next_of(sources[choice])] = choice
                yield choice, following
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()


def _next_of(source: AsyncGenerator[Advance, None]) -> asyncio.Task[Advance | None]:
    async def following() -> Advance | None:
        return await anext(source, None)

    return asyncio.create_task(following())
