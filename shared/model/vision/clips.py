"""The video processor's settings of a model folder, as a sizing rule.

In: the files that describe pictures. Out: `ClipSizing`, and `UnsupportedModel` for what the encoder
would not do exactly.
"""

from __future__ import annotations

from shared.media.sizing.clip import DEFAULT_FPS, ClipSizing
from shared.model.config_fields import Config
from shared.model.vision.fields import VisionFiles, check_equal

# What transformers' processor assumes where the folder is silent.
_DEFAULT_MIN_PIXELS = 128 * 28 * 28
_DEFAULT_MAX_PIXELS = 768 * 28 * 28


def clip_sizing(files: VisionFiles, patch_size: int, merge_size: int, steps: int) -> ClipSizing:
    """`patch_size`, `merge_size` and `steps` (frames in a patch) are the tower's."""
    settings = files.video_processor
    size: Config = settings.get("size") or {}
    for field in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        check_equal(f"video processor {field}", settings.get(field, True), True)
    for field, expected in (
        ("patch_size", patch_size),
        ("merge_size", merge_size),
        ("temporal_patch_size", steps),
    ):
        check_equal(f"video processor {field}", settings.get(field, expected), expected)
    num_frames = settings.get("num_frames")
    return ClipSizing(
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=steps,
        min_pixels=settings.get("min_pixels") or size.get("shortest_edge") or _DEFAULT_MIN_PIXELS,
        max_pixels=settings.get("max_pixels") or size.get("longest_edge") or _DEFAULT_MAX_PIXELS,
        fps=float(settings.get("fps") or DEFAULT_FPS),
        num_frames=None if num_frames is None else int(num_frames),
        min_frames=int(settings.get("min_frames", 4)),
        max_frames=int(settings.get("max_frames", 768)),
        cap_pixels_per_frame=bool(settings.get("cap_pixels_per_frame")),
        max_video_tokens=int(settings.get("max_video_tokens", 128_000)),
    )
