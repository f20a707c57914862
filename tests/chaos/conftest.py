"""One cluster for all that is killed and moved: two workers of each stage, mended after each test.

Where the processor can, it computes deterministically: then a recomputed answer is equal to the
last bit, however long it is and wherever its draws fall.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.prompts import PromptMaker
from services.local_engine import LocalEngine
from shared.demo import model_dir
from shared.model.kernels.choice import has_compiled_kernels
from shared.modelspec import ModelSpec
from shared.runtime.host import ModelFolder
from tests.support.cluster import Cluster, running_cluster
from tests.support.load import mend

BUS = ["--nats-ack-wait-s", "2"]
LIVES = ["--registration-ttl-s", "3"]
FAST = [*BUS, *LIVES, "--pull-timeout-s", "3", "--switch-finish-s", "0.2"]
"""Short lives, so that a death is noticed within seconds."""


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    exact = [*FAST, *(["--deterministic"] if has_compiled_kernels() else [])]
    flags = {
        "encoder": FAST,
        # A long prompt's KV travels in many pieces while the rest is computed.
        "prefill": [*exact, "--chunk-tokens", "256"],
        "decode": exact,
        "gateway": [*BUS, *LIVES],
    }
    folder: Path = tmp_path_factory.mktemp("chaos")
    with running_cluster(folder, encoders=2, prefills=2, decodes=2, flags=flags) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    yield shared_cluster
    mend(shared_cluster)


@pytest.fixture(scope="session")
def engine() -> LocalEngine:
    """What the shared cluster's answers are compared with."""
    spec = ModelSpec.load(model_dir())
    return LocalEngine(
        ModelFolder(model_dir(), spec, spec.dtype, "cpu", deterministic=has_compiled_kernels())
    )


@pytest.fixture(scope="session")
def usual_engine() -> LocalEngine:
    """With the kernels that workers use unless told otherwise."""
    spec = ModelSpec.load(model_dir())
    return LocalEngine(ModelFolder(model_dir(), spec, spec.dtype, "cpu"))


@pytest.fixture(scope="session")
def prompts() -> PromptMaker:
    return PromptMaker(model_dir())
