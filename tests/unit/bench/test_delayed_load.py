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
from bench.delayed.profiles import (
    PICTURE_PATCHES,
    PICTURE_PIXELS,
    PICTURE_TOKENS,
    photo_model,
    slowed,
)
from bench.delayed.report import table
from bench.role_switching import LONG, SHORT, timetable
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


def test_a_slowed_model_takes_a_factor_longer_in_every_stage() -> None:
    timing, slow = photo_model(), slowed(photo_model(), 3.0)
    assert slow.encode_s(100) == pytest.approx(3 * timing.encode_s(100))
    assert slow.prefill_s([(0, 50)]) == pytest.approx(3 * timing.prefill_s([(0, 50)]))
    assert slow.decode_s(900, 9) == pytest.approx(3 * timing.decode_s(900, 9))
    assert slow.kv_bytes_per_token == timing.kv_bytes_per_token


def test_short_answers_come_before_long_ones() -> None:
    times = timetable(10, 90, rate_per_s=3.0)
    assert [kind for _, kind in times] == [SHORT] * 10 + [LONG] * 90
    assert [at_s for at_s, _ in times] == sorted(at_s for at_s, _ in times)


def test_a_table_lines_its_columns_up() -> None:
    assert table(("name", "s"), [("a", "1.0"), ("longer", "10.0")]).splitlines() == [
        "name       s",
        "a        1.0",
        "longer  10.0",
    ]
