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
from examples.plates.encode import GLYPHS, IGNORED
from examples.plates.palette import COLOUR_NAMES
from examples.plates.questions import MAX_PICTURES
from examples.plates.specs import MAX_SHAPES

PICTURE_HINT_LAYER = 2
"""Decoder layers after which a picture's tokens should know its number."""
MATCH_HINT_LAYER = 3
"""Decoder layers after which the digits of a number asked for should know which pictures fit."""
TALLY_HINT_LAYER = 3
"""Decoder layers after which the name of things to count should know each picture's number."""
HINT_SIZES = (1 + len(GLYPHS), 1 + len(COLOUR_NAMES), 2, 5)


class Hints(nn.Module):
    """Extra heads that say what the vision tower's patches show and to which picture a token of the
    language model belongs; they speed up learning and are thrown away."""

    def __init__(self, width: int, language_width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, sum(HINT_SIZES))
        self.counts = nn.Linear(width, 3 * (1 + MAX_SHAPES), bias=False)
        self.colours = nn.Linear(width, 3 * (1 + len(COLOUR_NAMES)), bias=False)
        self.rest = nn.Linear(width, 5, bias=False)
        self.picture = nn.Linear(language_width, MAX_PICTURES, bias=False)
        self.match = nn.Linear(language_width, MAX_PICTURES)
        self.tally = nn.Linear(language_width, MAX_PICTURES * (1 + MAX_SHAPES))

    def loss(self, patches: Tensor, hints: Tensor) -> Tensor:
        """Mean cross-entropy over patches, summed over the kinds of hints. patches [n, width],
        hints [n, 11]."""
        states = self.norm(patches)
        parts = torch.split(self.head(states), list(HINT_SIZES), dim=-1)
        centre = hints[:, 2] > 0
        glyph = F.cross_entropy(parts[0], hints[:, 0])
        colour = F.cross_entropy(parts[1], hints[:, 1])
        is_centre = F.cross_entropy(parts[2], hints[:, 2])
        at_centre = F.cross_entropy(parts[0][centre], hints[centre, 0])
        place = F.cross_entropy(parts[3][centre], hints[centre, 3])
        rest = F.cross_entropy(self.rest(states[centre]), hints[centre, 10])
        kinds = glyph + 0.5 * colour + 2 * is_centre + at_centre + 0.5 * (place + rest)
        whole = self.colours(states).view(-1, 1 + len(COLOUR_NAMES))
        colours = F.cross_entropy(whole.float(), hints[:, 7:10].reshape(-1))
        return kinds + 1.5 * self._count_loss(states, hints[:, 4:7]) + 0.5 * colours

    def _count_loss(self, states: Tensor, counts: Tensor) -> Tensor:
        """Cross-entropy of the three counts of shapes. states [n, width], counts [n, 3]."""
        shape = counts[:, 0] > 0
        if not shape.any():
            return states.new_zeros(())
        logits = self.counts(states[shape]).view(-1, 1 + MAX_SHAPES)
        return F.cross_entropy(logits.float(), counts[shape].reshape(-1))

    def picture_loss(self, hidden: Tensor, is_picture: Tensor, starts: Tensor) -> Tensor:
        """Cross-entropy of the picture's number at each of its tokens.

        hidden [conversations, tokens, width]; is_picture and starts (of a picture) [conversations,
        tokens] bool.
        """
        number = (starts.cumsum(-1) - 1)[is_picture]
        states = F.rms_norm(hidden[is_picture].float(), hidden.shape[-1:])
        return F.cross_entropy(self.picture(states).float(), number)

    def match_loss(self, hidden: Tensor, matches: Tensor) -> Tensor:
        """Binary cross-entropy of which pictures fit a number asked for, at each of its tokens.

        hidden [conversations, tokens, width]; matches [conversations, tokens]: see
        `ConversationCode`.
        """
        noted = matches > 0
        if not noted.any():
            return hidden.new_zeros((), dtype=torch.float32)
        bits = (matches[noted] - 1)[:, None] >> torch.arange(2 * MAX_PICTURES) & 1
        fits, present = bits.float().chunk(2, dim=-1)
        states = F.rms_norm(hidden[noted].float(), hidden.shape[-1:])
        logits = self.match(states).float()
        found = F.binary_cross_entropy_with_logits(logits, fits, weight=present, reduction="sum")
        return found / present.sum()

    def tally_loss(self, hidden: Tensor, tallies: Tensor) -> Tensor:
        """Cross-entropy of how many of the things asked for each picture shows, where they are
        named.

        hidden [conversations, tokens, width]; tallies [conversations, tokens, 4]: see
        `ConversationCode`.
        """
        noted = tallies[:, :, 0] > 0
        if not noted.any():
            return hidden.new_zeros((), dtype=torch.float32)
        states = F.rms_norm(hidden[noted].float(), hidden.shape[-1:])
        logits = self.tally(states).float().view(-1, 1 + MAX_SHAPES)
        return F.cross_entropy(logits, tallies[noted].flatten() - 1, ignore_index=-1)


@dataclass(frozen=True)
class Losses:
    """answer: mean over learned tokens; hints, numbered, matched, tallied: see `Hints.loss`,
    `Hints.picture_loss`, `Hints.match_loss`, `Hints.tally_loss`; right: share of learned tokens
    predicted.

    exact: [conversations, tokens] bool, false where a learned token would have come out wrong.
    """

    answer: Tensor
    hints: Tensor
    numbered: Tensor
    matched: Tensor
    tallied: Tensor
    right: float
    exact: Tensor

    def numbers(self) -> dict[str, float]:
        """For the log; NaN where the batch had none of it."""
        named = {
            "hints": self.hints,
            "answer": self.answer,
            "numbered": self.numbered,
            "matched": self.matched,
            "tallied": self.tallied,
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
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """transformers' attention interface for right-padded batches, where causality alone hides the
    padding."""
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


def merged(visual: Any, patches: Tensor, batch: Batch) -> Tensor:
    """Picture tokens in reading order. [patches / 4, out]"""
    merger = visual.merger
    tokens: Tensor = merger.mlp(_norm(merger.ln_q, patches).view(-1, merger.hidden_size))
    return tokens[torch.from_numpy(batch.token_order)]


def losses(
    model: Qwen2_5_VLForConditionalGeneration,
    hints: Hints,
    batch: Batch,
    *,
    learn_tower: bool = True,
) -> Losses:
    """One forward pass over a batch; without `learn_tower` the vision tower gets no gradient."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and learn_tower):
        patches = tower(model.model.visual, batch)
        hinted = hints.loss(patches.float(), torch.from_numpy(batch.hints))
    if not batch.text.ids.size:
        nothing = hinted.new_zeros(())
        return Losses(nothing, hinted, nothing, nothing, nothing, 0.0, torch.zeros(0, 0).bool())
    pictures = merged(model.model.visual, patches, batch)
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
    tallied = hints.tally_loss(out.hidden_states[TALLY_HINT_LAYER], torch.from_numpy(text.tallies))
    learned = targets != IGNORED
    logits = model.lm_head(hidden[learned])
    wanted = targets[learned]
    hit = logits.argmax(-1) == wanted
    exact = torch.ones_like(learned).masked_scatter(learned, hit)
    answer = F.cross_entropy(logits.float(), wanted)
    nothing = answer.new_zeros(())
    right = hit.float().mean().item()
    return Losses(answer, nothing, numbered, matched, tallied, right, exact)
