"""Tiny models, built once a session."""

from tests.support.audio_folders import audio_dir_of
from tests.support.models import model_dir_of
from tests.support.video_folders import video_dir_of
from tests.support.vision_folders import vision_dir_of

__all__ = ["audio_dir_of", "model_dir_of", "video_dir_of", "vision_dir_of"]
