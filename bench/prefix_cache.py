"""The prefix cache in the running pipeline: its hits against a trie's, and TTFT with and without.

Chats that share a long system prompt take turns, each turn with the whole chat so far; some of them
say the same about different pictures. Every turn is also asked once as a chat of its own, whose
system prompt begins differently, so that it must be computed from its first token: the cold side.
The prefill worker's own counters must equal the prediction to the token.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import track

from bench.accuracy import png
from bench.client import data_url, stream
from bench.prefix_trie import BlockTrie
from bench.prompts import PromptMaker
from bench.server import running_server
from examples.plates.draw import draw
from examples.plates.specs import plate_spec
from services.launcher.ports import free_ports
from shared.demo import model_dir
from shared.text.prompt import ChatMessage

BLOCK_SIZE = 16
NUM_WARM_UP = 2
RULE = "Answer in one short sentence, name only what you see, and say so if you cannot tell. "
QUESTIONS = ("What number is on the plate?", "Are you sure?", "Say it once more.", "Thank you.")


@dataclass(frozen=True)
class Turn:
    """One message of a chat; `picture` lies before its text."""

    role: str
    text: str
    picture: bytes | None = None

    def for_http(self) -> dict[str, Any]:
        """As a client sends it."""
        if self.picture is None:
            return {"role": self.role, "content": self.text}
        image = {"type": "image_url", "image_url": {"url": data_url(self.picture)}}
        return {"role": self.role, "content": [image, {"type": "text", "text": self.text}]}

    def for_prompt(self, prompts: PromptMaker) -> ChatMessage:
        """As the gateway takes it."""
        if self.picture is None:
            return ChatMessage(self.role, self.text)
        return ChatMessage(self.role, (prompts.measure(self.picture), self.text))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m bench prefix_cache", description=__doc__)
    parser.add_argument("--chats", type=int, default=6, help="chats (6)")
    parser.add_argument("--turns", type=int, default=4, help="turns of each, at most 4 (4)")
    parser.add_argument("--rules", type=int, default=60, help="sentences of the system prompt (60)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer (8)")
    parser.add_argument("--model", type=Path, default=model_dir(), help="model folder (demo)")
    options = parser.parse_args()
    port = free_ports(3)
    arguments = ["--model", str(options.model), "--served-name", "bench"]
    arguments += ["--metrics-port", str(port)]
    with running_server(arguments) as url, httpx.Client(timeout=300.0) as client:
        # The launcher counts up: encoder, prefill, decode.
        metrics_url = f"http://127.0.0.1:{port + 1}/metrics"
        trace = Trace(client, url, metrics_url, PromptMaker(options.model), options.tokens)
        trace.replay(options.chats, options.turns, RULE * options.rules)
        print(trace.report())
    if not trace.is_as_predicted:
        raise SystemExit(1)


class Trace:
    """Sends chats one request at a time and counts what the cache should find."""

    def __init__(
        self, client: httpx.Client, url: str, metrics_url: str, prompts: PromptMaker, tokens: int
    ) -> None:
        self._client = client
        self._url = url
        self._metrics_url = metrics_url
        self._prompts = prompts
        self._num_tokens = tokens
        self._trie = BlockTrie(BLOCK_SIZE)
        self._warm_s: list[float] = []
        self._cold_s: list[float] = []
        self._num_prompts = self._asked = self._predicted = 0
        self._before = self._counters()
        self._after: dict[str, float] = {}

    def replay(self, num_chats: int, num_turns: int, system: str) -> None:
        """All chats, turn by turn, each turn warm and cold."""
        rng = random.Random(0)
        for number in range(NUM_WARM_UP):
            self._ask([Turn("system", f"Warm up {number}. {system}"), Turn("user", "Hello.")])
        chats = [self._new_chat(rng, number, system) for number in range(num_chats)]
        for turn in track(range(num_turns), "turns"):
            for number, chat in enumerate(chats):
                chat[-1] = Turn("user", QUESTIONS[turn % len(QUESTIONS)], chat[-1].picture)
                own = Turn("system", f"Chat {number}, turn {turn}. {system}")
                self._cold_s.append(self._ask([own, *chat[1:]])[0])
                ttft_s, text = self._ask(chat)
                if turn or number:  # the very first has nothing to start from
                    self._warm_s.append(ttft_s)
                chat += [Turn("assistant", text), Turn("user", "")]
        self._after = self._counters()

    @property
    def is_as_predicted(self) -> bool:
        """Whether the worker counted exactly what the trie says."""
        return (
            self._since("queries") == self._asked
            and self._since("hits") == self._predicted
            and self._since("evictions") == 0
        )

    def report(self) -> str:
        """A paragraph of figures."""
        warm_ms, cold_ms = (1e3 * statistics.median(side) for side in (self._warm_s, self._cold_s))
        hits = self._since("hits")
        return (
            f"{self._num_prompts} prompts of {self._asked / self._num_prompts:.0f} tokens on "
            f"average, one after the other\n"
            f"  tokens looked up  measured {self._since('queries'):8.0f}   sent {self._asked:11d}\n"
            f"  tokens found      measured {hits:8.0f}   predicted {self._predicted:6d}   "
            f"{'equal' if self.is_as_predicted else 'NOT EQUAL'}; "
            f"share {hits / self._asked:.3f}, blocks evicted {self._since('evictions'):.0f}\n"
            f"  TTFT              cold {cold_ms:7.1f} ms   warm {warm_ms:7.1f} ms   "
            f"ratio {cold_ms / warm_ms:.2f}"
        )

    def _new_chat(self, rng: random.Random, number: int, system: str) -> list[Turn]:
        """Two of three chats begin with a picture; what is said about it is the same."""
        picture = png(draw(plate_spec(rng, rng.randrange(10_000)))) if number % 3 else None
        return [Turn("system", system), Turn("user", "", picture)]

    def _ask(self, chat: Sequence[Turn]) -> tuple[float, str]:
        """TTFT and text of one answer."""
        prompt = self._prompts.build([turn.for_prompt(self._prompts) for turn in chat])
        self._num_prompts += 1
        self._asked += len(prompt.token_ids)
        self._predicted += self._trie.add(prompt)
        body = {
            "model": "bench",
            "messages": [turn.for_http() for turn in chat],
            "temperature": 0,
            "max_tokens": self._num_tokens,
            "ignore_eos": True,
        }
        timed = stream(self._client, self._url, body)
        return timed.ttft_s, timed.text

    def _since(self, name: str) -> float:
        key = f"triptych_prefix_cache_{name}_total"
        return self._after[key] - self._before[key]

    def _counters(self) -> dict[str, float]:
        text = self._client.get(self._metrics_url).text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("triptych_prefix_cache_")
        }


if __name__ == "__main__":
    main()
