"""One training run: schedule, model, optimiser, running average, checkpoints."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.plates import architecture, tokenizer
from examples.plates.batches import BatchTeam, Diet, collate
from examples.plates.encode import Encoder
from examples.plates.forward import ATTENTION, losses
from examples.plates.hints import Hints
from examples.plates.questions import held_out_conversations


@dataclass(frozen=True)
class Stage:
    """What is trained until `until` (share of the whole time).

    hints: weight of the extra heads' loss; learn_tower: False trains merger and language only.
    """

    until: float
    diet: Diet
    hints: float
    learn_tower: bool = True


STAGES: tuple[Stage, ...] = (
    Stage(0.37, Diet(1, 1, max_pictures=1, batch_tokens=3000, bare_share=1.0), hints=1.0),
    Stage(0.53, Diet(2, 12, 4, batch_tokens=4000, drill_share=0.4), hints=0.3, learn_tower=False),
    Stage(0.90, Diet(3, 8, 4, batch_tokens=4000, bare_share=0.2, drill_share=0.4), hints=0.6),
    Stage(1.01, Diet(4, 4, 4, batch_tokens=4000, bare_share=0.1, drill_share=0.3), hints=0.3),
)
"""The vision tower alone, on crowded pictures; the language model on what the tower has learned;
both together; at last requests as served."""
PEAK_RATE = 1.2e-3
"""The learning rate at the end of the warm-up."""
LAST_RATE = 1e-5
HAS_FAST_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Elsewhere a CPU emulates bfloat16, many times slower than float32."""
WARM_UP = 0.015
"""Share of the time in which the learning rate rises, at the begin of each stage."""
AVERAGE_DECAY = 0.998
WEIGHT_DECAY = 0.03
MAX_STEP_S = 10.0
"""A longer step was suspended; the rest of it does not count as training."""
NUMBER_HINT = 0.3
"""Weight of the loss that names each picture's number."""
MATCH_HINT = 0.6
"""Weight of the loss that says which pictures fit a number asked for."""
LOOK_HINT = 0.5
"""Weight of the losses that say where to look."""


def rate_at(share: float, stage_began: float) -> float:
    """Learning rate after `share` of the time: a cosine fall, and a linear rise in each stage."""
    fall = min(1.0, max(0.0, (share - WARM_UP) / (1 - WARM_UP)))
    rate = LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * fall))
    return rate * min(1.0, max(0.02, (share - stage_began) / WARM_UP))


def fresh_model(words: Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights scaled by fan-in; each branch's last projection is small, so that depth does
    not add up."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(architecture.config(words))
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            nn.init.normal_(weight, std=0.05)
        elif weight.ndim > 1:
            nn.init.normal_(weight, std=0.8 / math.sqrt(weight[0].numel()))
            if any(part in name for part in ("attn.proj", "down_proj", "o_proj", "mlp.2")):
                weight.data.mul_(0.35)
    model.model.language_model.config._attn_implementation = ATTENTION
    return model


def autocast() -> torch.autocast:
    """bfloat16 where the processor has it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=HAS_FAST_BFLOAT16)


class Trainer:
    """Model, optimiser, running average and clock of one run."""

    def __init__(self, out: Path, minutes: float, seed: int) -> None:
        self.out, self.budget_s = out, minutes * 60
        self.words = tokenizer.load_or_save(out / "model")
        architecture.save_settings(out / "model", self.words)
        self.model = fresh_model(self.words, seed)
        widths = (
            self.model.config.vision_config.hidden_size,
            self.model.config.text_config.hidden_size,
        )
        self.hints = Hints(*widths)
        weights = [*self.model.parameters(), *self.hints.parameters()]
        self.weights = weights
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.average = [w.detach().clone() for w in self.model.parameters()]
        self.step, self.samples, self.spent_s = 0, 0, 0.0
        self._stage_began = 0.0

    @property
    def share(self) -> float:
        return self.spent_s / self.budget_s

    def batches(self, stage: Stage) -> BatchTeam:
        """Batches for a stage; other ones after every interruption."""
        diet = replace(stage.diet, seed=stage.diet.seed + 1000 * self.step)
        return BatchTeam(self.words, diet, torch.get_num_threads())

    def stage(self) -> Stage:
        return next(stage for stage in STAGES if self.share < stage.until)

    def begin_stage(self) -> None:
        """A stage goes on from the averaged weights: what it does not train stays as it is now."""
        self._load(self.average)
        self._stage_began = self.share

    def train_step(self, batches: BatchTeam, stage: Stage) -> dict[str, float]:
        """One update; its time counts, waiting included."""
        start = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = rate_at(self.share, self._stage_began)
        batch = batches.next()
        with autocast():
            found = losses(self.model, self.hints, batch, learn_tower=stage.learn_tower)
            loss = found.answer + stage.hints * found.hints
            loss = loss + NUMBER_HINT * found.numbered + MATCH_HINT * found.matched
            loss = loss + LOOK_HINT * (found.looked + found.tallied + found.read)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.samples += len(batch.text.ids) or batch.num_pictures
        self.spent_s += min(MAX_STEP_S, time.monotonic() - start)
        return {name: value for name, value in found.numbers().items() if not math.isnan(value)}

    @contextmanager
    def averaged(self) -> Iterator[Qwen2_5_VLForConditionalGeneration]:
        """The model with its running-average weights."""
        own = [w.detach().clone() for w in self.model.parameters()]
        self._load(self.average)
        try:
            yield self.model
        finally:
            self._load(own)

    def _load(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(self.model.parameters(), values, strict=True):
                weight.copy_(value)

    def check(self, conversations: int = 240) -> str:
        """Share of held-out conversations whose last answer is right, in words, by kind.

        Every token is judged after the right ones before it, which for greedy decoding is the same
        as generating.
        """
        encoder, pad_id = Encoder(self.words), self.model.config.text_config.pad_token_id
        chats = list(held_out_conversations(conversations, seed=99))
        seen: Counter[str] = Counter()
        right: Counter[str] = Counter()
        with self.averaged() as model, torch.no_grad(), autocast():
            for first in range(0, len(chats), 24):
                part = chats[first : first + 24]
                codes = [encoder.encode(chat) for chat in part]
                exact = losses(model, self.hints, collate(codes, pad_id)).exact
                for row, (chat, code) in enumerate(zip(part, codes, strict=True)):
                    last = chat.turns[-1]
                    tail = 2 + len(self.words.encode(last.answer).ids)
                    seen[last.kind] += 1
                    right[last.kind] += bool(
                        exact[row, len(code.ids) - tail - 1 : len(code.ids)].all()
                    )
        parts = [f"{kind} {right[kind] / n:.0%} of {n}" for kind, n in sorted(seen.items())]
        return f"{right.total() / seen.total():.1%} right ({', '.join(parts)})"

    def save(self) -> None:
        """A checkpoint to go on from, and the averaged weights as a model folder; both replace the
        old ones at once."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "hints": self.hints.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average,
            "counters": (self.step, self.samples, self.spent_s),
        }
        torch.save(state, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").rename(self.out / "checkpoint.pt")
        with self.averaged() as model:
            copy = Qwen2_5_VLForConditionalGeneration(architecture.config(self.words))
            copy.load_state_dict(model.state_dict())
        copy.to(torch.bfloat16).save_pretrained(self.out / "export")
        exported = self.out / "export" / "model.safetensors"
        exported.chmod(0o644)
        exported.rename(self.out / "model" / "model.safetensors")

    def resume(self) -> bool:
        """Loads the checkpoint of an earlier run; False if there is none."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average = state["average"]
        self.step, self.samples, self.spent_s = state["counters"]
        return True
