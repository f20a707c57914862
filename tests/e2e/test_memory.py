"""Each process holds its own part of the weights and no other's: by count and by resident size."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from safetensors import safe_open

from shared.demo import model_dir
from tests.support.cluster import Cluster, running_cluster
from tests.support.large_model import build_large_vl_model

pytestmark = pytest.mark.timeout(300)
MIB = 1024 * 1024
VISION_BYTES = LANGUAGE_BYTES = 240 * MIB  # roughly, in float32


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_large_vl_model(tmp_path_factory.mktemp("large"))


def part_bytes(folder: Path, *, vision: bool) -> int:
    """Bytes of the folder's vision tensors, or of all others, in float32."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                if ("visual" in name) == vision:
                    shape = tensors.get_slice(name).get_shape()
                    size = 4
                    for extent in shape:
                        size *= extent
                    total += size
    return total


def loaded_bytes(cluster: Cluster, name: str) -> int:
    """What a worker says that it read of the weights."""
    lines = [json.loads(x) for x in cluster.processes[name].log.read_text().splitlines()]
    return max(x["bytes_total"] for x in lines if x["event"] == "weights_loading")


def resident_bytes(cluster: Cluster, name: str) -> int:
    """Private memory of a worker: mapped files that others share do not count."""
    memory = psutil.Process(cluster.processes[name].popen.pid).memory_full_info()
    return int(memory.uss)


def test_workers_hold_only_their_part(tmp_path: Path, large_model: Path) -> None:
    names = ("encoder-0", "prefill-0", "decode-0")
    with running_cluster(_folder(tmp_path, "small")) as small:
        base = {name: resident_bytes(small, name) for name in names}
    flags = ["--dtype", "float32"]
    with running_cluster(
        _folder(tmp_path, "large"),
        model=large_model,
        flags=dict.fromkeys(("encoder", "prefill", "decode"), flags),
    ) as large:
        grown = {name: resident_bytes(large, name) - base[name] for name in names}
        loaded = {name: loaded_bytes(large, name) for name in names}
    vision, language = (part_bytes(large_model, vision=v) for v in (True, False))
    demo_vision, demo_language = (part_bytes(model_dir(), vision=v) for v in (True, False))
    assert loaded == {"encoder-0": vision, "prefill-0": language, "decode-0": language}
    for name, own, before in (
        ("encoder-0", vision, demo_vision),
        ("prefill-0", language, demo_language),
        ("decode-0", language, demo_language),
    ):
        expected = own - before
        assert 0.8 * expected < grown[name] < expected + 0.25 * VISION_BYTES, (name, grown, own)


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder
