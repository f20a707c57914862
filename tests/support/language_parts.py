"""Language parts of vision-language families, without their towers.

In: a family name. Out: two folders, the whole model as transformers saves it and its language part
alone; prompts whose media are random embeddings; transformers' own logits for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from shared.model.positions import MediaGrid
from tests.support.exact_reference import make_exact
from tests.support.models import (
    IMAGE_TOKEN,
    MEDIA_TOKENS,
    PATCH_SIZE,
    VISION_END,
    VISION_START,
    quiet,
    spread_weights,
)
from tests.support.text_configs import MOE, ROPE, TEXT, WINDOW, YARN

LANGUAGE_PARTS = ("qwen3_vl", "qwen3_vl_yarn", "qwen3_vl_moe", "gemma3")
_NUM_DEEPSTACK = 2
_MERGE_SIZE = 2


def _qwen3_vision() -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": _MERGE_SIZE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": list(range(_NUM_DEEPSTACK)),
    }


def _qwen3_text(rope: dict[str, Any]) -> dict[str, Any]:
    # Unequal sections, so that axes are told apart; the temporal one gets the rest of the pairs.
    return {**TEXT, "head_dim": 16, "rope_parameters": {**rope, "mrope_section": [4, 3, 1]}}


def _config(name: str) -> Any:
    t = transformers
    if name == "qwen3_vl_moe":
        return t.Qwen3VLMoeConfig(
            text_config={**_qwen3_text(ROPE), **MOE},
            vision_config=_qwen3_vision(),
            **MEDIA_TOKENS,
        )
    if name == "gemma3":
        return t.Gemma3Config(
            text_config={
                **TEXT,
                "num_hidden_layers": 4,
                "head_dim": 16,
                "sliding_window": WINDOW,
                "sliding_window_pattern": 3,
                "query_pre_attn_scalar": 24,
            },
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
        )
    rope = YARN if name == "qwen3_vl_yarn" else ROPE
    return t.Qwen3VLConfig(
        text_config=_qwen3_text(rope),
        vision_config=_qwen3_vision(),
        tie_word_embeddings=name == "qwen3_vl_yarn",
        **MEDIA_TOKENS,
    )


def build_language_part(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Fill `folder/whole` and `folder/language`; return the latter."""
    config = _config(name)
    with quiet():
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        spread_weights(model, seed)
        model.save_pretrained(folder / "whole")
    language = folder / "language"
    language.mkdir()
    tensors = load_file(folder / "whole" / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if "language_model" in k or "lm_head" in k}
    save_file(kept, language / "model.safetensors")
    whole: dict[str, Any] = json.loads((folder / "whole" / "config.json").read_text())
    alone = {
        **whole["text_config"],
        "vision_config": whole["vision_config"],
        "tie_word_embeddings": whole["tie_word_embeddings"],
    }
    (language / "config.json").write_text(json.dumps(alone))
    return language


@dataclass(frozen=True, eq=False)
class EmbeddedPrompt:
    """Token ids with placeholder runs, and `[rows, hidden * (1 + deepstack)]` for them."""

    token_ids: np.ndarray
    grids: tuple[MediaGrid, ...]
    embeddings: torch.Tensor

    @property
    def media_index(self) -> np.ndarray:
        return np.flatnonzero(self.token_ids == IMAGE_TOKEN)


def embedded_prompt(name: str, sizes: tuple[tuple[int, int], ...], seed: int) -> EmbeddedPrompt:
    """Text with pictures of `(rows, columns)` patches in between."""
    rng = np.random.default_rng(seed)
    grids = tuple(MediaGrid(1, h, w) for h, w in sizes)
    token_ids = rng.integers(2, IMAGE_TOKEN, size=5).tolist()
    num_rows = 0
    for grid in grids:
        run = grid.h * grid.w // _MERGE_SIZE**2
        text = rng.integers(2, IMAGE_TOKEN, size=3 + seed).tolist()
        token_ids += [VISION_START, *[IMAGE_TOKEN] * run, VISION_END, *text]
        num_rows += run
    width = TEXT["hidden_size"] * (1 if name == "gemma3" else 1 + _NUM_DEEPSTACK)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    return EmbeddedPrompt(np.array(token_ids, dtype=np.int64), grids, rows)


class LanguageReference:
    """transformers' model from `folder/whole`, fed with embeddings in place of pictures."""

    def __init__(self, name: str, folder: Path, dtype: torch.dtype, *, exact: bool) -> None:
        options = {"experts_implementation": "eager"} if "moe" in name else {}
        with quiet():
            self.model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                folder / "whole", dtype=dtype, attn_implementation="sdpa", **options
            ).eval()
        self.is_gemma = name == "gemma3"
        if exact:
            make_exact(self.model)

    def positions(self, prompt: EmbeddedPrompt) -> tuple[np.ndarray, int]:
        """`[n]` or `[3, n]`, and the next one."""
        num_tokens = len(prompt.token_ids)
        if self.is_gemma or not prompt.grids:
            return np.arange(num_tokens), num_tokens
        token_ids = torch.from_numpy(prompt.token_ids)[None]
        grids = torch.tensor([(grid.t, grid.h, grid.w) for grid in prompt.grids])
        positions, delta = self.model.model.get_rope_index(
            token_ids, (token_ids == IMAGE_TOKEN).int(), image_grid_thw=grids
        )
        return positions[:, 0].numpy(), num_tokens + int(delta)

    @torch.no_grad()
    def generate(self, prompt: EmbeddedPrompt, num_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and logits of the whole prompt and of each token but the last."""
        _, next_pos = self.positions(prompt)
        logits, cache = self._prefill(prompt)
        rows, tokens = [logits], [int(logits[-1].argmax())]
        for i in range(num_tokens - 1):
            inputs = {"input_ids": torch.tensor([[tokens[-1]]]), "past_key_values": cache}
            position = torch.full((3, 1, 1), next_pos + i)
            logits, cache = self._run(
                inputs if self.is_gemma else {**inputs, "position_ids": position}
            )
            rows.append(logits)
            tokens.append(int(logits[-1].argmax()))
        return tokens, torch.cat(rows)

    def _prefill(self, prompt: EmbeddedPrompt) -> tuple[torch.Tensor, Any]:
        token_ids = torch.from_numpy(prompt.token_ids)[None]
        is_media = token_ids == IMAGE_TOKEN
        embeds = self.model.get_input_embeddings()(token_ids)
        vectors = prompt.embeddings.to(embeds.dtype).split(embeds.shape[-1], dim=1)
        embeds[is_media] = vectors[0]
        inputs: dict[str, Any] = {"inputs_embeds": embeds}
        if self.is_gemma:
            return self._run({**inputs, "token_type_ids": is_media.int()})
        positions = torch.from_numpy(self.positions(prompt)[0])
        inputs["position_ids"] = positions.expand(3, -1)[:, None]
        return self._run(
            {**inputs, "visual_pos_masks": is_media, "deepstack_visual_embeds": list(vectors[1:])}
        )

    def _run(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        if self.is_gemma:
            output = self.model(**inputs, use_cache=True)
            return output.logits[0], output.past_key_values
        output = self.model.model.language_model(**inputs, use_cache=True)
        return self.model.lm_head(output.last_hidden_state)[0], output.past_key_values
