"""The training forward pass: the same weights as transformers' model, in batched attention instead
of a loop of windows.

transformers' vision tower attends to one window after another; here all windows of one length are
one call. `tests` hold both to the same result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from examples.plates.architecture import image_processor
from examples.plates.batches import Batch, Segments, TextBatch
from examples.plates.encode import IGNORED
from examples.plates.hints import Hints, guidance_loss

PICTURE_HINT_LAYER = 2
"""Decoder layers after which a picture's tokens should know its number."""
MATCH_HINT_LAYER = 3
"""Decoder layers after which the digits of a number asked for should know which pictures fit."""
LOOKING_LAYER = 2
"""The decoder layer in which some heads look where the answer is to be seen."""
READING_LAYER = 3
"""The decoder layer in which some heads read what the question's digits have found."""
GUIDED_HEADS = (0, 3)
"""Heads whose attention is taught: the first of each group that shares keys and values."""


@dataclass(frozen=True)
class Losses:
    """answer: mean over learned tokens; hints, numbered, matched: what `Hints` says of patches and
    tokens, `Hints.picture_loss`, `Hints.match_loss`; looked, tallied, read: see `guidance_loss`;
    right: share of learned tokens predicted.

    exact: [conversations, tokens] bool, false where a learned token would have come out wrong.
    """

    answer: Tensor
    hints: Tensor
    numbered: Tensor
    matched: Tensor
    looked: Tensor
    tallied: Tensor
    read: Tensor
    right: float
    exact: Tensor

    def numbers(self) -> dict[str, float]:
        """For the log; NaN where the batch had none of it."""
        named = {
            "hints": self.hints,
            "answer": self.answer,
            "numbered": self.numbered,
            "matched": self.matched,
            "looked": self.looked,
            "tallied": self.tallied,
            "read": self.read,
        }
        return {name: value.item() for name, value in named.items()} | {"right": self.right}


def normalised(patches: Tensor) -> Tensor:
    """uint8 patches [n, 3 * area] to the image processor's scale, one frame."""
    processor = image_processor()
    area = patches.shape[1] // 3
    mean = torch.tensor(processor.image_mean).repeat_interleave(area)
    std = torch.tensor(processor.image_std).repeat_interleave(area)
    return (patches.float() / 255 - mean) / std


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return F.rms_norm(x.float(), (x.shape[-1],), weight, 1e-6)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [n, heads, width]; cos, sin [n, 1, width]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attention in float32: its bfloat16 gradient is three times slower on a CPU. [batch, heads,
    length, width]"""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )


def _causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """transformers' attention interface for right-padded batches, where causality alone hides the
    padding. Layers that are taught where to look keep queries and keys of those heads."""
    if module.layer_idx in (LOOKING_LAYER, READING_LAYER):
        per_key = query.shape[1] // key.shape[1]
        heads = list(GUIDED_HEADS)
        module.guided = query[:, heads], key[:, [head // per_key for head in heads]]
    out = _sdpa(query, key, value, causal=True)
    return out.transpose(1, 2).contiguous(), None


ATTENTION = "plates_training"
AttentionInterface.register(ATTENTION, _causal_attention)


def _attend(qkv: Tensor, segments: Segments) -> Tensor:
    """qkv [n, 3, heads, width] -> [n, heads * width]; patches see their own segment only."""
    order = torch.from_numpy(segments.order)
    parts = []
    for group, (runs, length) in zip(
        torch.split(qkv[order], [r * n for r, n in segments.groups]), segments.groups, strict=True
    ):
        q, k, v = group.view(runs, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
        out = _sdpa(q, k, v, causal=False)
        parts.append(out.transpose(1, 2).reshape(runs * length, -1))
    return torch.cat(parts)[torch.argsort(order)]


def tower(visual: Any, batch: Batch) -> Tensor:
    """Patch states of transformers' vision tower, in packed order. [patches, width]"""
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
    x: Tensor = (normalised(torch.from_numpy(batch.patches)) @ kernel.T).float()
    cos, sin = visual.rotary_pos_emb(x, torch.from_numpy(batch.patch_positions))
    cos, sin = cos[:, None], sin[:, None]
    for index, block in enumerate(visual.blocks):
        full = index in visual.fullatt_block_indexes
        attention = block.attn
        qkv = attention.qkv(_norm(block.norm1, x)).view(len(x), 3, attention.num_heads, -1)
        q, k, v = qkv.unbind(1)
        qkv = torch.stack([_rotated(q, cos, sin), _rotated(k, cos, sin), v], dim=1)
        x = x + attention.proj(_attend(qkv, batch.pictures if full else batch.windows))
        x = x + block.mlp(_norm(block.norm2, x))
    return x


def merged(visual: Any, patches: Tensor) -> Tensor:
    """Picture tokens in packed order. [patches / 4, out]"""
    merger = visual.merger
    tokens: Tensor = merger.mlp(_norm(merger.ln_q, patches).view(-1, merger.hidden_size))
    return tokens


def losses(
    model: Qwen2_5_VLForConditionalGeneration,
    hints: Hints,
    batch: Batch,
    *,
    learn_tower: bool = True,
) -> Losses:
    """One forward pass over a batch; without `learn_tower` the vision tower gets no gradient and
    its patches need not say what they show."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and learn_tower):
        patches = tower(model.model.visual, batch)
    tokens = merged(model.model.visual, patches)
    real = len(batch.hints)
    shown = torch.from_numpy(batch.hints)
    with torch.autocast("cpu", enabled=False):
        hinted = hints.token_loss(tokens[: real // 4].float(), shown)
        if learn_tower:
            hinted = hinted + hints.patches.loss(patches[:real].float(), shown)
    if not batch.text.ids.size:
        nothing = hinted.new_zeros(())
        exact = torch.zeros(0, 0, dtype=torch.bool)
        spoken = (nothing, nothing, nothing, nothing, nothing)
        return Losses(nothing, hinted, *spoken, 0.0, exact)
    pictures = tokens[torch.from_numpy(batch.token_order)]
    return replace(language_losses(model, hints, batch.text, pictures), hints=hinted)


def language_losses(
    model: Qwen2_5_VLForConditionalGeneration, hints: Hints, text: TextBatch, pictures: Tensor
) -> Losses:
    """The language model over conversations whose pictures are embedded already, `[picture tokens,
    width]`."""
    ids, targets = torch.from_numpy(text.ids), torch.from_numpy(text.targets)
    language = model.model.language_model
    embedded = language.embed_tokens(ids)
    is_picture = ids == model.config.image_token_id
    embedded = embedded.masked_scatter(is_picture.unsqueeze(-1), pictures.to(embedded.dtype))
    out = language(
        inputs_embeds=embedded,
        position_ids=torch.from_numpy(text.positions),
        use_cache=False,
        output_hidden_states=True,
    )
    hidden, early = out.last_hidden_state, out.hidden_states[PICTURE_HINT_LAYER]
    starts = ids == model.config.vision_start_token_id
    numbered = hints.picture_loss(early, is_picture, starts)
    matched = hints.match_loss(out.hidden_states[MATCH_HINT_LAYER], torch.from_numpy(text.matches))
    attention = [layer.self_attn for layer in language.layers]
    looked = guidance_loss(attention[LOOKING_LAYER], text.gaze.looks)
    tallied = guidance_loss(attention[LOOKING_LAYER], text.gaze.tallies, evenly=True)
    read = guidance_loss(attention[READING_LAYER], text.gaze.reads)
    learned = targets != IGNORED
    with torch.autocast("cpu", enabled=False):
        logits = model.lm_head(hidden[learned].float())
    wanted = targets[learned]
    hit = logits.argmax(-1) == wanted
    exact = torch.ones_like(learned).masked_scatter(learned, hit)
    answer = F.cross_entropy(logits.float(), wanted)
    nothing = answer.new_zeros(())
    right = hit.float().mean().item()
    guided = (looked, tallied, read)
    return Losses(answer, nothing, numbered, matched, *guided, right, exact)
