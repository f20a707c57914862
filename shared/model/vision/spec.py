"""What a model folder says about pictures, read once and checked.

In: a model folder and its config. Out: a frozen `VisionSpec`. Neither torch nor transformers is
imported, so the gateway can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.media.sizing.base import ImageSizing
from shared.media.sizing.clip import ClipSizing
from shared.media.sizing.grid import DEFAULT_MAX_PIXELS, DEFAULT_MIN_PIXELS, GridSizing
from shared.model.config_fields import Config, required
from shared.model.tower_families import TowerFamily
from shared.model.vision.clips import clip_sizing
from shared.model.vision.fields import VisionFiles
from shared.model.vision.tiles import tile_sizing

GEMMA3_START_ID = 255_999


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """Shape of the vision tower's inputs and outputs, and the token ids that stand for media.

    The fields from `merge_size` to `tokens_per_second` describe towers that take pictures at their
    own size; `tiles` is the sizing rule of towers that have one size; `clips` is the rule for
    videos, None for a model that gets none. `template_token_id` is what
    the chat template writes for a picture. A row of a picture's embedding holds the input embedding
    and, behind it, the features of `num_deepstack_layers` layers.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    in_channels: int
    out_hidden_size: int
    tokens_per_second: float | None
    image_token_id: int
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    min_pixels: int | None
    max_pixels: int | None
    num_deepstack_layers: int = 0
    template_token_id: int | None = None
    tiles: ImageSizing | None = None
    clips: ClipSizing | None = None

    @classmethod
    def load(
        cls, model_dir: Path, config: Config, tower: TowerFamily, hidden_size: int
    ) -> VisionSpec:
        """Read and check; `UnsupportedModel` says which field stands in the way.

        `hidden_size` is the language model's, which projectors project to.
        """
        files = VisionFiles.read(model_dir, config)
        if tower.kind == "patches":
            return _patches_spec(files, tower)
        return _tiles_spec(files, tower, hidden_size)

    @property
    def sizing(self) -> ImageSizing:
        """What a picture of any size becomes in the prompt."""
        if self.tiles is not None:
            return self.tiles
        return GridSizing(
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            min_pixels=self.min_pixels or DEFAULT_MIN_PIXELS,
            max_pixels=self.max_pixels or DEFAULT_MAX_PIXELS,
        )

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch, the width of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def num_tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Placeholder tokens, equal to embedding rows, of one picture or clip of this patch grid
        (towers that take pictures at their own size)."""
        t, h, w = grid_thw
        return t * (h // self.merge_size) * (w // self.merge_size)


def _patches_spec(files: VisionFiles, tower: TowerFamily) -> VisionSpec:
    config, vision, processor = files.config, files.vision, files.image_processor
    size: Config = processor.get("size") or {}
    tokens_per_second = vision.get("tokens_per_second")
    layers = vision.get("deepstack_visual_indexes", tower.default_deepstack_layers)
    patch_size = int(vision.get("patch_size", tower.default_patch_size))
    merge_size = int(vision.get("spatial_merge_size", 2))
    temporal_patch_size = int(vision.get("temporal_patch_size", 2))
    reads_clips = tower.clips and config.get("video_token_id") is not None
    return VisionSpec(
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=temporal_patch_size,
        in_channels=int(vision.get("in_channels", vision.get("in_chans", 3))),
        out_hidden_size=int(required(vision, tower.out_hidden_field or "out_hidden_size")),
        tokens_per_second=None if tokens_per_second is None else float(tokens_per_second),
        image_token_id=int(required(config, "image_token_id")),
        video_token_id=config.get("video_token_id"),
        vision_start_token_id=config.get("vision_start_token_id"),
        vision_end_token_id=config.get("vision_end_token_id"),
        min_pixels=processor.get("min_pixels") or size.get("shortest_edge"),
        max_pixels=processor.get("max_pixels") or size.get("longest_edge"),
        num_deepstack_layers=len(layers),
        clips=clip_sizing(files, patch_size, merge_size, temporal_patch_size)
        if reads_clips
        else None,
    )


def _tiles_spec(files: VisionFiles, tower: TowerFamily, hidden_size: int) -> VisionSpec:
    config, (patch_size, sizing) = files.config, tile_sizing(files, tower.kind)
    image_token_id = config.get("image_token_id", config.get("image_token_index"))
    if image_token_id is None:
        image_token_id = required(config, "image_token_index")
    return VisionSpec(
        patch_size=patch_size,
        merge_size=1,
        temporal_patch_size=1,
        in_channels=int(files.vision.get("num_channels", 3)),
        out_hidden_size=hidden_size,
        tokens_per_second=None,
        image_token_id=int(image_token_id),
        video_token_id=config.get("video_token_id", config.get("video_token_index")),
        vision_start_token_id=None,
        vision_end_token_id=None,
        min_pixels=None,
        max_pixels=None,
        template_token_id=config.get("boi_token_index", GEMMA3_START_ID)
        if tower.kind == "gemma3"
        else None,
        tiles=sizing,
    )
