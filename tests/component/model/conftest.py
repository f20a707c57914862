"""Tiny models, built once a session, and teams of threads."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.audio_folders import audio_dir_of
from tests.support.models import model_dir_of
from tests.support.video_folders import video_dir_of
from tests.support.vision_folders import vision_dir_of

__all__ = ["audio_dir_of", "model_dir_of", "video_dir_of", "vision_dir_of"]


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Three threads cut a step's values at places that have nothing to do with rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
