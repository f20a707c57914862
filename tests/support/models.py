"""Tiny random-weight models of every family, built by transformers itself, and prompts for them.

In: a family name and a folder. Out: the folder, filled as `save_pretrained` fills it, with weights
scaled so that logits are well spread and greedy choices are not close calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

from shared.model.positions import MediaGrid
from shared.model.towers.pixels import Pixels
from shared.modelspec import ModelSpec
from tests.support.folders import built_once
from tests.support.text_configs import ROPE, TEXT, TEXT_FAMILIES, text_configs

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 150, 151, 152, 153
PATCH_SIZE = 4

_MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
_VISION = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
MEDIA_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


def _configs() -> dict[str, Any]:
    t = transformers
    return {
        "qwen2_vl": t.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": dict(_MROPE)},
            vision_config={**_VISION, "embed_dim": 16, "hidden_size": 32},
            **MEDIA_TOKENS,
        ),
        "qwen2_5_vl": t.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": dict(_MROPE)},
            vision_config={
                **_VISION,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                # Windows of 2 x 2 merged tokens, so that small pictures already need several.
                "window_size": 4 * PATCH_SIZE,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
            tie_word_embeddings=True,
            **MEDIA_TOKENS,
        ),
    }


VISION_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
FAMILIES = (*TEXT_FAMILIES, *VISION_FAMILIES)


def build_tiny_model(
    family: str, folder: Path, *, seed: int = 0, max_shard_size: str = "50GB"
) -> Path:
    """Write a float32 model of this family into `folder` and return it."""
    config = text_configs()[family] if family in TEXT_FAMILIES else _configs()[family]
    with quiet():
        torch.manual_seed(seed)
        model = _auto_class(family).from_config(config, dtype=torch.float32)
        spread_weights(model, seed)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="session")
def model_dir_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> folder of its tiny model, built once a session."""
    return built_once(build_tiny_model, tmp_path_factory)


def load_reference(family: str, folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model from the same folder, with SDPA attention.

    Its eager attention would compute softmax in float32 whatever the dtype; its grouped experts
    refuse float64.
    """
    options = {"experts_implementation": "eager"} if "moe" in family else {}
    with quiet():
        return (
            _auto_class(family)
            .from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **options)
            .eval()
        )


def spread_weights(model: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near unit size and logits several units apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "norm" in name or "ln_q.weight" in name:
                parameter.copy_(_norm_center(model, name) + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "embed_tokens" in name:
                # Gemma multiplies by the root of the width, which would drown the layers.
                parameter.copy_(noise * (0.5 if _is_gemma(model) else 1.0))
            else:
                is_stacked = "experts" in name
                fan_in = parameter.shape[-1] if is_stacked else parameter[0].numel()
                gain = 4.0 if "lm_head" in name else 1.0
                parameter.copy_(noise * gain / fan_in**0.5)


def _is_gemma(model: Any) -> bool:
    return str(model.config.model_type).startswith("gemma3")


def _norm_center(model: Any, name: str) -> float:
    """What scales by one: Gemma's decoder norms add it themselves."""
    is_decoder_norm = "vision_tower" not in name
    return 0.0 if _is_gemma(model) and is_decoder_norm else 1.0


def _auto_class(family: str) -> Any:
    if family in VISION_FAMILIES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice between test results."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with placeholder runs, the grids of its pictures and their patches."""

    token_ids: np.ndarray
    grids: tuple[MediaGrid, ...] = ()
    pixel_values: torch.Tensor | None = None

    @property
    def grid_thw(self) -> torch.Tensor:
        """`[num_pictures, 3]` int64."""
        return torch.tensor([(grid.t, grid.h, grid.w) for grid in self.grids])

    @property
    def pixels(self) -> list[Pixels]:
        """The pictures one by one, as a tower takes them."""
        assert self.pixel_values is not None
        sizes = [grid.t * grid.h * grid.w for grid in self.grids]
        return [
            Pixels(values, (grid.t, grid.h, grid.w))
            for values, grid in zip(torch.split(self.pixel_values, sizes), self.grids, strict=True)
        ]

    @property
    def media_index(self) -> np.ndarray:
        """Rows that a picture's embeddings replace."""
        return np.flatnonzero(self.token_ids == IMAGE_TOKEN)


def make_prompt(
    spec: ModelSpec,
    num_text_tokens: int,
    picture_sizes: Sequence[tuple[int, int]] = (),
    seed: int = 0,
) -> Prompt:
    """Random text with pictures of `(rows, columns)` patches in between."""
    rng = np.random.default_rng(seed)
    text = rng.integers(2, IMAGE_TOKEN, size=num_text_tokens).tolist()
    grids = tuple(MediaGrid(1, h, w) for h, w in picture_sizes)
    if not grids:
        return Prompt(np.array(text, dtype=np.int64))
    assert spec.vision is not None
    # At least one text token in front of the first picture, the rest spread between and behind.
    cuts = np.linspace(1, num_text_tokens, len(grids) + 1).astype(int).tolist()
    token_ids = text[: cuts[0]]
    for grid, start, stop in zip(grids, cuts, cuts[1:], strict=False):
        placeholders = [IMAGE_TOKEN] * spec.vision.num_tokens((grid.t, grid.h, grid.w))
        token_ids += [VISION_START, *placeholders, VISION_END, *text[start:stop]]
    num_patches = sum(grid.h * grid.w for grid in grids)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_patches, spec.vision.patch_dim, generator=generator)
    return Prompt(np.array(token_ids, dtype=np.int64), grids, pixels)
