"""The demo model's share of right answers, measured through the running pipeline.

Starts every service, sends held-out questions over HTTP and compares each whole answer with the one
right answer. Prints the share per kind of question and, last, over all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from rich.progress import track

from bench.client import data_url
from bench.server import running_server
from examples.plates.questions import Sample, held_out

MODEL = "triptych-demo"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=__doc__)
    parser.add_argument("--questions", type=int, default=500, help="held-out questions (500)")
    parser.add_argument("--seed", type=int, default=2026, help="seed of the questions (2026)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (8)")
    parser.add_argument("--url", help="a running server instead of starting one")
    parser.add_argument("--keep", type=Path, help="file for questions, pictures and answers (JSON)")
    options = parser.parse_args()
    samples = list(held_out(options.questions, options.seed))
    with nullcontext(options.url) if options.url else running_server() as url:
        answers = ask_all(url, samples, options.concurrency)
    if options.keep is not None:
        options.keep.write_text(json.dumps(kept(samples, answers), indent=1), encoding="utf-8")
    print(report(samples, answers))


def kept(samples: list[Sample], answers: list[str]) -> list[dict[str, Any]]:
    """What was asked and answered, to be compared between two machines: pictures by their pixels,
    since drawing them is a library's affair."""
    return [
        {
            "messages": sample.messages,
            "pictures": [
                hashlib.sha256(picture.tobytes()).hexdigest() for picture in sample.pictures
            ],
            "expected": sample.answer,
            "answer": answer,
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]


def ask_all(url: str, samples: list[Sample], concurrency: int) -> list[str]:
    """Every sample's answer, in order."""
    with httpx.Client(timeout=120.0) as client, ThreadPoolExecutor(concurrency) as pool:
        answers = pool.map(lambda sample: ask(client, url, sample), samples)
        return list(track(answers, "asking", total=len(samples)))


def ask(client: httpx.Client, url: str, sample: Sample) -> str:
    """One answer, greedy. Raises on anything but a complete answer."""
    body = {"model": MODEL, "messages": messages(sample), "temperature": 0, "max_tokens": 96}
    response = client.post(f"{url}/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"HTTP {response.status_code}: {response.text}")
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The sample's messages in OpenAI's form, each picture as a `data:` URL in its place."""
    pictures = iter(sample.pictures)
    return [
        {"role": message["role"], "content": list(_parts(message["content"], pictures))}
        if not isinstance(message["content"], str)
        else message
        for message in sample.messages
    ]


def _parts(parts: list[dict[str, Any]], pictures: Iterator[Image.Image]) -> Iterator[Any]:
    for part in parts:
        if part["type"] == "image":
            yield {"type": "image_url", "image_url": {"url": data_url(png(next(pictures)))}}
        else:
            yield part


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def report(samples: list[Sample], answers: list[str]) -> str:
    """A line per kind of question, the total last."""
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for sample, answer in zip(samples, answers, strict=True):
        asked[sample.kind] += 1
        right[sample.kind] += answer.strip() == sample.answer
    lines = [
        f"{kind:<26}{right[kind]:>4} of {count:<4} {right[kind] / count:6.1%}"
        for kind, count in sorted(asked.items())
    ]
    lines.append(
        f"{'all':<26}{right.total():>4} of {asked.total():<4} {right.total() / asked.total():6.1%}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
