"""Tiny models, built once a session, and the demo model in one process."""

from tests.support.audio_folders import audio_dir_of
from tests.support.demo_engine import engine, folder, prompts
from tests.support.models import model_dir_of
from tests.support.video_folders import video_dir_of
from tests.support.vision_folders import vision_dir_of

__all__ = [
    "audio_dir_of",
    "engine",
    "folder",
    "model_dir_of",
    "prompts",
    "video_dir_of",
    "vision_dir_of",
]
