"""Other servers to compare with: how each is started and asked. Facts only, nothing is installed.

Every command runs under `PEERS_HOME`, a folder with the peers' virtual environments, programs and
converted models. A peer whose program or model is not there counts as absent.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One OpenAI-compatible server.

    `command` holds `{home}`, `{model}` (the common folder), `{name}` (its last part), `{port}` and
    `{threads}`; so do the values of `environment` and `served_name`. `needs` are paths below the
    home without which the peer is absent. `body` is added to every request; None drops a field.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    served_name: str = "{name}"
    environment: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)

    def missing(self, home: Path, model: Path) -> list[str]:
        """What is not there."""
        paths = [home / path.format(name=model.name) for path in self.needs]
        return [str(path) for path in paths if not path.exists()]

    def filled(self, text: str, home: Path, model: Path, port: int, threads: int) -> str:
        return text.format(
            home=home, model=model, name=model.name, port=port, threads=threads, last=threads - 1
        )


_OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def _vllm(name: str) -> Peer:
    return Peer(
        name,
        (
            *(
                f"{{home}}/venvs/{name}/bin/vllm",
                "serve",
                "{model}",
                "--served-model-name",
                "{name}",
            ),
            *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16"),
            *("--max-model-len", "4096", "--max-num-seqs", "16"),
        ),
        needs=(f"venvs/{name}/bin/vllm",),
        environment={
            **_OFFLINE,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": "0-{last}",
            "LD_PRELOAD": f"{{home}}/venvs/{name}/lib/libiomp5.so",
        },
    )


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        _vllm("vllm"),
        _vllm("vllmzen"),
        Peer(
            "llamacpp",
            (
                *(
                    "{home}/src/llama-build/bin/llama-server",
                    "-m",
                    "{home}/models/{name}-gguf/bf16.gguf",
                ),
                *("--mmproj", "{home}/models/{name}-gguf/mmproj-bf16.gguf", "--host", "127.0.0.1"),
                *("--port", "{port}", "-t", "{threads}", "-tb", "{threads}", "-np", "8"),
                *("-c", "16384", "-kvu", "--jinja", "--no-warmup"),
            ),
            needs=("src/llama-build/bin/llama-server", "models/{name}-gguf/mmproj-bf16.gguf"),
            body={"cache_prompt": False},
        ),
        Peer(
            "ov",
            (
                *("{home}/venvs/ov/bin/python", "{home}/scripts/ov_server.py"),
                *("--model", "{home}/models/{name}-ov", "--port", "{port}"),
            ),
            needs=("venvs/ov/bin/python", "models/{name}-ov/openvino_language_model.bin"),
            environment=_OFFLINE,
        ),
        Peer(
            "hf",
            (
                *("{home}/venvs/hf/bin/transformers", "serve", "{model}", "--device", "cpu"),
                *("--dtype", "bfloat16", "--host", "127.0.0.1", "--port", "{port}"),
            ),
            needs=("venvs/hf/bin/transformers",),
            served_name="{model}",
            environment={**_OFFLINE, "OMP_NUM_THREADS": "{threads}"},
            body={"ignore_eos": None},
        ),
    )
}


def peers_home() -> Path:
    """`PEERS_HOME`, or `peers` in the home folder."""
    return Path(os.environ.get("PEERS_HOME") or Path.home() / "peers")
