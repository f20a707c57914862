"""One training run: schedule, model, optimiser, running average, checkpoints."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.plates import architecture, tokenizer
from examples.plates.batches import BatchProcess, Diet, collate
from examples.plates.encode import Encoder
from examples.plates.forward import ATTENTION, Hints, Losses, language_losses, losses
from examples.plates.questions import held_out_conversations
from examples.plates.stored import PictureStore, stored_batches


@dataclass(frozen=True)
class Stage:
    """What is trained until `until` (share of the whole time).

    hints: weight of the extra heads' loss; learn_tower: False trains merger and language only;
    stored: True trains the language model only, on pictures that are embedded once.
    """

    until: float
    diet: Diet
    hints: float
    learn_tower: bool = True
    stored: bool = False


STAGES: tuple[Stage, ...] = (
    Stage(0.14, Diet(1, 4, max_pictures=1, batch_tokens=3000), hints=1.0),
    Stage(0.30, Diet(4, 4, max_pictures=1, batch_tokens=3000, bare_share=0.98), hints=1.0),
    Stage(0.37, Diet(5, 5, max_pictures=1, batch_tokens=3000), hints=0, learn_tower=False),
    Stage(0.48, Diet(6, 4, max_pictures=4, batch_tokens=4000), hints=0, learn_tower=False),
    Stage(0.80, Diet(2, 5, 4, batch_tokens=5000, bare_share=0.2, drill_share=0.5), hints=0.7),
    Stage(1.01, Diet(3, 3, 4, batch_tokens=5000, bare_share=0.05, drill_share=0.3), hints=0.3),
)
"""Single pictures; the vision tower alone, on crowded ones; the language model on what the tower
has learned, with one picture and then with several; both together; at last requests as served."""
MORE_STAGES: tuple[Stage, ...] = (
    Stage(0.20, Diet(10, 6, 4, batch_tokens=4000), hints=0, stored=True),
    Stage(0.40, Diet(21, 10, 4, batch_tokens=4000, drill_share=0.8), hints=0, learn_tower=False),
    Stage(0.80, Diet(31, 7, 4, batch_tokens=4000, bare_share=0.05, drill_share=0.75), hints=0.4),
    Stage(1.01, Diet(32, 5, 4, batch_tokens=4000, bare_share=0.02, drill_share=0.4), hints=0.3),
)
"""For weights that know the pictures already: the language model alone, on stored pictures
(where it learns to find a number, but counts by heart) and on fresh ones; both together; requests
as served."""


@dataclass(frozen=True)
class Recipe:
    """Stages, and the learning rate at the end of the warm-up."""

    stages: tuple[Stage, ...]
    peak_rate: float


FROM_NOTHING = Recipe(STAGES, peak_rate=1e-3)
GOING_ON = Recipe(MORE_STAGES, peak_rate=9e-4)

LAST_RATE = 1e-5
HAS_FAST_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Elsewhere a CPU emulates bfloat16, many times slower than float32."""
WARM_UP = 0.015
"""Share of the time in which the learning rate rises."""
AVERAGE_DECAY = 0.998
WEIGHT_DECAY = 0.03
MAX_STEP_S = 3.0
"""A longer step was suspended; the rest of it does not count as training."""
NUMBER_HINT = 0.3
"""Weight of the loss that names each picture's number."""
STORED_PICTURES = 16_000
FIRST_STORED_PICTURES = 3_000
STEPS_PER_RENEWAL = 2
MATCH_HINT = 0.6
"""Weight of the loss that says which pictures fit a number asked for."""
TALLY_HINT = 0.6
"""Weight of the loss that says how many of the things asked for each picture shows."""


def rate_at(share: float, peak_rate: float) -> float:
    """Learning rate after `share` of the time: linear rise, cosine fall."""
    if share < WARM_UP:
        return peak_rate * max(0.02, share / WARM_UP)
    fall = min(1.0, (share - WARM_UP) / (1 - WARM_UP))
    return LAST_RATE + (peak_rate - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * fall))


def stored_model(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The model of a folder, its weights in float32."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.model.language_model.config._attn_implementation = ATTENTION
    return model


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


class Source(Protocol):
    """Where a stage's samples come from."""

    def losses(self) -> tuple[Losses, int]:
        """The losses of the next batch, and how many samples it holds."""
        ...

    def close(self) -> None: ...


class DrawnSource:
    """Fresh pictures, drawn in a process of their own."""

    def __init__(self, trainer: Trainer, stage: Stage, seed: int) -> None:
        self._trainer, self._learn_tower = trainer, stage.learn_tower
        self._batches = BatchProcess(trainer.words, replace(stage.diet, seed=seed))

    def losses(self) -> tuple[Losses, int]:
        batch, trainer = self._batches.next(), self._trainer
        found = losses(trainer.model, trainer.hints, batch, learn_tower=self._learn_tower)
        return found, len(batch.text.ids) or len(batch.pictures.groups)

    def close(self) -> None:
        self._batches.close()


class StoredSource:
    """Pictures from a store that is renewed a little with every step; the tower learns nothing."""

    def __init__(self, trainer: Trainer, stage: Stage, seed: int) -> None:
        self._trainer = trainer
        self._store = PictureStore(STORED_PICTURES, seed)
        while len(self._store) < FIRST_STORED_PICTURES:
            self._store.add(trainer.model)
        pad_id, budget = trainer.model.config.text_config.pad_token_id, stage.diet.batch_tokens
        encoder = Encoder(trainer.words)
        self._batches = stored_batches(self._store, encoder, pad_id, seed, budget)
        self._steps = 0

    def losses(self) -> tuple[Losses, int]:
        self._steps += 1
        if self._steps % STEPS_PER_RENEWAL == 0:
            self._store.add(self._trainer.model)
        text, pictures = next(self._batches)
        return language_losses(self._trainer.model, self._trainer.hints, text, pictures), len(
            text.ids
        )

    def close(self) -> None:
        """Nothing is held."""


class Trainer:
    """Model, optimiser, running average and clock of one run.

    `start` is a model folder to go on from, weights and tokenizer; without it all is new.
    """

    def __init__(self, out: Path, minutes: float, seed: int, start: Path | None = None) -> None:
        self.out, self.budget_s = out, minutes * 60
        self.recipe = FROM_NOTHING if start is None else GOING_ON
        self.words = tokenizer.load_or_save(out / "model", start)
        architecture.save_settings(out / "model", self.words)
        self.model = fresh_model(self.words, seed) if start is None else stored_model(start)
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

    @property
    def share(self) -> float:
        return self.spent_s / self.budget_s

    def source(self, stage: Stage) -> Source:
        """Samples for a stage; other ones after every interruption."""
        kind = StoredSource if stage.stored else DrawnSource
        return kind(self, stage, stage.diet.seed + 1000 * self.step)

    def stage(self) -> Stage:
        return next(stage for stage in self.recipe.stages if self.share < stage.until)

    def train_step(self, source: Source, stage: Stage) -> dict[str, float]:
        """One update; its time counts, waiting included."""
        start = time.monotonic()
        for group in self.optimiser.param_groups:
            group["lr"] = rate_at(self.share, self.recipe.peak_rate)
        with autocast():
            found, conversations = source.losses()
            loss = found.answer + stage.hints * found.hints
            loss = loss + NUMBER_HINT * found.numbered + MATCH_HINT * found.matched
            loss = loss + TALLY_HINT * found.tallied
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(AVERAGE_DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        self.step, self.samples = self.step + 1, self.samples + conversations
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
