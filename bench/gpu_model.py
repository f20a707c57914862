"""A Qwen2.5-VL of 7 B at random weights on the device: language model, cache and vision tower.

In: sizes of steps. Out: packed steps and models that take them. The only file is a config that it
writes itself.
"""

from __future__ import annotations

import gc
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from shared.cache.geometry import KvGeometry
from shared.cache.kv_cache import KvCache
from shared.model.batch import ForwardBatch, SequenceInput
from shared.model.decoder import LanguageModel
from shared.model.forward_step import ForwardStep, LayeredModel
from shared.model.gpu.backend import backend_for
from shared.model.gpu.decode_graphs import decode_step
from shared.model.gpu.graph_limits import GraphLimits, PrefillGraphLimits
from shared.model.gpu.graph_recorder import CudaGraphRecorder
from shared.model.gpu.prefill_graphs import PrefillGraphs
from shared.model.towers.build import build_tower
from shared.model.towers.pixels import Pixels
from shared.modelspec import ModelSpec, TextSpec

BLOCK_SIZE = 16
TOWER_GRID = (72, 72)
"""Patches of 14 pixels: 1008 x 1008, one megapixel."""


SEVEN_BILLION: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
}


def free_memory() -> None:
    """Give back what the models before held."""
    gc.collect()
    torch.cuda.empty_cache()


class LanguageBench:
    """The language model with a cache of so many blocks."""

    def __init__(self, num_blocks: int, device: str = "cuda", spec: TextSpec | None = None) -> None:
        self.spec = spec or model_spec().text
        with torch.device("meta"):
            backend = backend_for(device, self.spec.num_heads)
            self.model = LanguageModel(self.spec, torch.bfloat16, backend=backend)
        self.model.to_empty(device=device)
        randomize(self.model)
        geometry = KvGeometry.of(self.spec, block_size=BLOCK_SIZE, dtype="bfloat16")
        self.kv = KvCache(geometry, num_blocks, device=device)
        self.kv.data.normal_()

    def decode_batch(self, num_seqs: int, context_tokens: int) -> ForwardBatch:
        """One new token for each of so many sequences, the new token counted in."""
        width = self.kv.geometry.blocks_for(context_tokens)
        cached = context_tokens - 1
        sequences = [
            SequenceInput([i], [cached], range(i * width, (i + 1) * width), cached)
            for i in range(num_seqs)
        ]
        return ForwardBatch.pack(sequences, BLOCK_SIZE, device=self.kv.device)

    def prefill_batch(self, num_tokens: int) -> ForwardBatch:
        """One prompt without a cached prefix."""
        blocks = range(self.kv.geometry.blocks_for(num_tokens))
        sequence = SequenceInput(range(num_tokens), range(num_tokens), blocks)
        return ForwardBatch.pack([sequence], BLOCK_SIZE, device=self.kv.device)

    def prompt_graphs(self, max_tokens: int) -> LayeredModel:
        """Short prompts as production runs them; the cache's last block is the scratch block."""
        limits = PrefillGraphLimits(max_tokens, max_tokens)
        recorder = CudaGraphRecorder(self.kv.device, limits.max_bytes)
        return PrefillGraphs(self.model, self.kv, limits, self.kv.num_blocks - 1, recorder)

    def prefill(self, model: LayeredModel, batch: ForwardBatch) -> torch.Tensor:
        """One pass as prefill workers take it, layer by layer."""
        step = model.begin(batch, self.kv)
        hidden = model.embed(batch)
        for layer in range(self.spec.num_layers):
            hidden = model.forward_layers(hidden, step, self.kv, layer, layer + 1)
        return model.finish(hidden, step)

    def graphs(self, max_batch: int, max_context_tokens: int) -> ForwardStep:
        """Decode steps as production runs them; the cache's last block is the scratch block."""
        limits = GraphLimits(max_batch, max_context_tokens)
        return decode_step(self.model, self.kv, limits, self.kv.num_blocks - 1)


class TowerBench:
    """The vision tower."""

    def __init__(self, device: str = "cuda") -> None:
        from transformers import AutoConfig

        self._device = device
        spec = model_spec()
        assert spec.vision is not None
        assert spec.family.tower is not None
        with TemporaryDirectory() as folder:
            write_config(Path(folder))
            self.config: Any = AutoConfig.from_pretrained(folder).vision_config
            self.tower = build_tower(
                Path(folder), spec.family.tower, spec.vision, torch.bfloat16, device
            )
        randomize(self.tower.module)
        self.tower.quicken()

    def pictures(self, num_pictures: int) -> list[Pixels]:
        """So many pictures of one megapixel, on the device already."""
        height, width = TOWER_GRID
        shape = (height * width, self.tower.spec.patch_dim)
        return [
            Pixels(
                torch.randn(shape, device=self._device, dtype=torch.bfloat16), (1, height, width)
            )
            for _ in range(num_pictures)
        ]


@cache
def model_spec() -> ModelSpec:
    """What a folder of this model would say about itself."""
    with TemporaryDirectory() as folder:
        write_config(Path(folder))
        return ModelSpec.load(Path(folder))


def write_config(folder: Path) -> None:
    """The config of Qwen2.5-VL 7B."""
    (folder / "config.json").write_text(json.dumps(SEVEN_BILLION), encoding="utf-8")


def randomize(module: nn.Module) -> None:
    """Small random weights, so that activations stay finite through all layers."""
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.02)
