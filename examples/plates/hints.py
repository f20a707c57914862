"""What training says besides the answers: what patches and tokens show, and where to look.

The heads here are thrown away after the training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.plates.architecture import MERGE
from examples.plates.palette import COLOUR_NAMES
from examples.plates.picture_code import GLYPHS, IntArray
from examples.plates.questions import MAX_PICTURES
from examples.plates.specs import MAX_SHAPES

HINT_SIZES = (1 + len(GLYPHS), 1 + len(COLOUR_NAMES), 2, 5)


class PatchHints(nn.Module):
    """Heads that say of each patch what it shows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, sum(HINT_SIZES))
        self.counts = nn.Linear(width, 3 * (1 + MAX_SHAPES), bias=False)
        self.colours = nn.Linear(width, 3 * (1 + len(COLOUR_NAMES)), bias=False)
        self.rest = nn.Linear(width, 5, bias=False)

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
        return kinds + self._count_loss(states, hints[:, 4:7]) + 0.5 * colours

    def _count_loss(self, states: Tensor, counts: Tensor) -> Tensor:
        """Cross-entropy of the three counts of shapes. states [n, width], counts [n, 3]."""
        shape = counts[:, 0] > 0
        if not shape.any():
            return states.new_zeros(())
        logits = self.counts(states[shape]).view(-1, 1 + MAX_SHAPES)
        return F.cross_entropy(logits.float(), counts[shape].reshape(-1))


class Hints(nn.Module):
    """Extra heads that say what the patches and the merged tokens of a picture show and to which
    picture a token of the language model belongs; they speed up learning and are thrown away."""

    def __init__(self, width: int, language_width: int) -> None:
        super().__init__()
        self.patches, self.tokens = PatchHints(width), PatchHints(width)
        self.split = nn.Linear(language_width, MERGE * MERGE * width)
        self.picture = nn.Linear(language_width, MAX_PICTURES, bias=False)
        self.match = nn.Linear(language_width, MAX_PICTURES)

    def token_loss(self, tokens: Tensor, hints: Tensor) -> Tensor:
        """How well a token that was merged from four patches still says what each of them shows.
        tokens [n / 4, language width], hints [n, 11]; packed order."""
        split = self.split(F.rms_norm(tokens, tokens.shape[-1:]))
        return self.tokens.loss(split.view(len(hints), -1), hints)

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


def guidance_loss(attention: Any, pairs: IntArray, *, evenly: bool = False) -> Tensor:
    """How far the guided heads of an attention are from where they should look: the mean of minus
    the logarithm of their whole weight on the tokens that are right, or, `evenly`, the divergence
    of their weights from equal ones on just those.

    `attention` has run; pairs [n, 3]: conversation, a token that looks, a token that is right.
    """
    query: Tensor = attention.guided[0]  # [conversations, heads, tokens, width]
    key: Tensor = attention.guided[1]  # the same
    if not len(pairs):
        return query.new_zeros(())
    looking, row = np.unique(pairs[:, :2], axis=0, return_inverse=True)
    chats, tokens = torch.from_numpy(looking).unbind(1)
    scores = (query[chats, :, tokens].unsqueeze(2) @ key[chats].transpose(2, 3)).squeeze(2)
    scores = scores.float() * float(attention.scaling)  # [looking tokens, heads, tokens]
    later = torch.arange(scores.shape[-1]) > tokens[:, None, None]
    right = torch.zeros(scores.shape[::2], dtype=torch.bool)
    right[torch.from_numpy(row.reshape(-1)), torch.from_numpy(pairs[:, 2])] = True
    every = scores.masked_fill(later, -torch.inf).logsumexp(-1)
    if evenly:
        number = right.sum(-1, keepdim=True)
        mean = scores.masked_fill(~right[:, None], 0.0).sum(-1) / number
        return (every - mean - number.log()).mean()
    return (every - scores.masked_fill(~right[:, None], -torch.inf).logsumexp(-1)).mean()
