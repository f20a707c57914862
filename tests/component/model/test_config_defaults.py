"""Fields that configs leave out mean here what they mean to transformers."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from shared.model.registry import FAMILIES

# Names of ours that transformers' classes keep under another name, or decide themselves.
OURS = {"sliding_window_pattern", "use_sliding_window", "norm_topk_prob"}
WITH_DEFAULTS = [name for name, family in FAMILIES.items() if family.defaults and not family.tower]


@pytest.mark.parametrize("model_type", WITH_DEFAULTS)
def test_defaults(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, use_sliding_window=True)
    expected = {
        name: value
        for name, value in FAMILIES[model_type].defaults.items()
        if name not in OURS and value != getattr(config, name)
    }
    assert not expected


def test_gemma_thetas() -> None:
    rope = AutoConfig.for_model("gemma3_text").rope_parameters
    family = FAMILIES["gemma3_text"]
    assert rope["full_attention"]["rope_theta"] == family.default_rope_theta
    assert rope["sliding_attention"]["rope_theta"] == family.default_local_rope_theta


@pytest.mark.parametrize("model_type", [n for n, f in FAMILIES.items() if not f.tower])
def test_rope_theta(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    if model_type != "gemma3_text":
        assert config.default_theta == FAMILIES[model_type].default_rope_theta
