"""Where kernels run: on a CUDA device, or on the CPU where TRITON_INTERPRET=1 was set.

tests/component/model/gpu runs this folder under the interpreter in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.model.gpu import fused
from tests.support.models import model_dir_of
from tests.support.vision_folders import vision_dir_of

__all__ = ["model_dir_of", "vision_dir_of"]

FEW_ROWS = 4


@pytest.fixture
def device() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run on the CPU")
    return "cuda"


@pytest.fixture
def use_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model takes the kernels, as it does by itself on a GPU; few rows are those of a prompt's
    last tokens and of decode steps."""
    monkeypatch.setattr(fused, "takes", lambda x: x.dtype in fused.KERNEL_DTYPES)
    monkeypatch.setattr(fused, "takes_few_rows", lambda x: x.shape[0] <= FEW_ROWS)


@pytest.fixture
def tiny_model(model_dir_of: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    """Folder of the family that the test is parametrized with."""
    return model_dir_of(request.param)
