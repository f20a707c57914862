"""Trains the demo model from nothing: `python -m examples.plates.train --out DIR`.

The clock decides the schedule: learning rate and diet follow the share of `--minutes` that has
passed, so a slow or busy machine sees fewer samples but still finishes. A run that was stopped goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.progress import Progress, TaskID

from examples.plates.evaluate import evaluate, report
from examples.plates.trainer import Trainer


class Reporter:
    """A progress bar on a terminal, a line now and then anywhere else."""

    def __init__(self, total_s: float) -> None:
        self._bar = Progress() if sys.stdout.isatty() else None
        self._task: TaskID | None = None
        self._last_line_s = 0.0
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=total_s)

    def progress(self, spent_s: float, text: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=spent_s, description=text)
        elif time.monotonic() - self._last_line_s > 20:
            self._last_line_s = time.monotonic()
            print(f"{spent_s / 60:6.1f} min  {text}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True) if self._bar is None else self._bar.console.print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def run(trainer: Trainer, check_every_s: float) -> None:
    """Trains until the time is spent, with a check and a checkpoint every `check_every_s`."""
    reporter = Reporter(trainer.budget_s)
    next_check_s = trainer.spent_s + check_every_s
    mean: dict[str, float] = {}
    while trainer.share < 1:
        stage = trainer.stage()
        trainer.begin_stage()
        batches = trainer.batches(stage)
        try:
            while trainer.share < 1 and trainer.stage() is stage:
                for name, value in trainer.train_step(batches, stage).items():
                    mean[name] = 0.95 * mean.get(name, value) + 0.05 * value
                numbers = "  ".join(f"{name} {value:.3f}" for name, value in mean.items())
                text = f"step {trainer.step}  samples {trainer.samples}  {numbers}"
                reporter.progress(trainer.spent_s, text)
                if trainer.spent_s > next_check_s:
                    next_check_s += check_every_s
                    trainer.save()
                    reporter.say(f"{trainer.spent_s / 60:6.1f} min  {trainer.check()}")
        finally:
            batches.close()
        trainer.save()
    reporter.close()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.plates.train",
        description=__doc__,
        epilog="The column 'right' counts answer tokens: guesses for the first minutes, until the "
        "vision tower has learned its first digits. 'hints' must fall all the time. DIR/model is a "
        "complete model folder after the first checkpoint.",
    )
    made.add_argument("--out", type=Path, required=True, help="folder for model/ and checkpoint.pt")
    made.add_argument("--minutes", type=float, default=112, help="time to train (default: 112)")
    made.add_argument("--seed", type=int, default=0, help="seed of the first weights")
    made.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    made.add_argument(
        "--check-every-s", type=float, default=240, help="seconds between checkpoints"
    )
    made.add_argument(
        "--questions", type=int, default=500, help="held-out questions of the last evaluation"
    )
    return made


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.out, options.minutes, options.seed)
    if trainer.resume():
        print(f"going on from step {trainer.step}, {trainer.spent_s / 60:.1f} minutes in")
    run(trainer, options.check_every_s)
    print(report(evaluate(options.out / "model", options.questions)))


if __name__ == "__main__":
    main()
