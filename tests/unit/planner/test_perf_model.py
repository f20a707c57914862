"""The fit finds the costs that made the samples, and says how far it is off."""

from __future__ import annotations

import random

import pytest

from services.planner.cluster import Links
from services.planner.fit import fit
from services.planner.perf_model import PerformanceModel, Samples
from shared.errors import SettingsError

PROMPTS = [[64], [256], [1024], [2048], [64] * 8, [512, 128], [300, 300, 300]]
CONTEXTS = [[n] * b for n in (16, 256, 2048) for b in (1, 4, 16)]


def samples(noise: float = 0.0, seed: int = 0) -> Samples:
    draw = random.Random(seed)

    def noisy(seconds: float) -> float:
        return seconds * (1 + draw.uniform(-noise, noise))

    return Samples(
        encode=[(n, noisy(0.002 + 3e-6 * n)) for n in (64, 256, 1024, 4096)],
        prefill=[
            (ls, noisy(0.01 + 2e-5 * sum(ls) + 4e-9 * sum(n * n for n in ls))) for ls in PROMPTS
        ],
        decode=[(cs, noisy(0.004 + 1e-7 * sum(cs) + 2e-4 * len(cs))) for cs in CONTEXTS],
    )


def model_of(measured: Samples) -> PerformanceModel:
    return PerformanceModel.of_samples(
        measured, kv_bytes_per_token=1024, embedding_bytes_per_patch=512.0
    )


def test_recovers_the_coefficients_of_exact_samples() -> None:
    model = model_of(samples())
    assert model.encode.coefficients == pytest.approx((0.002, 3e-6))
    assert model.prefill.coefficients == pytest.approx((0.01, 2e-5, 4e-9))
    assert model.decode.coefficients == pytest.approx((0.004, 1e-7, 2e-4))
    assert model.prefill.max_error == pytest.approx(0.0, abs=1e-9)


def test_predicts_unseen_steps_within_the_noise() -> None:
    model = model_of(samples(noise=0.05, seed=3))
    assert model.prefill_s([(0, 1500)]) == pytest.approx(0.01 + 0.03 + 0.009, rel=0.08)
    assert model.decode_s(8 * 700, 8) == pytest.approx(0.004 + 5.6e-4 + 1.6e-3, rel=0.08)
    assert 0.98 < model.decode.r_squared < 1.0
    assert 0 < model.decode.median_error <= model.decode.max_error
    assert 0 < model.decode.mean_error <= model.decode.max_error < 0.11


def test_slices_of_a_prompt_cost_its_attention_once() -> None:
    model = model_of(samples())
    sliced = model.prefill_s([(0, 600)]) + model.prefill_s([(600, 1000)])
    assert sliced == pytest.approx(model.prefill_s([(0, 1000)]) + 0.01)


def test_no_coefficient_falls_below_zero() -> None:
    fitted = fit("encode", [(1,), (2,), (3,)], [3.0, 2.0, 1.0])
    assert fitted.coefficients[1] == 0.0
    assert fitted.coefficients[0] > 0


def test_json_goes_out_and_in() -> None:
    links = Links(queue_hop_s=0.003, bytes_per_s=2e8)
    model = model_of(samples(noise=0.1)).model_copy(update={"links": links})
    assert PerformanceModel.from_json(model.model_dump_json(), "p.json") == model


def test_bad_input_is_named() -> None:
    with pytest.raises(SettingsError, match=r"p.json: encode: Field required"):
        PerformanceModel.from_json("{}", "p.json")
    slow = model_of(samples()).model_copy(update={"links": Links()}).model_dump_json()
    with pytest.raises(SettingsError, match=r"p.json: links take 0 s or more"):
        PerformanceModel.from_json(slow.replace('"pull_s":', '"pull_s":-'), "p.json")
    text = model_of(samples()).model_dump_json().replace('"encode":{"coefficients":[', "!")
    with pytest.raises(SettingsError, match=r"p.json: file: Invalid JSON"):
        PerformanceModel.from_json(text, "p.json")
    with pytest.raises(SettingsError, match=r"1 rows and 1 times were measured, at least 2"):
        fit("encode", [(1,)], [1.0])
    with pytest.raises(SettingsError, match=r"not above 0"):
        fit("encode", [(1,), (2,)], [1.0, 0.0])
