"""The demo model in one process, as what answers are compared with, and pictures to ask about."""

from __future__ import annotations

import random

import pytest

from bench.accuracy import png
from bench.prompts import PromptMaker
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    spec = ModelSpec.load(model_dir())
    return ModelFolder(model_dir(), spec, spec.dtype, "cpu")


@pytest.fixture(scope="module")
def engine(folder: ModelFolder) -> LocalEngine:
    return LocalEngine(folder)


@pytest.fixture(scope="module")
def prompts(folder: ModelFolder) -> PromptMaker:
    return PromptMaker(folder.directory)


def plates(seed: int, count: int) -> list[bytes]:
    """PNG files of number plates."""
    rng = random.Random(seed)
    return [png(draw(plate_spec(rng, rng.randrange(10_000)))) for _ in range(count)]
