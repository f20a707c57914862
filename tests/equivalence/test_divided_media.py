"""Parts of pictures and videos, encoded apart, against the undivided encode: for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from services.encoder.preprocess import PicturePreprocessor
from shared.errors import RequestFailed
from shared.media.picture import PictureLimits
from shared.media.sizing.division import max_parts
from shared.messages.descriptor import MediaItem
from shared.model.loader import load_tower
from shared.model.towers.base import VisionTower
from shared.model.towers.pixels import Pixels
from shared.runtime.media_parts import can_divide, parts_of
from tests.support.video_folders import VIDEO_FAMILIES, clip_file, media_prompt
from tests.support.vision_folders import our_prompt, picture_file

TOLERANCE = 1e-10
FolderOf = Callable[[str], Path]

# What each family makes of these: many tiles, padding above and below or at the sides, features
# that are shrunk (LLaVA-OneVision), a single tile.
PICTURES = [picture_file(62, 61, 3), picture_file(20, 58), picture_file(64, 9, 1)]
DIVIDED = {"llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm"}
WHOLE = {"llava", "llava_siglip_layers", "gemma3", "qwen3_vl", "smolvlm_whole_pictures"}


def differences(
    tower: VisionTower, preprocess: PicturePreprocessor, item: MediaItem, data: bytes
) -> list[float]:
    """For every number of parts, how far their rows are from the whole's."""
    (whole,) = tower.encode([preprocess(data)])
    found = []
    for num_parts in range(2, max_parts(item.units) + 1):
        wanted = parts_of(item, num_parts)
        pixels = [preprocess(data, part) for part in wanted]
        alone = [tower.encode([each])[0] for each in pixels]
        assert [len(rows) for rows in alone] == [part.num_tokens for part in wanted]
        found.append(float((torch.cat(alone) - whole).abs().max()))
        # Together with others, as an encoder that takes several parts runs them.
        packed = torch.cat(tower.encode([*pixels[1:], preprocess(data), pixels[0]]))
        rest = len(whole) - wanted[0].num_tokens
        assert float((packed[:rest] - whole[-rest:]).abs().max()) <= TOLERANCE
    return found


@pytest.mark.parametrize("name", sorted(DIVIDED))
def test_tiles(name: str, vision_dir_of: FolderOf) -> None:
    folder = vision_dir_of(name)
    tower = load_tower(folder, dtype="float64")
    preprocess = PicturePreprocessor(folder, PictureLimits())
    num_ways = 0
    for data in PICTURES:
        (item,) = our_prompt(folder, [data]).media
        found = differences(tower, preprocess, item, data)
        assert all(each <= TOLERANCE for each in found)
        num_ways += len(found)
    assert num_ways > 3


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_frames(name: str, video_dir_of: FolderOf) -> None:
    folder = video_dir_of(name)
    tower = load_tower(folder, dtype="float64")
    preprocess = PicturePreprocessor(folder, PictureLimits())
    # The last step of the third is half a step long: its only frame is repeated.
    for data in (clip_file(20), clip_file(77, rate=7, size=(50, 34), seed=1), clip_file(9, rate=1)):
        (item,) = media_prompt(folder, [data, "?"]).media
        found = differences(tower, preprocess, item, data)
        assert found
        assert all(each <= TOLERANCE for each in found)


def test_parts_of_a_shrunk_picture_share_tiles(vision_dir_of: FolderOf) -> None:
    """Else the test above would not have seen that neighbours need each other's features."""
    folder = vision_dir_of("llava_onevision")
    preprocess = PicturePreprocessor(folder, PictureLimits())
    shared = False
    for data in PICTURES:
        (item,) = our_prompt(folder, [data]).media
        most = max_parts(item.units)
        if most > 1:
            tiles = [len(preprocess(data, part).values) for part in parts_of(item, most)]
            shared |= sum(tiles) > len(preprocess(data).values)
    assert shared


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_what_is_seen_whole_is_not_divided(name: str, vision_dir_of: FolderOf) -> None:
    for data in PICTURES:
        (item,) = our_prompt(vision_dir_of(name), [data]).media
        assert not any(can_divide(item, num_parts) for num_parts in range(2, 20))


def test_the_tower_of_qwen3_attends_within_steps_and_over_the_whole_of_each(
    vision_dir_of: FolderOf,
) -> None:
    """Its videos are not read yet; its pictures, like those of Qwen2-VL, are one unit."""
    tower = load_tower(vision_dir_of("qwen3_vl"), dtype="float64")
    values = torch.randn(
        4 * 8 * 8, tower.spec.patch_dim, generator=torch.Generator().manual_seed(1)
    )

    def rows(start: int, stop: int, grid_thw: tuple[int, int, int]) -> torch.Tensor:
        return tower.encode([Pixels(values[start:stop], grid_thw)])[0]

    steps = torch.cat((rows(0, 192, (3, 8, 8)), rows(192, 256, (1, 8, 8))))
    assert float((steps - rows(0, 256, (4, 8, 8))).abs().max()) <= TOLERANCE
    halves = torch.cat((rows(0, 32, (1, 4, 8)), rows(32, 64, (1, 4, 8))))
    assert float((halves - rows(0, 64, (1, 8, 8))).abs().max()) > 1e-3


def test_a_part_that_was_counted_otherwise_is_refused(vision_dir_of: FolderOf) -> None:
    folder = vision_dir_of("internvl")
    (item,) = our_prompt(folder, [PICTURES[0]]).media
    part = parts_of(item, 2)[1].model_copy(update={"first_row": 1})
    with pytest.raises(RequestFailed, match="the gateway computed .* from 1 on"):
        PicturePreprocessor(folder, PictureLimits())(PICTURES[0], part)
    far = part.model_copy(update={"count": 50})
    with pytest.raises(RequestFailed, match="part 1 of 50 is wanted"):
        PicturePreprocessor(folder, PictureLimits())(PICTURES[0], far)
