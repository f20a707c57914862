"""One cluster for all end-to-end tests: two workers of each stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster, running_cluster

LANDING_BYTES = 200 * 1024
"""Landing memory of each prefill worker: less than two requests of four pictures need."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    flags = {"prefill": ["--landing-bytes", str(LANDING_BYTES)]}
    with running_cluster(folder, encoders=2, prefills=2, decodes=2, flags=flags) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=120.0) as client:
        yield client


@pytest.fixture(scope="session")
def engine() -> LocalEngine:
    spec = ModelSpec.load(model_dir())
    return LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))


@pytest.fixture(scope="session")
def prompts() -> PromptMaker:
    return PromptMaker(model_dir())
