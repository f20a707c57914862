"""How fast a core is while all cores of the machine compute, next to one that computes alone.

In: how many cores there are. Out: a share of at most 1. Each of as many processes answers the same
question with the demo model; what counts is the CPU time of an answer, so that other load, which
only makes it wait, does not show as much.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

NUM_ROUNDS = 3
TURN_S = 1.0
START_TIMEOUT_S = 120.0


def measure_full_speed(num_cores: int) -> float:
    """Alone and all together in turn; medians count."""
    if num_cores < 2:
        return 1.0
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(num_cores)]
    workers = [context.Process(target=_work, args=(theirs,), daemon=True) for _, theirs in pipes]
    for worker in workers:
        worker.start()
    for _, theirs in pipes:
        theirs.close()  # so that the end of a process is seen
    ours = [mine for mine, _ in pipes]
    try:
        _heard(ours)  # ready
        alone, together = [], []
        for _ in range(NUM_ROUNDS):
            alone += _turn(ours[:1])
            together += _turn(ours)
        return min(1.0, statistics.median(alone) / statistics.median(together))
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _turn(pipes: Sequence[Connection]) -> list[float]:
    """CPU seconds of an answer in each of these processes, all at the same time."""
    for pipe in pipes:
        pipe.send(TURN_S)
    return _heard(pipes)


def _heard(pipes: Sequence[Connection]) -> list[float]:
    heard = []
    for pipe in pipes:
        if not pipe.poll(START_TIMEOUT_S):
            raise RuntimeError(f"a process was silent for {START_TIMEOUT_S:g} s")
        heard.append(float(pipe.recv()))
    return heard


def _work(pipe: Connection) -> None:
    """In a process of its own: answers for so many seconds as it is told, until it is ended."""
    import torch

    from bench.prompts import PromptMaker
    from services.local_engine import LocalEngine
    from shared.demo import model_dir
    from shared.messages.descriptor import SamplingParams
    from shared.modelspec import ModelSpec
    from shared.runtime.host import ModelFolder

    torch.set_num_threads(1)
    spec = ModelSpec.load(model_dir())
    engine = LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))
    words = " ".join(str(number) for number in range(60))
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    request = PromptMaker(model_dir()).request([], words, sampling)
    list(engine.generate(request, []))
    pipe.send(0.0)
    while True:
        stop_s, num_answers = time.perf_counter() + pipe.recv(), 0
        before_s = time.process_time()
        while not num_answers or time.perf_counter() < stop_s:
            list(engine.generate(request, []))
            num_answers += 1
        pipe.send((time.process_time() - before_s) / num_answers)
