"""What the benches of many workers send and how they count what comes back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from bench.delayed.load import (
    Kind,
    Outcome,
    attainment,
    failures,
    new_picture,
    poisson_times,
)
from bench.delayed.profiles import PICTURE_PATCHES, PICTURE_PIXELS, PICTURE_TOKENS, photo_model
from bench.delayed.report import table
from services.planner.slo import Slo
from shared.demo import model_dir
from shared.modelspec import ModelSpec

HEAVY = Kind("heavy", 4, 8, 10, weight=3.0, slo=Slo(1.0, 0.1))
LIGHT = Kind("light", 0, 8, 50, weight=1.0, slo=Slo(0.5, 0.1))


def test_arrivals_keep_mix_and_rate() -> None:
    times = poisson_times([HEAVY, LIGHT], rate_per_s=5.0, num_requests=2000, seed=1)
    assert times == poisson_times([HEAVY, LIGHT], rate_per_s=5.0, num_requests=2000, seed=1)
    assert sum(kind is HEAVY for _, kind in times) / 2000 == pytest.approx(0.75, abs=0.03)
    assert times[-1][0] == pytest.approx(400.0, rel=0.1)


def test_a_request_is_good_within_its_own_limits_and_without_error() -> None:
    outcomes = [
        Outcome(HEAVY, ttft_s=0.9, tpot_s=0.05),
        Outcome(HEAVY, ttft_s=1.1, tpot_s=0.05),
        Outcome(LIGHT, ttft_s=0.4, tpot_s=0.2),
        Outcome(LIGHT, error="HTTP 503"),
    ]
    assert attainment(outcomes) == {"heavy": 0.5, "light": 0.0}
    assert failures(outcomes) == ["HTTP 503"]


def test_pictures_differ_and_cost_what_the_profile_says() -> None:
    draw = np.random.default_rng(0)
    files = {new_picture(draw) for _ in range(50)}
    assert len(files) == 50
    assert Image.open(io.BytesIO(files.pop())).size == (PICTURE_PIXELS, PICTURE_PIXELS)
    vision = ModelSpec.load(model_dir()).vision
    assert vision is not None
    layout = vision.sizing.measure(PICTURE_PIXELS, PICTURE_PIXELS)
    assert layout.num_tokens == PICTURE_TOKENS
    assert layout.grid_thw == (1, 16, 16)
    assert PICTURE_PATCHES == 16 * 16


def test_the_profile_gives_the_published_times_back() -> None:
    timing = photo_model()
    picture_s = timing.encode_s(PICTURE_PATCHES) + timing.prefill_s([(0, PICTURE_TOKENS)]) - 0.02
    assert picture_s == pytest.approx(0.4675, abs=0.002)  # one more photograph, table 4
    assert timing.decode_s(200 * 18, 18) == pytest.approx(0.05, rel=0.1)  # table 6, with switch
    assert timing.decode_s(200 * 45, 45) == pytest.approx(0.12, rel=0.1)  # and without


def test_a_table_lines_its_columns_up() -> None:
    assert table(("name", "s"), [("a", "1.0"), ("longer", "10.0")]).splitlines() == [
        "name       s",
        "a        1.0",
        "longer  10.0",
    ]
