"""Measures a model folder on held-out questions with transformers' own generate: `python -m
examples.plates.evaluate DIR`.

An answer counts only if it is the canonical string, to the letter. Weights are used as stored,
computing in float32.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from examples.plates.questions import Sample, held_out

PAD = "<|image_pad|>"


@dataclass(frozen=True)
class Verdict:
    """One held-out question with what the model said."""

    sample: Sample
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.sample.answer


class Reader:
    """A model folder, ready to answer one request at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval()

    def inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        """What transformers' forward wants: ids with one placeholder for each picture token, and
        pixels."""
        text = self.tokenizer.apply_chat_template(
            list(sample.messages), tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        if not sample.pictures:
            return {"input_ids": self._ids(text)}
        pixels = self.processor(images=list(sample.pictures), return_tensors="pt")
        pieces = text.split(PAD)
        counts = pixels["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        for index, count in enumerate(counts.tolist()):
            pieces[index] += PAD * count
        ids = self._ids("".join(pieces))
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": pixels["image_grid_thw"],
        }

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(text)["input_ids"]])

    @torch.inference_mode()
    def answer(self, sample: Sample) -> str:
        """The greedy answer."""
        inputs = self.inputs(sample)
        mask = torch.ones_like(inputs["input_ids"])
        ids = self.model.generate(**inputs, attention_mask=mask, do_sample=False, max_new_tokens=64)
        new = ids[0, inputs["input_ids"].shape[1] :]
        said = self.tokenizer.decode(new, skip_special_tokens=True)
        assert isinstance(said, str)
        return said


def evaluate(folder: Path, questions: int, seed: int = 0) -> list[Verdict]:
    """Asks `questions` held-out questions."""
    reader = Reader(folder)
    return [Verdict(sample, reader.answer(sample)) for sample in held_out(questions, seed)]


def report(verdicts: Iterable[Verdict]) -> str:
    """Right answers by kind of question, as a table."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        by_kind[verdict.sample.kind].append(verdict.right)
        by_kind["all"].append(verdict.right)
        by_kind["(second turns)" if verdict.sample.turns > 1 else "(first turns)"].append(
            verdict.right
        )
    lines = ["| question | right | asked | share |", "|---|---|---|---|"]
    for kind, marks in sorted(by_kind.items(), key=lambda entry: (entry[0] == "all", entry[0])):
        lines.append(f"| {kind} | {sum(marks)} | {len(marks)} | {sum(marks) / len(marks):.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.plates.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path, help="model folder, for example shared/demo/model")
    parser.add_argument("--questions", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="another seed asks other questions")
    parser.add_argument("--wrong", action="store_true", help="also list the wrong answers")
    options = parser.parse_args()
    verdicts = evaluate(options.folder, options.questions, options.seed)
    print(report(verdicts))
    for verdict in verdicts if options.wrong else ():
        if not verdict.right:
            question = verdict.sample.messages[-1]["content"][-1]["text"]
            print(f"{verdict.sample.kind}: {question!r}")
            print(f"  expected {verdict.sample.answer!r}, said {verdict.said!r}")


if __name__ == "__main__":
    main()
