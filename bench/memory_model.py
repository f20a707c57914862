"""How much memory the parts of a model take, asked of the classes that take it in production.

In: a config of InternVL, the family whose pictures are cut into tiles. Out: bytes of weights, of KV
cache blocks and of one pass of the tower. Everything is built on torch's meta device, whose tensors
have sizes and no memory, so models of any size can be asked on any machine. A pass of the tower
counts every tensor that is alive at once; attention counts as on a device that makes no score
matrix.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import TORCH_DTYPES
from shared.model.decoder import LanguageModel
from shared.model.towers.build import build_tower
from shared.modelspec import ModelSpec

DTYPE = "bfloat16"
BLOCK_SIZE = 16
IMAGE_SIZE = 448
TILE_TOKENS = 256
TILE_PATCHES = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of a model's parts; `tile_pass_bytes` for each tile in a pass of the tower, beside
    `pass_bytes`."""

    name: str
    language_bytes: int
    vision_bytes: int
    geometry: KvGeometry
    embedding_bytes_per_token: int
    pass_bytes: int
    tile_pass_bytes: int

    def encode_bytes(self, num_tiles: int) -> int:
        """What a pass of the tower over so many tiles takes at its peak, weights left out."""
        return self.pass_bytes + num_tiles * self.tile_pass_bytes


def _config(vision: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "dtype": DTYPE,
        "image_token_id": 92546,
        "image_seq_length": TILE_TOKENS,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "internvl_vision",
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [14, 14],
            **vision,
        },
        "text_config": {"max_position_embeddings": 65_536, "rope_parameters": rope, **text},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "8B (InternViT-300M, 7B language)": _config(
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 151674,
        },
    ),
    "26B (InternViT-6B, 20B language)": _config(
        {
            "hidden_size": 3200,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "intermediate_size": 12800,
        },
        {
            "model_type": "llama",
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "vocab_size": 92553,
        },
    ),
}
"""Shapes of two published models."""

_PREPROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "crop_to_patches": True,
    "max_patches": 12,
}


def sizes_of(name: str) -> Sizes:
    """Build a model's parts without memory and count."""
    with TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
        (folder / "preprocessor_config.json").write_text(
            json.dumps(_PREPROCESSOR), encoding="utf-8"
        )
        spec = ModelSpec.load(folder)
        assert spec.vision is not None
        assert spec.family.tower is not None
        with torch.device("meta"):
            language = LanguageModel(spec.text, TORCH_DTYPES[DTYPE])
        tower = build_tower(folder, spec.family.tower, spec.vision, TORCH_DTYPES[DTYPE], "meta")
    one, two = (peak_bytes(tower.module, num_tiles) for num_tiles in (1, 2))
    return Sizes(
        name=name,
        language_bytes=parameter_bytes(language),
        vision_bytes=parameter_bytes(tower.module),
        geometry=KvGeometry.of(spec.text, block_size=BLOCK_SIZE, dtype=DTYPE),
        embedding_bytes_per_token=spec.embedding_width * TORCH_DTYPES[DTYPE].itemsize,
        pass_bytes=2 * one - two,
        tile_pass_bytes=two - one,
    )


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights; those used twice count once."""
    return sum(parameter.nbytes for parameter in module.parameters())


def peak_bytes(module: nn.Module, num_tiles: int) -> int:
    """The most bytes that are alive at once while a tower embeds so many tiles, input included."""
    shape = (num_tiles, 3, IMAGE_SIZE, IMAGE_SIZE)
    meter = _Meter()
    with torch.inference_mode(), meter, _NoScoreMatrix():
        module(torch.empty(shape, dtype=TORCH_DTYPES[DTYPE], device="meta"))
    return meter.peak_bytes


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Adds up the memory of every tensor that an operator makes, for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._alive_bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._alive_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self._alive_bytes -= num_bytes


class _NoScoreMatrix(TorchFunctionMode):
    """Attention as a fused kernel computes it: queries, keys and values in, one output."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
